"""Precision of matrix products on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th


@contextmanager
def tensor_cores() -> Iterator[None]:
    """
    Within, and as a decorator: float32 matrix products on a GPU round their inputs to TF32 (10 bits of mantissa), which the
    fast units want; sums stay float32.

    Torch has one switch for the whole process. It is put back at the end, and left alone if someone else has set it, either
    way: ``torch.backends.cuda.matmul.fp32_precision = "ieee"`` keeps everything in float32. Needs torch 2.9.
    """
    matmul = th.backends.cuda.matmul
    if getattr(matmul, "fp32_precision", None) != "none":
        yield
        return
    matmul.allow_tf32 = True  # by the older name, since torch refuses to tell it if only the newer one is set
    try:
        yield
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = "none"
