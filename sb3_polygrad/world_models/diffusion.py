"""The paper's world model: a diffusion model of whole trajectories, sampled under a policy's guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch as th
from torch import nn

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.common.validation import Count, Decay, LearningRate, NotNegative, Positive, check_settings, choose
from sb3_polygrad.diffusion.base import Sampler, Task
from sb3_polygrad.diffusion.controllers import DeltaController
from sb3_polygrad.diffusion.denoiser import Denoiser
from sb3_polygrad.diffusion.gaussian import GaussianDiffusion, Prediction
from sb3_polygrad.diffusion.guidance import (
    NoisyStatesGuidance,
    PolicySampling,
    PolicyScoreGuidance,
    RandomActions,
    StateUpdateGuidance,
)
from sb3_polygrad.diffusion.policy_guided import PolicyGuidedSampler
from sb3_polygrad.diffusion.residual_mlp import ResidualMLP
from sb3_polygrad.diffusion.schedules import cosine_schedule
from sb3_polygrad.diffusion.staggered import StaggeredSampler
from sb3_polygrad.diffusion.transformer import Transformer
from sb3_polygrad.world_models.base import Metrics, PolicyFn
from sb3_polygrad.world_models.standardized import FitSettings, Imagined, StandardizedWorldModel

GUIDANCES: dict[str, type[PolicyScoreGuidance] | type[RandomActions]] = {
    "policy_score": PolicyScoreGuidance,
    "noisy_states": NoisyStatesGuidance,
    "state_update": StateUpdateGuidance,
    "policy_sampling": PolicySampling,
    "random_actions": RandomActions,
}
"""Rules by which actions follow the policy: the paper's, and its ablations (Appendix C.3)."""


def policy_guided(
    half_range: th.Tensor,
    n_diffusion_steps: Count = 32,
    noise_tau: Positive = 1.0,
    prediction: Prediction = "x0",
    guidance: Literal["policy_score", "noisy_states", "state_update", "policy_sampling", "random_actions"] = "policy_score",
    delta: Positive = 0.02,
    delta_lr: NotNegative = 0.1,
    clip_std: Positive | None = 3.0,
    final_clip: Positive | None = None,
) -> PolicyGuidedSampler:
    """
    The paper's sampler from plain settings.

    :param half_range: ``(action_dim,)`` half the width of the action box
    :param n_diffusion_steps: N (Table 4: 128)
    :param noise_tau: τ of the cosine schedule (Table 4: 1; 0.1 for Hopper)
    :param prediction: ``"x0"`` as the released runs, or ``"epsilon"`` as the paper writes it
    :param guidance: how actions follow the policy: the paper's rule or one of its ablations, see :data:`GUIDANCES`
    :param delta: start value of the action update scale δ, in squared half-ranges of the action box
    :param delta_lr: η of Eq. 10, on log δ
    :param clip_std: actions are clipped to this many policy standard deviations (3 in the paper); None for no clipping
    :param final_clip: bound on the change of the states over the last ten diffusion steps (0.25 in the release)
    """
    rule = GUIDANCES[guidance]
    follow = rule(DeltaController(delta, delta_lr), half_range, clip_std) if issubclass(rule, PolicyScoreGuidance) else rule()
    return PolicyGuidedSampler(
        GaussianDiffusion(cosine_schedule(n_diffusion_steps, noise_tau), prediction), follow, final_clip
    )


def make_sampler(settings: Mapping[str, Any], horizon: int, half_range: th.Tensor) -> Sampler:
    """
    :param settings: ``name``, ``"policy_guided"`` (the paper's) or ``"staggered"``, and the keyword arguments of
        :func:`policy_guided` or :class:`~sb3_polygrad.diffusion.staggered.StaggeredSampler`
    :param horizon: steps per trajectory
    :param half_range: ``(action_dim,)`` half the width of the action box
    :raises ValueError: for an unknown name or setting, naming the nearest known one
    """
    samplers: dict[str, tuple[Callable[..., Sampler], dict[str, Any]]] = {
        "policy_guided": (policy_guided, {"half_range": half_range}),
        "staggered": (StaggeredSampler, {"horizon": horizon}),
    }
    kwargs = dict(settings)
    name = choose("world_model_kwargs['sampler']['name']", kwargs.pop("name", "policy_guided"), samplers)
    make, given = samplers[name]
    check_settings("world_model_kwargs['sampler']", make, kwargs, not_settings=given)
    return make(**given, **kwargs)


