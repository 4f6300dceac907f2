"""The contract of a denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch as th
from torch import nn


class Denoiser(nn.Module, ABC):
    """A network that sees a noisy trajectory and the actions in it, and predicts the clean trajectory (or the noise)."""

    @abstractmethod
    def forward(self, noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param noisy: ``(batch, n_steps + 1, channels)``, the first state clean
        :param actions: ``(batch, n_steps, action_dim)``, standardised
        :param level: ``(batch, n_levels)`` or ``(1, n_levels)``, noise levels in [0, 1]: one for all states, or one for each
            state but the first
        :return: ``(batch, n_steps + 1, channels)``; the first state's is not used
        """
