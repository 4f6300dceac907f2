"""A residual MLP over single steps, the same for every step of a trajectory."""

from __future__ import annotations

import math
from typing import ClassVar

import torch as th
from torch import nn

from sb3_polygrad.denoisers.base import Denoiser
from sb3_polygrad.denoisers.residual_mlp import residual_block


class MarkovMLP(Denoiser):
    """
    Denoises state t + 1 given the state before it and the action between; departs from the paper.

    The paper's network sees the whole trajectory at once and learns the dynamics anew for each of its steps. Shared weights
    make every real step count ``horizon`` times, and what an action causes cannot leak into the state that it was taken in.
    Made for the staggered sampler with L ≥ K, where the state before is clean by the time it is needed.

    States come, noise is added and errors are counted in units of the change that is usual in one step, and what the network
    sees and says of a state is relative to the one before: a joint that hardly moves from step to step is learnt as well as
    a velocity that does, and noise is no larger than what it is to become.

    :param obs_dim: length of an observation; the channels of a state are the observation, reward and terminal
    :param action_dim: length of an action
    :param width: width of the blocks
    :param n_layers: number of blocks
    :param smallest_change: changes are not taken for smaller than this, in standardised units
    """

    markov: ClassVar[bool] = True

    def __init__(
        self, obs_dim: int, action_dim: int, width: int = 256, n_layers: int = 4, smallest_change: float = 0.05
    ) -> None:
        super().__init__()
        self.obs_dim, self.smallest_change = obs_dim, smallest_change
        channels = obs_dim + 2
        n_levels = 4  # signal and noise, of the state and of the one before
        self.project = nn.Linear(obs_dim + channels + action_dim + n_levels, width)
        self.blocks = nn.ModuleList(residual_block(width) for _ in range(n_layers))
        self.head = nn.Linear(width, channels)
        self.units = th.ones(channels)

    def observe_changes(self, size: th.Tensor) -> None:
        """See :class:`Denoiser`."""
        self.units[: self.obs_dim] = size.clamp(min=self.smallest_change)

    def forward(self, noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        """See :class:`Denoiser`; any number of steps."""
        angle = nn.functional.pad(level.expand(-1, actions.shape[1]), (1, 0)) * (math.pi / 2)
        weights = th.stack([angle.cos(), angle.sin()], dim=-1).expand(len(noisy), -1, 2)  # signal, noise
        signal_before, signal = weights[:, :-1, :1], weights[:, 1:, :1]
        # Of the state before only the observation counts: the reward and the terminal are those of the step that led there.
        before = noisy[:, :-1, : self.obs_dim]
        reference = nn.functional.pad(signal_before * before, (0, 2))
        change = signal * (noisy[:, 1:] - signal * reference)  # pure noise says nothing and is not shown
        before = before * self.units[: self.obs_dim]  # standardised
        x = self.project(th.cat([before, change, actions, weights[:, :-1], weights[:, 1:]], dim=-1))
        for block in self.blocks:
            x = x + block(x)
        return th.cat([noisy[:, :1], reference + self.head(x)], dim=1)
