"""What the world models of this package share: normalisation, bounds, decoding, and how weights are learnt and averaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_polygrad.common.averaging import MovingAverage
from sb3_polygrad.common.gradients import clip_row_gradients
from sb3_polygrad.common.normalizer import RunningNormalizer
from sb3_polygrad.common.optimizing import gradient_step
from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.world_models.base import Metrics, PolicyFn, WorldModel

BOUND_MARGIN = 0.5
"""Imagined values stay within what was really seen, widened by this fraction of its width on each side."""


class FitSettings(NamedTuple):
    """
    :param learning_rate: of Adam
    :param ema_decay: fraction that the average of the weights keeps at each gradient step
    :param weight_decay: of the matrices of all layers but the last, the head, as AdamW has it
    :param max_grad_norm: bound on the gradient's norm
    """

    learning_rate: float
    ema_decay: float = 0.99
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class Imagined(NamedTuple):
    """
    What a model's network makes of a start and a policy.

    :param states: ``(batch, horizon + 1, channels)``, standardised
    :param actions: ``(batch, horizon, action_dim)`` as drawn
    :param faulty: bool scalar, whether the network said NaN
    """

    states: th.Tensor
    actions: th.Tensor
    faulty: th.Tensor


class Bound:
    """
    Clamps predictions to the widened range of the data, and records whether there was a NaN (which becomes 0).

    Backwards it clips gradients per trajectory: :func:`~sb3_polygrad.common.gradients.clip_row_gradients`.

    :param low: ``(channels,)``
    :param high: ``(channels,)``
    """

    def __init__(self, low: th.Tensor, high: th.Tensor) -> None:
        self.low, self.high = low, high
        self.faulty = th.zeros((), dtype=th.bool, device=low.device)

    def __call__(self, estimate: th.Tensor) -> th.Tensor:
        """Clamp a prediction ``(..., channels)``."""
        self.faulty = self.faulty | estimate.isnan().any()
        return clip_row_gradients(estimate.nan_to_num(nan=0.0).clamp(self.low, self.high))


class StandardizedWorldModel(WorldModel, ABC):
    """
    A world model whose network works in standardised units: those of a sequence of ``horizon + 1`` states.

    The channels of a state are (observation, reward, terminal); state ``t + 1`` carries the reward and the terminal flag of
    the step that led to it, state 0 only the start observation. Actions are shown to the network as the environment would
    receive them (clipped to its box), standardised. The network that imagines is an average of the one that learns.

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param window: steps of the segments that it is fitted on; ``horizon`` if not given
    """

    fit_settings: FitSettings
    network: nn.Module
    average: MovingAverage
    fitted: th.Tensor
    action_low: th.Tensor
    action_high: th.Tensor

    def __init__(
        self, obs_dim: int, action_low: th.Tensor, action_high: th.Tensor, horizon: int, window: int | None = None
    ) -> None:
        super().__init__(obs_dim, len(action_low), horizon, window)
        self.state_normalizer = RunningNormalizer(obs_dim)
        # Rewards and terminals; a rare terminal is not blown up beyond 20 standard deviations.
        self.outcome_normalizer = RunningNormalizer(2, min_std=0.05)
        self.action_normalizer = RunningNormalizer(self.action_dim)
        self.register_buffer("action_low", action_low.float(), persistent=False)
        self.register_buffer("action_high", action_high.float(), persistent=False)
        self.register_buffer("fitted", th.tensor(0.0))
        self.n_fits = 0  # a copy of ``fitted`` on the host
        self.register_load_state_dict_post_hook(_count_after_loading)

    def observe(self, steps: Trajectory) -> None:
        """See :meth:`WorldModel.observe`. The observations include the last one of each episode."""
        self.state_normalizer.update(steps.observations)
        self.outcome_normalizer.update(th.cat([steps.rewards, steps.terminals], dim=1))
        self.action_normalizer.update(steps.actions)

    # ------------------------------------------------------------------ learning

    def _will_learn(self, network: nn.Module, settings: FitSettings) -> None:
        """Set up the network that learns, its average and its optimiser."""
        if not settings.weight_decay * settings.learning_rate < 1.0:  # AdamW multiplies weights by 1 minus that
            raise ValueError(
                f"world_model_kwargs: weight_decay times learning_rate must be less than 1, got {settings.weight_decay} "
                f"times {settings.learning_rate}: lower weight_decay"
            )
        self.network, self.fit_settings = network, settings
        self.average = MovingAverage(network, settings.ema_decay)
        decays = {name: p.dim() > 1 and "bias" not in name and "head" not in name for name, p in network.named_parameters()}
        groups = [
            {"params": [p for name, p in network.named_parameters() if decays[name]], "weight_decay": settings.weight_decay},
            {"params": [p for name, p in network.named_parameters() if not decays[name]], "weight_decay": 0.0},
        ]
        self.optimizer = th.optim.AdamW(groups, lr=settings.learning_rate, fused=True)

    def _learn(self, loss: th.Tensor) -> Metrics:
        """One gradient step of the network, and of its average; returns what every ``fit`` logs."""
        skipped = gradient_step(self.optimizer, loss, self.network.parameters(), self.fit_settings.max_grad_norm)
        self.average.update_parameters(self.network)
        self.fitted += 1.0
        self.n_fits += 1
        return {"loss": loss.detach(), "skipped": skipped}

    # ------------------------------------------------------------------ units

    def _condition(self, actions: th.Tensor) -> th.Tensor:
        """Actions as the network sees them: what the environment would do, standardised."""
        return self.action_normalizer.normalize(th.clamp(actions, self.action_low, self.action_high))

    def _encode(self, batch: Trajectory) -> th.Tensor:
        """States of real segments, ``(batch, horizon + 1, channels)``, standardised."""
        outcomes = self.outcome_normalizer.normalize(th.stack([batch.rewards, batch.terminals], dim=-1))
        return th.cat([self.state_normalizer.normalize(batch.observations), nn.functional.pad(outcomes, (0, 0, 1, 0))], dim=-1)

    # ------------------------------------------------------------------ imagining

    @abstractmethod
    def _imagine(self, start: th.Tensor, policy: PolicyFn) -> Imagined:
        """See :meth:`imagine`; ``start`` is in the environment's units, the states that are returned are standardised."""

    def imagine(self, start: th.Tensor, policy: PolicyFn, *, differentiable: bool = False) -> Trajectory:
        """See :meth:`WorldModel.imagine`."""
        if self.n_fits == 0:
            raise RuntimeError("the world model was never fitted: call fit() on real segments (or learn()) before imagining")
        if differentiable and not self.differentiable:
            raise ValueError(f"{type(self).__name__} is not differentiable: pass differentiable=False")
        with th.set_grad_enabled(differentiable):
            observations, actions, rewards, endings = self._decode(self._imagine(start, policy), start)
            if differentiable:
                terminals = endings.clamp(0.0, 1.0)
            else:
                # Differentiable models predict the probability of a terminal, which is drawn here: cut at one half, a terminal
                # that the model is unsure of would never happen, and a policy would learn to risk it. The other models have
                # drawn the channel themselves, and it only has to be rounded.
                threshold = th.rand_like(endings) if self.differentiable else 0.5
                terminals = th.cummax((endings > threshold).float(), dim=1).values
            return Trajectory(observations, actions, rewards, terminals, mask_after_ending(terminals))

    def _decode(self, imagined: Imagined, start: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        :param imagined: what the network made; if it said NaN once, the whole batch becomes NaN for the caller to see
        :param start: ``(batch, obs_dim)``
        :return: observations, actions, rewards and the terminal channel, in the environment's units
        """
        states = imagined.states.masked_fill(imagined.faulty, th.nan)
        observations = self.state_normalizer.denormalize(states[..., : self.obs_dim])
        observations[:, 0] = start
        rewards, endings = self.outcome_normalizer.denormalize(states[:, 1:, self.obs_dim :]).unbind(dim=-1)
        # Where no episode ever terminated, none is imagined to.
        return observations, imagined.actions, rewards, endings * (self.outcome_normalizer.high[1] > 0.5)

    def _bound(self) -> Bound:
        """Bounds of a state's channels for one batch of imagined trajectories."""
        bounds = zip(
            self.state_normalizer.normalized_bounds(BOUND_MARGIN),
            self.outcome_normalizer.normalized_bounds(BOUND_MARGIN),
            strict=True,
        )
        return Bound(*map(th.cat, bounds))


def _count_after_loading(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, StandardizedWorldModel)
    module.n_fits = int(module.fitted)
