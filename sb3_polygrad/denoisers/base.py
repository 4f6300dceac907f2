"""The contract of a denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch as th
from torch import nn


class Denoiser(nn.Module, ABC):
    """
    A network that sees a noisy trajectory and the actions in it, and says what the trajectory was (or the noise).

    ``markov`` says that its output for a state depends on nothing but this state, the one before and the action between
    them, with the same weights at every step. It can then be fitted on single steps, and asked about any part of a trajectory.

    ``units`` are what it measures the channels of a state in, relative to standardised ones; noise and errors are in them, too
    (a scalar or ``(channels,)``).
    """

    markov: ClassVar[bool] = False
    units: th.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("units", th.ones(()))

    @abstractmethod
    def forward(self, noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param noisy: ``(batch, n_steps + 1, channels)``, the first state clean; in ``units``, as the output
        :param actions: ``(batch, n_steps, action_dim)``, standardised
        :param level: ``(batch, n_levels)`` or ``(1, n_levels)``, noise levels in [0, 1]: one for all states, or one for each
            state but the first
        :return: ``(batch, n_steps + 1, channels)``; the first state's is not used
        """

    def observe_changes(self, size: th.Tensor) -> None:
        """
        Take note of how much real states change in one step. By default not.

        :param size: ``(obs_dim,)`` standard deviation of the change, in standardised units
        """
