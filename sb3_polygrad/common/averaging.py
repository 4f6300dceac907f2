"""Moving averages of weights."""

from __future__ import annotations

import torch as th
from torch import nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """
    Moving average of a network's parameters; the first update copies them. Buffers are those of the network.

    Without a decay it is the average over about the latest tenth of all updates: at the n-th, 10 / n of the present parameters
    enter. That window grows with the number of updates, as the effect of a decaying learning rate would (polynomial-decay
    averaging, Shamir and Zhang, 2013). (Torch's own average asks the device for the number of updates; this one counts.)

    :param network: what is averaged
    :param decay: fraction that the average keeps at each update, or None
    """

    n_averaged: th.Tensor

    def __init__(self, network: nn.Module, decay: float | None = None) -> None:
        super().__init__(network)
        self.decay = decay
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
        if self.n_updates > 0:
            fraction = min(1.0, 10.0 / (self.n_updates + 1)) if self.decay is None else 1.0 - self.decay
            th._foreach_lerp_(averaged, current, fraction)
        else:
            th._foreach_copy_(averaged, current)
        for kept, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        self.n_averaged += 1.0
        self.n_updates += 1


def _recall_updates(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, MovingAverage)
    module.n_updates = int(module.n_averaged)
