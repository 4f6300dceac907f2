"""
How fast the machine multiplies matrices, and how many multiplications a function asks for.

As it was at commit 9bef0af, whose benchmark of speed used it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch as th
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode


def seconds(function: Callable[[], object], min_run_time: float = 1.0) -> float:
    """
    Median time of a call, once the device is done with it.

    :param function: what to call; the first calls are not counted
    :param min_run_time: seconds to go on measuring for, at least
    """
    function()
    timer = Timer("function()", globals={"function": function}, num_threads=th.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=min_run_time).median)


def flops(function: Callable[[], object]) -> int:
    """Floating point operations of the matrix products in one call, two for a multiplication and its addition."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def gemm_rate(rows: int, width: int, dtype: th.dtype, device: str, min_run_time: float = 0.5) -> float:
    """
    FLOP per second of a square linear layer, biases and all: what a network of such layers could reach at best.

    :param rows: inputs at once
    :param width: of the layer
    :param dtype: of inputs and weights
    :param device: where
    :param min_run_time: seconds to go on measuring for, at least
    """
    layer = nn.Linear(width, width, device=device, dtype=dtype)
    x = th.randn(rows, width, device=device, dtype=dtype)
    with th.inference_mode():
        return 2.0 * rows * width**2 / seconds(lambda: layer(x), min_run_time)
