"""Clipping of gradients per trajectory."""

from __future__ import annotations

import torch as th

MAX_NORM = 3.0
"""Bound on the norm of a row's gradient, in medians of the batch."""


def clip_row_gradients(values: th.Tensor) -> th.Tensor:
    """
    The same values; backwards no row's gradient has a norm above :data:`MAX_NORM` times the median of the batch.

    Contacts make a large change of the state out of a small one. Backwards through many steps a few such trajectories outweigh
    all others by orders of magnitude, and clipping the norm of the whole gradient only makes the others smaller still.

    :param values: ``(batch, ...)``, one row per trajectory
    """
    if values.requires_grad:
        values.register_hook(_clipped)
    return values


def _clipped(gradient: th.Tensor) -> th.Tensor:
    norms = gradient.flatten(1).norm(dim=1)
    factors = (MAX_NORM * norms.median() / norms.clamp(min=1e-30)).clamp(max=1.0)
    return gradient * factors.view(-1, *[1] * (gradient.dim() - 1))
