"""Gradients through imagined trajectories, kept from exploding."""

from __future__ import annotations

import torch as th

MAX_LENGTH = 3.0
"""No trajectory's gradient is longer than this many times the median of the batch."""


def limited(values: th.Tensor) -> th.Tensor:
    """
    The same values, but on the way back no row's gradient is longer than :data:`MAX_LENGTH` times the batch's median.

    Where a foot meets the ground a small change of the state becomes a large one. Backwards through many steps a few such
    trajectories outweigh all others by orders of magnitude, and bounding the norm of the whole gradient only makes the others
    smaller yet. Where there is nothing of the kind, half of the rows or more are left as they are.

    :param values: ``(batch, ...)``, one row per trajectory
    """
    if values.requires_grad:
        values.register_hook(_shortened)
    return values


def _shortened(gradient: th.Tensor) -> th.Tensor:
    lengths = gradient.flatten(1).norm(dim=1)
    factors = (MAX_LENGTH * lengths.median() / lengths.clamp(min=1e-30)).clamp(max=1.0)
    return gradient * factors.view(-1, *[1] * (gradient.dim() - 1))
