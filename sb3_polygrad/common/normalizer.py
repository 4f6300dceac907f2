"""Running mean and standard deviation of vectors, on the device."""

from __future__ import annotations

import torch as th
from torch import nn


class RunningNormalizer(nn.Module):
    """
    Standardises vectors by the mean and standard deviation of all that was shown to it.

    The moments are merged batch by batch in float64 (Chan et al., 1979), so the result does not depend on how the data
    was cut into batches. A dimension that has not varied is only centred (its scale is 1).

    :param size: length of the vectors
    :param min_std: no scale is smaller than this (a dimension that hardly varies is not blown up)
    """

    count: th.Tensor
    mean: th.Tensor
    squared_deviation: th.Tensor
    low: th.Tensor
    high: th.Tensor
    _shift: th.Tensor
    _scale: th.Tensor

    def __init__(self, size: int, min_std: float = 1e-4) -> None:
        super().__init__()
        self.min_std = min_std
        self.register_buffer("count", th.zeros((), dtype=th.float64))
        self.register_buffer("mean", th.zeros(size, dtype=th.float64))
        self.register_buffer("squared_deviation", th.zeros(size, dtype=th.float64))
        self.register_buffer("low", th.full((size,), th.inf))
        self.register_buffer("high", th.full((size,), -th.inf))
        # What the hot paths use, derived from the moments: float32, refreshed by update() and after loading.
        self.register_buffer("_shift", th.zeros(size), persistent=False)
        self.register_buffer("_scale", th.ones(size), persistent=False)
        self.register_load_state_dict_post_hook(_refresh_after_loading)

    @property
    def std(self) -> th.Tensor:
        """Scale of each dimension, ``(size,)``, float32; 1 where the data has not varied."""
        return self._scale

    def update(self, data: th.Tensor) -> None:
        """
        Add data to the moments.

        :param data: ``(..., size)``
        """
        data = data.reshape(-1, self.mean.shape[0])
        if len(data) == 0:
            return
        # Everything is written in place: whoever holds one of these tensors sees what it is now.
        self.low.copy_(th.minimum(self.low, data.amin(dim=0)))
        self.high.copy_(th.maximum(self.high, data.amax(dim=0)))
        data = data.double()
        data_mean = data.mean(dim=0)
        difference = data_mean - self.mean
        total = self.count + len(data)
        self.squared_deviation += (data - data_mean).square().sum(dim=0)
        self.squared_deviation += difference.square() * self.count * len(data) / total
        self.mean += difference * len(data) / total
        self.count.copy_(total)
        self._refresh()

    def _refresh(self) -> None:
        std = (self.squared_deviation / self.count.clamp(min=1.0)).clamp(min=0.0).sqrt()
        self._scale.copy_(th.where(std > 1e-8, std.clamp(min=self.min_std), th.ones_like(std)))
        self._shift.copy_(self.mean)

    def normalize(self, data: th.Tensor) -> th.Tensor:
        """Environment units to standardised ones; ``data`` is ``(..., size)``."""
        return (data - self._shift) / self._scale

    def denormalize(self, data: th.Tensor) -> th.Tensor:
        """Standardised units to the environment's; ``data`` is ``(..., size)``."""
        return data * self._scale + self._shift

    def normalized_bounds(self, margin: float) -> tuple[th.Tensor, th.Tensor]:
        """
        The box that holds all data seen, widened on each side by ``margin`` times its width, in standardised units.

        :param margin: widening, as a share of the width of the box; at least one scale is added
        :return: lower and upper bound, each ``(size,)``
        """
        widening = margin * (self.high - self.low) + self._scale
        return self.normalize(self.low - widening), self.normalize(self.high + widening)


def _refresh_after_loading(module: nn.Module, _incompatible: object) -> None:
    assert isinstance(module, RunningNormalizer)
    module._refresh()
