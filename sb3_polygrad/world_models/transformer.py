"""A causal transformer that predicts the next step from the steps before it."""

from __future__ import annotations

import torch as th
from torch import nn

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.common.validation import Count, Decay, LearningRate
from sb3_polygrad.diffusion.transformer import Block
from sb3_polygrad.world_models.base import Metrics
from sb3_polygrad.world_models.one_step import OneStepWorldModel
from sb3_polygrad.world_models.standardized import FitSettings


class StepTransformer(nn.Module):
    """
    The blocks of the transformer denoiser over tokens that hold a state and the action taken in it.

    :param n_inputs: length of state and action together
    :param n_outputs: what is predicted for each token
    :param context: most tokens that are looked at
    :param width: length of a token
    :param n_layers: number of blocks
    """

    def __init__(self, n_inputs: int, n_outputs: int, context: int, width: int, n_layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(n_inputs, width)
        self.position = nn.Parameter(0.02 * th.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(n_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_outputs))

    def forward(self, steps: th.Tensor) -> th.Tensor:
        """
        :param steps: ``(batch, length, n_inputs)``, at most ``context`` of them
        :return: ``(batch, length, n_outputs)``, each from its own step and those before it
        """
        return self.head(self.blocks(self.embed(steps) + self.position[: steps.shape[1]]))


class TransformerWorldModel(OneStepWorldModel):
    """
    Predicts what a step changes, its reward and its ending from the steps before it; no noise, squared error (the paper's L2
    loss). One of the models that the paper compares with (Appendix C.2).

    :param obs_dim: length of an observation
    :param action_low: ``(action_dim,)`` lower bounds of the action box
    :param action_high: ``(action_dim,)`` upper bounds of the action box
    :param horizon: steps per trajectory
    :param width: length of a token, a multiple of the four attention heads (Table 3: 312)
    :param n_layers: number of blocks (Table 3: 6)
    :param context: steps that are looked at, the present one included; it is fitted on segments of that length
    :param learning_rate: of AdamW
    :param ema_decay: of the average of the weights that imagines
    """

    def __init__(
        self,
        obs_dim: int,
        action_low: th.Tensor,
        action_high: th.Tensor,
        horizon: int,
        width: Count = 64,
        n_layers: Count = 2,
        context: Count = 15,
        learning_rate: LearningRate = 1e-3,
        ema_decay: Decay = 0.99,
    ) -> None:
        super().__init__(obs_dim, action_low, action_high, horizon, window=context)
        network = StepTransformer(obs_dim + self.action_dim, obs_dim + 2, context, width, n_layers)
        self._will_learn(network, FitSettings(learning_rate, ema_decay))

    def fit(self, segments: Trajectory) -> Metrics:
        """See :meth:`WorldModel.fit`."""
        steps = self._steps(segments)
        output = self.network(steps.inputs())
        errors = (output[..., :-1] - steps.targets).square().mean(dim=-1)
        endings = nn.functional.binary_cross_entropy_with_logits(output[..., -1], steps.terminals, reduction="none")
        return self._learn(((errors + endings) * segments.mask).sum() / segments.mask.sum())

    def _begin(self, state: th.Tensor) -> th.Tensor:
        return state.new_zeros(len(state), 0, self.obs_dim + self.action_dim)

    def _step(self, memory: th.Tensor, state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        memory = th.cat([memory, th.cat([state, action], dim=1)[:, None]], dim=1)[:, -self.window :]
        output = self.average(memory)[:, -1]
        return memory, self._after(state, output[:, :-1], output[:, -1].sigmoid())
