"""What the world models of this package share: units, bounds, decoding, and how weights are learnt and averaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch as th
from torch import nn

from sb3_polygrad.core.averaging import ExponentialAverage
from sb3_polygrad.core.capture import Captured
from sb3_polygrad.core.gradients import limited
from sb3_polygrad.core.normalizer import RunningNormalizer
from sb3_polygrad.core.optimizing import step_if
from sb3_polygrad.core.precision import tensor_cores
from sb3_polygrad.core.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.world_models.base import Context, Imagine, PolicyFn, WorldModel


class FitSettings(NamedTuple):
    """
    :param learning_rate: of Adam (Tables 2 and 3)
    :param max_grad_norm: bound on the gradient's norm
    :param ema_decay: share that the average keeps at each update
    :param ema_every: gradient steps between updates of the average
    :param weight_decay: of the matrices of all layers but the last, the head, as AdamW has it
    """

    learning_rate: float = 3e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    ema_every: int = 10
    weight_decay: float = 0.0


DEFAULT_FIT_SETTINGS = FitSettings()


def check_sizes(**sizes: int) -> None:
    """
    :param sizes: settings of a world model that count something
    :raises ValueError: for one that is less than 1
    """
    for argument, size in sizes.items():
        if size < 1:
            raise ValueError(f"world_model_kwargs: {argument} must be at least 1, got {size}")


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
    Whatever a network says, imagined values stay near what was really seen; whether it ever said NaN is remembered. On the way
    back their gradients are bounded, too: :func:`~sb3_polygrad.core.gradients.limited`.

    :param low: ``(channels,)``
    :param high: ``(channels,)``
    """

    def __init__(self, low: th.Tensor, high: th.Tensor) -> None:
        self.low, self.high = low, high
        self.faulty = th.zeros((), dtype=th.bool, device=low.device)

    def __call__(self, estimate: th.Tensor) -> th.Tensor:
        """Clamp an estimate ``(..., channels)``; NaN becomes 0."""
        self.faulty = self.faulty | estimate.isnan().any()
        return limited(estimate.nan_to_num(nan=0.0).clamp(self.low, self.high))


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
    :param fit_settings: optimiser and average
    :param bound_margin: imagined values stay within what was really seen, widened by this share on each side
    """

    capturable: ClassVar[bool] = True
    ending_is_probability = True
    """Whether the last channel of an imagined state is the probability of an ending, which is then drawn, or a draw itself."""
    fitted: th.Tensor
    action_low: th.Tensor
    action_high: th.Tensor
    average: ExponentialAverage

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        fit_settings: FitSettings = DEFAULT_FIT_SETTINGS,
        bound_margin: float = 0.5,
    ) -> None:
        super().__init__(obs_dim, len(action_low), horizon)
        for argument in ("ema_every", "learning_rate", "max_grad_norm"):
            if not getattr(fit_settings, argument) > 0:
                raise ValueError(f"world_model_kwargs: {argument} must be positive, got {getattr(fit_settings, argument)}")
        if not 0.0 <= fit_settings.ema_decay < 1.0:
            raise ValueError(f"world_model_kwargs: ema_decay must lie in [0, 1), got {fit_settings.ema_decay}")
        if not fit_settings.weight_decay >= 0.0:
            raise ValueError(f"world_model_kwargs: weight_decay must not be negative, got {fit_settings.weight_decay}")
        if not fit_settings.weight_decay * fit_settings.learning_rate < 1.0:  # of itself a weight keeps 1 minus that per step
            raise ValueError(
                f"world_model_kwargs: weight_decay times learning_rate must be less than 1, got {fit_settings.weight_decay} "
                f"times {fit_settings.learning_rate}: lower weight_decay"
            )
        self.settings = fit_settings
        self.bound_margin = bound_margin
        self.state_normalizer = RunningNormalizer(obs_dim)
        # Rewards and terminals; a rare ending is not blown up beyond 20 standard deviations.
        self.outcome_normalizer = RunningNormalizer(2, min_std=0.05)
        self.action_normalizer = RunningNormalizer(self.action_dim)
        self.register_buffer("action_low", action_low.float(), persistent=False)
        self.register_buffer("action_high", action_high.float(), persistent=False)
        self.register_buffer("fitted", th.tensor(0.0))
        self._n_fitted = 0  # the same, known without asking the device
        self.register_load_state_dict_post_hook(_count_after_loading)

    def observe(self, observations: th.Tensor, next_observations: th.Tensor, actions: th.Tensor, outcomes: th.Tensor) -> None:
        """See :meth:`WorldModel.observe`. Successors say what the acting observations do not: the last one of an episode."""
        self.state_normalizer.update(th.cat([observations, next_observations]))
        self.outcome_normalizer.update(outcomes)
        self.action_normalizer.update(actions)

    # ------------------------------------------------------------------ learning

    def _will_learn(self, network: nn.Module) -> None:
        """Set up the optimiser and the average of the network that learns; to be called once it is there."""
        self.average = ExponentialAverage(network, self.settings.ema_decay)
        self.optimizer = self._optimizer(network)
        self._captured_fit = Captured(self._fit_tensors, self._learnt_tensors)

    def _optimizer(self, network: nn.Module) -> th.optim.Optimizer:
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        if decay == 0.0:
            return th.optim.Adam(network.parameters(), lr=rate, fused=True)
        decays = {name: p.dim() > 1 and not name.startswith("head") for name, p in network.named_parameters()}
        groups = [
            {"params": [p for name, p in network.named_parameters() if decays[name]], "weight_decay": decay},
            {"params": [p for name, p in network.named_parameters() if not decays[name]], "weight_decay": 0.0},
        ]
        return th.optim.AdamW(groups, lr=rate, fused=True)

    def fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        """See :meth:`WorldModel.fit`; on a GPU a CUDA graph, with TF32 (see :func:`tensor_cores`)."""
        with tensor_cores():
            if self.cuda_graphs:
                rates = tuple(group["lr"] for group in self.optimizer.param_groups)
                metrics = self._captured_fit(*batch, key=(self.settings, rates, self._is_averaging, self.average.started))
            else:
                metrics = self._fit(batch)
        self._n_fitted += 1
        return metrics

    @abstractmethod
    def _fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        """:meth:`fit` itself: a loss, and :meth:`_learn`."""

    def _fit_tensors(self, *batch: th.Tensor) -> dict[str, th.Tensor]:
        return self._fit(Trajectory(*batch))

    def _learnt_tensors(self) -> list[th.Tensor]:
        """Where the optimiser reads and writes; the rest of the model only moves together with its parameters."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, th.Tensor)]
        return [*parameters, *states]

    @property
    def _is_averaging(self) -> bool:
        """Whether the present gradient step moves the average."""
        return self._n_fitted % self.settings.ema_every == 0

    def _learn(self, network: nn.Module, loss: th.Tensor) -> dict[str, th.Tensor]:
        """One gradient step of the network, and of its average; returns what every ``fit`` logs."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.settings.max_grad_norm)
        usable = th.isfinite(norm)
        step_if(usable, self.optimizer)  # else no trace is left in network or optimiser
        if self._is_averaging:
            self.average.update_parameters(network)
        self.fitted += 1.0
        return {"loss": loss.detach(), "skipped": 1.0 - usable.float()}

    # ------------------------------------------------------------------ units

    def _condition(self, actions: th.Tensor) -> th.Tensor:
        """Actions as the network sees them: what the environment would do, standardised."""
        return self.action_normalizer.normalize(th.clamp(actions, self.action_low, self.action_high))

    def _encode(self, batch: Trajectory) -> th.Tensor:
        """States of real windows, ``(batch, horizon + 1, channels)``, standardised."""
        outcomes = self.outcome_normalizer.normalize(th.stack([batch.rewards, batch.terminals], dim=-1))
        return th.cat([self.state_normalizer.normalize(batch.observations), nn.functional.pad(outcomes, (0, 0, 1, 0))], dim=-1)

    # ------------------------------------------------------------------ imagining

    @abstractmethod
    def _imagine(self, start: th.Tensor, policy: PolicyFn, context: Context | None) -> Imagined:
        """See :meth:`imagine`, in standardised units."""

    @th.no_grad()
    @tensor_cores()
    def imagine(self, start: th.Tensor, policy: PolicyFn, context: Context | None = None) -> Trajectory:
        """See :meth:`WorldModel.imagine`."""
        self._check_fitted()
        observations, actions, rewards, endings = self._decode(self._imagine(start, policy, context), start)
        # Cut at one half, an ending of which the model is not quite sure would never happen, and a policy that risks it learns
        # that there is nothing to fear.
        threshold = th.rand_like(endings) if self.ending_is_probability else 0.5
        terminals = th.cummax((endings > threshold).float(), dim=1).values
        return Trajectory(observations, actions, rewards, terminals, mask_after_ending(terminals))

    @property
    def imagine_expected(self) -> Imagine | None:
        """See :attr:`WorldModel.imagine_expected`: for models that say how probable an ending is, and do not draw it."""
        return self._imagine_expected if self.ending_is_probability else None

    @tensor_cores()
    def _imagine_expected(self, start: th.Tensor, policy: PolicyFn, context: Context | None = None) -> Trajectory:
        self._check_fitted()
        observations, actions, rewards, endings = self._decode(self._imagine(start, policy, context), start)
        terminals = endings.clamp(0.0, 1.0)
        return Trajectory(observations, actions, rewards, terminals, mask_after_ending(terminals))

    def _decode(self, imagined: Imagined, start: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        :param imagined: the policy never saw a NaN, but the caller must: a batch with a fault in it is NaN throughout
        :param start: ``(batch, obs_dim)``
        :return: observations, actions, rewards and the channel that tells of endings, in the environment's units
        """
        states = imagined.states.masked_fill(imagined.faulty, th.nan)
        observations = self.state_normalizer.denormalize(states[..., : self.obs_dim])
        observations[:, 0] = start
        rewards, endings = self.outcome_normalizer.denormalize(states[:, 1:, self.obs_dim :]).unbind(dim=-1)
        # An environment in which nothing ever ended has no endings to imagine.
        return observations, imagined.actions, rewards, endings * (self.outcome_normalizer.high[1] > 0.5)

    def _bound(self, units: th.Tensor | float = 1.0) -> Bound:
        """
        Bounds of a state's channels for one batch of imagined trajectories.

        :param units: what the states are measured in, relative to standardised ones
        """
        bounds = zip(
            self.state_normalizer.normalized_bounds(self.bound_margin),
            self.outcome_normalizer.normalized_bounds(self.bound_margin),
            strict=True,
        )
        return Bound(*(th.cat(pair) / units for pair in bounds))

    def _check_fitted(self) -> None:
        if self._n_fitted == 0:
            raise RuntimeError("the world model was never fitted: call fit() on real windows (or learn()) before imagining")


def _count_after_loading(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, StandardizedWorldModel)
    module._n_fitted = int(module.fitted)
