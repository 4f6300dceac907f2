"""Exponential moving averages of weights."""

from __future__ import annotations

import torch as th
from torch import nn
from torch.optim.swa_utils import AveragedModel


class ExponentialAverage(AveragedModel):
    """
    Exponential moving average of a network's parameters; the first update copies them. Buffers are those of the network.

    Torch's own average asks the device at every update whether it is the first; this one remembers.

    :param network: what is averaged
    :param decay: share that the average keeps at each update
    """

    n_averaged: th.Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay
        self.started = False
        # A float counter: everything in a state dict of this package is floating point.
        self.n_averaged = self.n_averaged.float()
        self.requires_grad_(False)
        self.register_load_state_dict_post_hook(_remember_whether_started)

    @th.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """
        Move towards the present parameters of a network.

        :param model: the network, or one of the same shape
        """
        averaged: list[th.Tensor] = list(self.module.parameters())
        current: list[th.Tensor] = list(model.parameters())
        if self.started:
            th._foreach_lerp_(averaged, current, 1.0 - self.decay)
        else:
            th._foreach_copy_(averaged, current)
        for kept, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        self.n_averaged += 1.0
        self.started = True


def _remember_whether_started(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, ExponentialAverage)
    module.started = bool(module.n_averaged > 0.0)