class DiffusionWorldModel(StandardizedWorldModel):
    """
    Learns to denoise segments of real steps (Algorithm 1) and imagines by diffusion under a policy (Algorithm 2).

    What is diffused is the sequence of states of :class:`StandardizedWorldModel`. State 0 is inpainted: never noisy, in
    training and in sampling. The denoiser is conditioned on the actions, without noise.

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param denoiser: ``"residual_mlp"`` (Table 2), ``"transformer"`` (Table 3), or a network
    :param width: width of the network (Table 2: 1024, 2048 for horizons above 10; Table 3: 312)
    :param n_layers: number of its blocks (Tables 2 and 3: 6)
    :param sampler: the settings of :func:`make_sampler`, or a sampler; the paper's by default
    :param learning_rate: of AdamW (Table 2: 3e-4)
    :param weight_decay: of the matrices of the denoiser's layers but the last
    :param ema_decay: of the average of the weights that imagines
    """

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        denoiser: str | Denoiser = "residual_mlp",
        width: Count = 256,
        n_layers: Count = 4,
        sampler: Mapping[str, Any] | Sampler | None = None,
        learning_rate: LearningRate = 1e-3,
        weight_decay: NotNegative = 0.0,
        ema_decay: Decay = 0.99,
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon)
        if sampler is None or isinstance(sampler, Mapping):
            sampler = make_sampler(sampler or {}, horizon, (action_high - action_low) / 2)
        if isinstance(denoiser, str):
            channels, n_levels = obs_dim + 2, sampler.n_level_inputs
            networks: dict[str, Callable[[], Denoiser]] = {
                "residual_mlp": lambda: ResidualMLP(horizon, channels, self.action_dim, n_levels, width, n_layers),
                "transformer": lambda: Transformer(horizon, channels, self.action_dim, width, n_layers),
            }
            denoiser = networks[choose("world_model_kwargs['denoiser']", denoiser, networks)]()
        self.sampler = sampler
        self._will_learn(denoiser, FitSettings(learning_rate, ema_decay, weight_decay))

    def fit(self, segments: Trajectory) -> Metrics:
        """See :meth:`WorldModel.fit`; Algorithm 1, lines 3 to 6."""
        # After an ending the segment repeats the last action. Departs from the release, which shows the repetition to the
        # denoiser: it would tell where the episode ended, and imagined actions, which never repeat, that it did not.
        shuffled = segments.actions.flatten(0, 1)[th.randperm(segments.mask.numel(), device=segments.mask.device)]
        actions = th.where(segments.mask[..., None] > 0.0, segments.actions, shuffled.view_as(segments.actions))
        corrupted = self.sampler.corrupt(self._encode(segments), self._condition(actions))
        output = self.network(corrupted.noisy, corrupted.actions, corrupted.level)
        return self._learn(nn.functional.mse_loss(output[:, 1:], corrupted.target[:, 1:]))  # Alg. 1, l. 6

    def _imagine(self, start: th.Tensor, policy: PolicyFn) -> Imagined:
        """See :meth:`WorldModel.imagine`; Algorithm 2."""
        bound = self._bound()
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
        return Imagined(sample.states, sample.actions, bound.faulty)

    def adapt(self, imagined: Trajectory, policy: PolicyFn) -> Metrics:
        """See :meth:`WorldModel.adapt`; the δ controller."""
        return self.sampler.adapt(imagined, policy)
