"""Networks whose large matrix products are in bfloat16."""

from __future__ import annotations

import copy

import torch as th
from torch import nn

SMALLEST = 256
"""Layers with fewer inputs or outputs stay in float32: too little to gain, and they are where values come in and go out."""


class _Linear(nn.Module):
    """A linear layer whose weights and product are in bfloat16, while what comes in and goes out is in float32."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer).bfloat16()

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.layer(x.bfloat16()).float()


class BFloat16Copy:
    """
    A copy of a network for evaluating it faster: its large linear layers multiply in bfloat16, everything between them
    (residual sums, norms) stays in float32.

    The copy is made anew where the network has moved to another device; otherwise :meth:`refresh` brings in what the
    network has learnt. It is not a module: it belongs to no state dict.

    :param network: the network; itself never changed
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._copy: nn.Module | None = None
        self._pairs: list[tuple[th.Tensor, th.Tensor]] = []

    def __call__(self, *inputs: th.Tensor) -> th.Tensor:
        """Evaluate the copy as it was refreshed last."""
        if self._copy is None:
            self.refresh()
        assert self._copy is not None
        return self._copy(*inputs)

    @th.no_grad()
    def refresh(self) -> None:
        """Take over the network's weights and buffers."""
        device = next(self.network.parameters()).device
        if self._copy is None or next(self._copy.parameters()).device != device:
            self._make()
        for own, theirs in self._pairs:
            own.copy_(theirs)

    def tensors(self) -> list[th.Tensor]:
        """The copy's own weights and buffers, none before it is made."""
        return [own for own, _ in self._pairs]

    def _make(self) -> None:
        self._copy, self._pairs = copy.deepcopy(self.network), []
        for name, layer in self.network.named_modules():
            own = self._copy.get_submodule(name)
            if isinstance(layer, nn.Linear) and min(layer.in_features, layer.out_features) >= SMALLEST:
                parent, _, attribute = name.rpartition(".")
                fast = _Linear(layer)
                setattr(self._copy.get_submodule(parent), attribute, fast)
                own = fast.layer
            self._pairs += zip(_own_tensors(own), _own_tensors(layer), strict=True)


def _own_tensors(module: nn.Module) -> list[th.Tensor]:
    """Parameters and buffers of the module itself, not of those in it."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
