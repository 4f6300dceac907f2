"""Whether samples are spread as the truth is, where the truth is a known Gaussian."""

from __future__ import annotations

import math

import torch as th


def coverage(samples: th.Tensor, mean: th.Tensor, std: th.Tensor, level: float = 0.9) -> th.Tensor:
    """
    True probability of the central interval of the samples: ``level`` if they are spread as the truth.

    :param samples: ``(n, ...)``
    :param mean: ``(...)`` of the true Gaussian
    :param std: ``(...)``
    :param level: share of the samples in the interval
    :return: ``(...)``
    """
    low, high = th.quantile(samples, th.tensor([0.5 - level / 2, 0.5 + level / 2]), dim=0)
    return th.special.ndtr((high - mean) / std) - th.special.ndtr((low - mean) / std)


def crps(samples: th.Tensor, mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Continuous ranked probability score of the samples' distribution, in expectation over the truth: smallest for the truth.

    ``E|X - Y| - E|X - X'| / 2`` with X, X' from the samples and Y from the truth; the first in closed form for every sample,
    the second over all pairs of different samples.

    :param samples: ``(n, ...)``
    :param mean: ``(...)`` of the true Gaussian
    :param std: ``(...)``
    :return: ``(...)``
    """
    n = len(samples)
    away = (samples - mean) / std
    density = th.exp(-away.square() / 2) / math.sqrt(2 * math.pi)
    to_truth = std * (away * (2 * th.special.ndtr(away) - 1) + 2 * density)
    ranks = 2 * th.arange(1, n + 1, dtype=samples.dtype) - n - 1
    ordered = samples.sort(dim=0).values
    between = 2 * (ranks.view(-1, *[1] * (samples.dim() - 1)) * ordered).sum(dim=0) / (n * (n - 1))
    return to_truth.mean(dim=0) - between / 2


def optimal_crps(std: th.Tensor) -> th.Tensor:
    """The score of the truth itself."""
    return std / math.sqrt(math.pi)
