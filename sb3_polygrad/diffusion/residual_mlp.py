"""The residual MLP over whole trajectories (Table 2)."""

from __future__ import annotations

import torch as th
from torch import nn

from sb3_polygrad.diffusion.denoiser import Denoiser
from sb3_polygrad.diffusion.embeddings import FourierEmbedding


def residual_block(width: int) -> nn.Module:
    """What is added to x in a block: ``Linear(ReLU(LayerNorm(x)))``."""
    return nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))


class ResidualMLP(Denoiser):
    """
    Denoises a trajectory as one flat vector: the noisy states and the actions are projected once, the embedding of the
    diffusion step is added, then come ``n_layers`` blocks ``x + Linear(ReLU(LayerNorm(x)))``.

    As in the authors' release the embedding is added once; the paper writes it into every layer.

    :param horizon: number of actions; there is one state more
    :param channels: channels per state (observation, reward, terminal)
    :param action_dim: length of an action
    :param n_levels: noise levels per trajectory, 1 or one per step
    :param width: width of the blocks
    :param n_layers: number of blocks
    """

    def __init__(
        self, horizon: int, channels: int, action_dim: int, n_levels: int = 1, width: int = 1024, n_layers: int = 6
    ) -> None:
        super().__init__()
        n_states = (horizon + 1) * channels
        self.project = nn.Linear(n_states + horizon * action_dim, width)
        self.embed = FourierEmbedding(width, n_levels)
        self.blocks = nn.ModuleList(residual_block(width) for _ in range(n_layers))
        self.head = nn.Linear(width, n_states)

    def forward(self, noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        """See :class:`Denoiser`; ``horizon`` steps."""
        x = self.project(th.cat([noisy.flatten(1), actions.flatten(1)], dim=1)) + self.embed(level)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).view_as(noisy)
