"""Moving averages of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch as th
from torch import nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel, ABC):
    """
    Moving average of a network's parameters; the first update copies them. Buffers are those of the network.

    Torch's own average asks the device at every update how many there were; this one counts them itself, too.

    :param network: what is averaged
    """

    n_averaged: th.Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.n_updates = 0
        # A float counter: everything in a state dict of this package is floating point.
        self.n_averaged = self.n_averaged.float()
        self.requires_grad_(False)
        self.register_load_state_dict_post_hook(_recall_updates)

    @th.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """
        Move towards the present parameters of a network.

        :param model: the network, or one of the same shape
        """
        averaged: list[th.Tensor] = list(self.module.parameters())
        current: list[th.Tensor] = list(model.parameters())
        if self.started:
            th._foreach_lerp_(averaged, current, self._share())
        else:
            th._foreach_copy_(averaged, current)
        for kept, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        self.n_averaged += 1.0
        self.n_updates += 1

    @property
    def started(self) -> bool:
        """Whether there was an update."""
        return self.n_updates > 0

    @abstractmethod
    def _share(self) -> float:
        """Of the present parameters in the average, at an update that is not the first."""


class ExponentialAverage(MovingAverage):
    """
    Exponential moving average.

    :param network: what is averaged
    :param decay: share that the average keeps at each update
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay

    def _share(self) -> float:
        return 1.0 - self.decay


class WindowedAverage(MovingAverage):
    """
    Average of about the latest share of all updates: at the n-th, 1 / (window · n) of the present parameters enter.

    The window grows with what there is to look back on, as that of a decaying learning rate would (polynomial-decay
    averaging, Shamir and Zhang, 2013).

    :param network: what is averaged
    :param window: share of the updates, in (0, 1]; 1 is the mean of all
    """

    def __init__(self, network: nn.Module, window: float) -> None:
        super().__init__(network)
        self.window = window

    def _share(self) -> float:
        return min(1.0, 1.0 / (self.window * (self.n_updates + 1)))


def _recall_updates(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, MovingAverage)
    module.n_updates = int(module.n_averaged)
