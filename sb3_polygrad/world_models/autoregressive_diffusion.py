"""Diffusion of one step at a time: SynthER's model (Lu et al., 2023), conditioned on state and action."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import nn

from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.denoisers.residual_mlp import ResidualMLP
from sb3_polygrad.diffusion import karras
from sb3_polygrad.world_models.autoregressive import AutoregressiveWorldModel
from sb3_polygrad.world_models.base import Context
from sb3_polygrad.world_models.standardized import FitSettings, check_sizes


class AutoregressiveDiffusionWorldModel(AutoregressiveWorldModel):
    """
    Diffuses what one step causes, (change of the observation, reward, terminal), with a complete reverse process per step.

    The network is the residual MLP of a trajectory of one step: its first state is the present one, its second is noisy.

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param network: residual MLP of horizon 1, with ``obs_dim + 2`` channels
    :param levels: noise levels that sampling goes through
    :param heun: second-order sampling
    :param churn: noise added while sampling
    :param fit_settings: optimiser and average
    """

    ending_is_probability = False

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        network: ResidualMLP,
        levels: list[float],
        heun: bool,
        churn: float,
        fit_settings: FitSettings,
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon, fit_settings)
        self.network = network
        self.levels, self.heun, self.churn = levels, heun, churn
        self.window = 1  # single steps are all there is to learn from
        self._will_learn(network)

    def _given(self, network: nn.Module, states: th.Tensor, actions: th.Tensor) -> karras.Network:
        """The network as a function of the noisy part of its input alone."""
        present = nn.functional.pad(states, (0, 2))  # no reward nor terminal of its own

        def conditioned(noisy: th.Tensor, level: th.Tensor) -> th.Tensor:
            return network(th.stack([present, noisy], dim=1), actions[:, None], level)[:, 1]

        return conditioned

    def _fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        """See :meth:`WorldModel.fit`."""
        steps = self._steps(batch).flat()
        clean = th.cat([steps.targets, self._standardized_ending(steps.terminals)], dim=1)
        network = self._given(self.network, steps.states, steps.actions)
        loss = karras.loss(network, clean, karras.training_levels(len(clean), clean.device))
        return self._learn(self.network, loss)

    def _begin(self, state: th.Tensor, context: Context | None) -> None:
        return None

    def _step(self, memory: None, state: th.Tensor, action: th.Tensor) -> tuple[None, th.Tensor]:
        noise = th.randn(len(state), self.obs_dim + 2, device=state.device)
        token = karras.sample(self._given(self.average, state, action), noise, self.levels, self.heun, self.churn)
        return None, th.cat([self._moved(state, token[:, : self.obs_dim]), token[:, self.obs_dim :]], dim=1)


PAPER_SIZE: Mapping[str, Any] = {
    **{"width": 1024, "n_layers": 6, "learning_rate": 3e-4},
    **{"n_diffusion_steps": 128, "heun": True, "churn": 80.0, "sigma_max": 80.0},
}
"""SynthER's, to which Appendix C.2 refers."""


def build_autoregressive_diffusion(
    obs_dim: int,
    action_low: th.Tensor,
    action_high: th.Tensor,
    horizon: int,
    *,
    width: int = 256,
    n_layers: int = 3,
    n_diffusion_steps: int = 3,
    heun: bool = False,
    churn: float = 0.0,
    sigma_min: float = 0.002,
    sigma_max: float = 5.0,
    learning_rate: float = 1e-3,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.99,
    ema_every: int = 1,
) -> AutoregressiveDiffusionWorldModel:
    """
    An :class:`AutoregressiveDiffusionWorldModel` from plain settings.

    :param obs_dim: length of an observation
    :param action_low: lower bounds of the action box
    :param action_high: upper bounds of the action box
    :param horizon: steps per trajectory
    :param width: of the residual MLP
    :param n_layers: number of its blocks
    :param n_diffusion_steps: per environment step
    :param heun: correct every diffusion step but the last by a second call
    :param churn: S_churn of stochastic sampling; 0 for none
    :param sigma_min: smallest noise level
    :param sigma_max: largest noise level, that sampling starts from
    :param learning_rate: of Adam
    :param max_grad_norm: bound on the gradient
    :param ema_decay: of the average of the weights that imagines
    :param ema_every: gradient steps between updates of that average
    """
    check_sizes(width=width, n_layers=n_layers)
    network = ResidualMLP(1, obs_dim + 2, len(action_low), 1, width, n_layers)
    levels = karras.noise_levels(n_diffusion_steps, sigma_min, sigma_max)
    settings = FitSettings(learning_rate, max_grad_norm, ema_decay, ema_every)
    return AutoregressiveDiffusionWorldModel(obs_dim, action_low, action_high, horizon, network, levels, heun, churn, settings)
