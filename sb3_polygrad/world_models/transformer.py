"""A causal transformer that predicts the next step from the steps before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import nn

from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.denoisers.transformer import Block
from sb3_polygrad.world_models.autoregressive import AutoregressiveWorldModel
from sb3_polygrad.world_models.base import Context
from sb3_polygrad.world_models.standardized import FitSettings, check_sizes


class StepTransformer(nn.Module):
    """
    The blocks of the transformer denoiser over tokens that hold a state and the action taken in it.

    :param n_inputs: length of state and action together
    :param n_outputs: what is predicted for each token
    :param context: most tokens that are looked at
    :param width: length of a token
    :param n_layers: number of blocks
    :param n_heads: attention heads
    """

    def __init__(self, n_inputs: int, n_outputs: int, context: int, width: int, n_layers: int, n_heads: int) -> None:
        super().__init__()
        if n_heads < 1 or width % n_heads != 0:
            raise ValueError(f"world_model_kwargs: width={width} must be a multiple of n_heads={n_heads}, equal parts of it")
        self.embed = nn.Linear(n_inputs, width)
        self.position = nn.Parameter(0.02 * th.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(n_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_outputs))

    def forward(self, steps: th.Tensor) -> th.Tensor:
        """
        :param steps: ``(batch, length, n_inputs)``, at most ``context`` of them
        :return: ``(batch, length, n_outputs)``, each from its own step and those before it
        """
        return self.head(self.blocks(self.embed(steps) + self.position[: steps.shape[1]]))


class TransformerWorldModel(AutoregressiveWorldModel):
    """
    Predicts what a step changes, its reward and its ending; no noise, squared error (the paper's L2 loss).

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param network: of ``obs_dim + 2`` outputs: change, reward, logit of the ending
    :param context: steps that it looks at, and is fitted on
    :param fit_windows: windows per gradient step
    :param fit_settings: optimiser and average
    """

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        network: StepTransformer,
        context: int,
        fit_windows: int,
        fit_settings: FitSettings,
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon, fit_settings)
        self.network = network
        self.context = self.window = context
        self.fit_windows = fit_windows
        self._will_learn(network)

    def _fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        """See :meth:`WorldModel.fit`."""
        batch = Trajectory(*(tensor[: self.fit_windows] for tensor in batch))
        steps = self._steps(batch)
        output = self.network(steps.inputs())
        errors = (output[..., :-1] - steps.targets).square().mean(dim=-1)
        endings = nn.functional.binary_cross_entropy_with_logits(output[..., -1], steps.terminals, reduction="none")
        loss = ((errors + endings) * batch.mask).sum() / batch.mask.sum()
        return self._learn(self.network, loss)

    def _begin(self, state: th.Tensor, context: Context | None) -> th.Tensor:
        if context is None:
            return state.new_zeros(len(state), 0, self.obs_dim + self.action_dim)
        return th.cat([self.state_normalizer.normalize(context.observations), self._condition(context.actions)], dim=2)

    def _step(self, memory: th.Tensor, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        memory = th.cat([memory, th.cat([state, action], dim=1)[:, None]], dim=1)[:, -self.context :]
        output = self.average(memory)[:, -1]
        return memory, self._after(state, output[:, :-1], output[:, -1].sigmoid())


PAPER_SIZE: Mapping[str, Any] = {
    "width": 312,
    "n_layers": 6,
    "n_heads": 4,
    "context": 15,
    "fit_windows": 256,
    "learning_rate": 1e-4,
}
"""Table 3 and Appendix C.2."""


def build_transformer(
    obs_dim: int,
    action_low: th.Tensor,
    action_high: th.Tensor,
    horizon: int,
    *,
    width: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    context: int = 15,
    fit_windows: int = 64,
    learning_rate: float = 1e-3,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.99,
    ema_every: int = 1,
) -> TransformerWorldModel:
    """
    A :class:`TransformerWorldModel` from plain settings.

    :param obs_dim: length of an observation
    :param action_low: lower bounds of the action box
    :param action_high: upper bounds of the action box
    :param horizon: steps per trajectory
    :param width: length of a token
    :param n_layers: number of blocks
    :param n_heads: attention heads
    :param context: steps that are looked at, the present one included
    :param fit_windows: windows per gradient step
    :param learning_rate: of Adam
    :param max_grad_norm: bound on the gradient
    :param ema_decay: of the average of the weights that imagines
    :param ema_every: gradient steps between updates of that average
    """
    check_sizes(width=width, n_layers=n_layers, context=context, fit_windows=fit_windows)
    network = StepTransformer(obs_dim + len(action_low), obs_dim + 2, context, width, n_layers, n_heads)
    settings = FitSettings(learning_rate, max_grad_norm, ema_decay, ema_every)
    return TransformerWorldModel(obs_dim, action_low, action_high, horizon, network, context, fit_windows, settings)
