"""Embeddings of the diffusion step."""

from __future__ import annotations

import math

import torch as th
from torch import nn


class FourierEmbedding(nn.Module):
    """
    Random Fourier features of noise levels in [0, 1], followed by a two-layer MLP.

    :param size: length of the embedding
    :param n_levels: number of levels that are embedded together
    :param n_frequencies: number of random frequencies; each gives a sine and a cosine
    :param hidden: width of the hidden layer
    :param scale: standard deviation of the frequencies, in periods over [0, 1]
    """

    frequencies: th.Tensor

    def __init__(self, size: int, n_levels: int = 1, n_frequencies: int = 16, hidden: int = 64, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", th.randn(n_frequencies) * scale)
        self.net = nn.Sequential(nn.Linear(2 * n_frequencies * n_levels, hidden), nn.SiLU(), nn.Linear(hidden, size))

    def forward(self, levels: th.Tensor) -> th.Tensor:
        """Levels ``(batch, n_levels)`` to embeddings ``(batch, size)``."""
        angles = 2 * math.pi * levels[..., None] * self.frequencies
        return self.net(th.cat([angles.sin(), angles.cos()], dim=-1).flatten(1))
