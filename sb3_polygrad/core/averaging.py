"""Exponential moving averages of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ExponentialAverage:
    """
    Torch's exponential average, as an object that can be pickled (torch's own is a local function).

    Hand it to ``AveragedModel(multi_avg_fn=...)``.

    :param decay: share that the average keeps at each update
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def __call__(self, averaged: Sequence[th.Tensor], current: Sequence[th.Tensor], n_averaged: th.Tensor | int) -> None:
        get_ema_multi_avg_fn(self.decay)(averaged, current, n_averaged)  # type: ignore[arg-type]
