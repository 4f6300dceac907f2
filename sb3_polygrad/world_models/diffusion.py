"""The paper's world model: a diffusion model of whole trajectories, sampled under a policy's guidance."""

from __future__ import annotations

from typing import NamedTuple

import torch as th
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sb3_polygrad.core.averaging import ExponentialAverage
from sb3_polygrad.core.normalizer import RunningNormalizer
from sb3_polygrad.core.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.diffusion.base import Sampler, Task
from sb3_polygrad.world_models.base import PolicyFn, WorldModel


class FitSettings(NamedTuple):
    """
    :param learning_rate: of Adam (Tables 2 and 3)
    :param max_grad_norm: bound on the gradient's norm
    :param ema_decay: share that the average keeps at each update
    :param ema_every: gradient steps between updates of the average
    """

    learning_rate: float = 3e-4
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    ema_every: int = 10


DEFAULT_FIT_SETTINGS = FitSettings()


class DiffusionWorldModel(WorldModel):
    """
    Learns to denoise windows of real steps (Algorithm 1) and imagines by diffusion under a policy (Algorithm 2).

    The diffused sequence has ``horizon + 1`` states of channels (observation, reward, terminal), all standardised; state
    ``t + 1`` carries the reward and the terminal flag of the step that led to it, state 0 only the start observation.
    It is inpainted: never noisy, in training and in sampling. The denoiser is conditioned on the actions as the environment
    would receive them (clipped to its box), standardised, without noise.

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param denoiser: network ``(noisy, actions, level) -> output``, see :mod:`sb3_polygrad.denoisers`
    :param sampler: how trajectories are noised for training, and denoised under a policy
    :param fit_settings: optimiser and average
    :param bound_margin: clean estimates stay within what was really seen, widened by this share on each side
    """

    fitted: th.Tensor
    action_low: th.Tensor
    action_high: th.Tensor

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        denoiser: nn.Module,
        sampler: Sampler,
        fit_settings: FitSettings = DEFAULT_FIT_SETTINGS,
        bound_margin: float = 0.5,
    ) -> None:
        super().__init__(obs_dim, len(action_low), horizon)
        self.denoiser = denoiser
        self.sampler = sampler
        self.settings = fit_settings
        self.bound_margin = bound_margin
        self.state_normalizer = RunningNormalizer(obs_dim)
        # Rewards and terminals; a rare ending is not blown up beyond 20 standard deviations.
        self.outcome_normalizer = RunningNormalizer(2, min_std=0.05)
        self.action_normalizer = RunningNormalizer(self.action_dim)
        self.register_buffer("action_low", action_low.float(), persistent=False)
        self.register_buffer("action_high", action_high.float(), persistent=False)
        self.register_buffer("fitted", th.tensor(0.0))
        self.average = AveragedModel(denoiser, multi_avg_fn=ExponentialAverage(fit_settings.ema_decay))
        # A float counter: everything in a state dict of this package is floating point.
        self.average.n_averaged = self.average.n_averaged.float()
        self.average.requires_grad_(False)
        self.optimizer = th.optim.Adam(self.denoiser.parameters(), lr=fit_settings.learning_rate, fused=True)

    def observe(self, observations: th.Tensor, next_observations: th.Tensor, actions: th.Tensor, outcomes: th.Tensor) -> None:
        """See :meth:`WorldModel.observe`. Successors say what the acting observations do not: the last one of an episode."""
        self.state_normalizer.update(th.cat([observations, next_observations]))
        self.outcome_normalizer.update(outcomes)
        self.action_normalizer.update(actions)

    def _condition(self, actions: th.Tensor) -> th.Tensor:
        """Actions as the denoiser learns from them: what the environment would do, standardised."""
        return self.action_normalizer.normalize(th.clamp(actions, self.action_low, self.action_high))

    def fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        """See :meth:`WorldModel.fit`; Algorithm 1, lines 3 to 6."""
        outcomes = self.outcome_normalizer.normalize(th.stack([batch.rewards, batch.terminals], dim=-1))
        clean = th.cat(
            [self.state_normalizer.normalize(batch.observations), nn.functional.pad(outcomes, (0, 0, 1, 0))], dim=-1
        )
        # After an ending the window repeats the last action. Departs from the release, which shows the repetition to the
        # denoiser: it would tell where the episode ended, and imagined actions, which never repeat, that it did not.
        strangers = batch.actions.flatten(0, 1)[th.randperm(batch.mask.numel(), device=clean.device)].view_as(batch.actions)
        actions = th.where(batch.mask[..., None] > 0.0, batch.actions, strangers)
        corrupted = self.sampler.corrupt(clean, self._condition(actions))
        output = self.denoiser(corrupted.noisy, corrupted.actions, corrupted.level)
        loss = nn.functional.mse_loss(output[:, 1:], corrupted.target[:, 1:])  # line 6; the first state is given

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.settings.max_grad_norm)
        if th.isfinite(norm):  # else no trace is left in network or optimiser
            self.optimizer.step()
        if int(self.fitted) % self.settings.ema_every == 0:
            self.average.update_parameters(self.denoiser)
        self.fitted += 1.0
        return {"loss": loss.detach()}

    @th.no_grad()
    def imagine(self, start: th.Tensor, policy: PolicyFn) -> Trajectory:
        """See :meth:`WorldModel.imagine`; Algorithm 2."""
        if self.fitted == 0.0:
            raise RuntimeError("the world model was never fitted: call fit() on real windows (or learn()) before imagining")
        # Whatever the network says, imagined values stay near what was really seen.
        bounds = zip(
            self.state_normalizer.normalized_bounds(self.bound_margin),
            self.outcome_normalizer.normalized_bounds(self.bound_margin),
            strict=True,
        )
        low, high = (th.cat(pair) for pair in bounds)
        faulty = th.zeros((), dtype=th.bool, device=start.device)

        def bound(clean: th.Tensor) -> th.Tensor:
            faulty.logical_or_(clean.isnan().any())
            return clean.nan_to_num(nan=0.0).clamp(low, high)

        task = Task(
            denoiser=self.average,
            condition=self._condition,
            policy=lambda states: policy(self.state_normalizer.denormalize(states[..., : self.obs_dim])),
            bound=bound,
            first=nn.functional.pad(self.state_normalizer.normalize(start), (0, 2)),
            noise=th.randn(len(start), self.horizon, self.action_dim, device=start.device),
            action_mean=self.action_normalizer.denormalize(th.zeros(self.action_dim, device=start.device)),
            action_std=self.action_normalizer.std,
        )
        sample = self.sampler.sample(task)
        # The policy never sees a NaN, but the caller must: a batch with a fault in it is NaN throughout.
        return self._decode(sample.states.masked_fill(faulty, th.nan), sample.actions, start)

    def _decode(self, states: th.Tensor, actions: th.Tensor, start: th.Tensor) -> Trajectory:
        observations = self.state_normalizer.denormalize(states[..., : self.obs_dim])
        observations[:, 0] = start
        rewards, endings = self.outcome_normalizer.denormalize(states[:, 1:, self.obs_dim :]).unbind(dim=-1)
        # An environment in which nothing ever ended has no endings to imagine.
        ended = ((endings > 0.5) & (self.outcome_normalizer.high[1] > 0.5)).float()
        terminals = th.cummax(ended, dim=1).values
        return Trajectory(observations, actions, rewards, terminals, mask_after_ending(terminals))

    def adapt(self, standardized_std: th.Tensor, policy_std: th.Tensor) -> dict[str, th.Tensor]:
        """See :meth:`WorldModel.adapt`; the δ controller."""
        return self.sampler.adapt(standardized_std, policy_std)
