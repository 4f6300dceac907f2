"""Diffusion of one step at a time: SynthER's model (Lu et al., 2023), conditioned on state and action."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import nn

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.common.validation import Count, Decay, LearningRate, NotNegative, Positive, check_settings
from sb3_polygrad.diffusion import karras
from sb3_polygrad.diffusion.residual_mlp import ResidualMLP
from sb3_polygrad.world_models.base import Metrics
from sb3_polygrad.world_models.one_step import OneStepWorldModel
from sb3_polygrad.world_models.standardized import FitSettings


class AutoregressiveDiffusionWorldModel(OneStepWorldModel):
    """
    Diffuses what one step causes, (change of the observation, reward, terminal), with a complete reverse process per step.
    One of the models that the paper compares with (Appendix C.2).

    The network is the residual MLP of a trajectory of one step: its first state is the present one, its second is noisy.

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param width: of the residual MLP
    :param n_layers: number of its blocks
    :param sampler: settings of the reverse process: ``n_diffusion_steps`` per environment step, ``heun`` (correct every
        diffusion step but the last by a second call), ``churn`` (S_churn of stochastic sampling, 0 for none), ``sigma_max``
        (noise level that sampling starts from)
    :param learning_rate: of AdamW
    :param ema_decay: of the average of the weights that imagines
    """

    differentiable = False  # what the last channel holds is a draw, not a probability

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        width: Count = 256,
        n_layers: Count = 3,
        sampler: Mapping[str, Any] | None = None,
        learning_rate: LearningRate = 1e-3,
        ema_decay: Decay = 0.99,
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon, window=1)
        self._set_sampler(sampler or {})
        network = ResidualMLP(1, obs_dim + 2, self.action_dim, 1, width, n_layers)
        self._will_learn(network, FitSettings(learning_rate, ema_decay))

    def _set_sampler(self, settings: Mapping[str, Any]) -> None:
        def sampler(
            n_diffusion_steps: Count = 3, heun: bool = False, churn: NotNegative = 0.0, sigma_max: Positive = 5.0
        ) -> tuple[list[float], bool, float]:
            return karras.noise_levels(n_diffusion_steps, sigma_max), heun, churn

        check_settings("world_model_kwargs['sampler']", sampler, settings)
        self.levels, self.heun, self.churn = sampler(**settings)

    def _given(self, network: nn.Module, states: th.Tensor, actions: th.Tensor) -> karras.Network:
        """The network as a function of the noisy part of its input alone."""
        present = nn.functional.pad(states, (0, 2))  # no reward nor terminal of its own

        def conditioned(noisy: th.Tensor, level: th.Tensor) -> th.Tensor:
            return network(th.stack([present, noisy], dim=1), actions[:, None], level)[:, 1]

        return conditioned

    def fit(self, segments: Trajectory) -> Metrics:
        """See :meth:`WorldModel.fit`."""
        steps = self._steps(segments).flat()
        clean = th.cat([steps.targets, self._standardized_ending(steps.terminals)], dim=1)
        network = self._given(self.network, steps.states, steps.actions)
        loss = karras.loss(network, clean, karras.training_levels(len(clean), clean.device))
        return self._learn(loss)

    def _begin(self, state: th.Tensor) -> None:
        return None

    def _step(self, memory: None, state: th.Tensor, action: th.Tensor) -> tuple[None, th.Tensor]:
        noise = th.randn(len(state), self.obs_dim + 2, device=state.device)
        token = karras.sample(self._given(self.average, state, action), noise, self.levels, self.heun, self.churn)
        return None, th.cat([self._moved(state, token[:, : self.obs_dim]), token[:, self.obs_dim :]], dim=1)
