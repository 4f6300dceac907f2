"""Statistics of a few seeds, by rliable (Agarwal et al., https://arxiv.org/abs/2108.13264): the one place that knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rliable import library
from scipy.stats import trim_mean

REPETITIONS = 2_000
"""Bootstrap samples per interval."""

CONFIDENCE = 0.95


def interquartile_mean(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Mean of the middle half of the seeds (of all of them, if they are fewer than four), with its interval.

    :param scores: ``(seeds, points)``; every point is taken by itself
    :return: the means ``(points,)`` and their bootstrap intervals ``(2, points)``; NaN if there is one seed only
    """

    def means(tasks: np.ndarray) -> np.ndarray:  # (seeds, 1, points)
        return trim_mean(tasks[:, 0], 0.25, axis=0)  # rliable's aggregate_iqm, for all points at once

    return means(scores[:, None]), _interval(means, scores[:, None])


def probability_of_improvement(ours: np.ndarray, others: np.ndarray) -> tuple[float, np.ndarray]:
    """
    How likely a seed of ours is better than one of the others, mean over environments; ties count one half.

    :param ours: ``(seeds, environments)``
    :param others: ``(seeds, environments)``, as many seeds or not
    :return: the probability and its bootstrap interval ``(2,)``; NaN if either has one seed only
    """

    def probability(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # rliable's probability_of_improvement, without a test of significance at every draw
        differences = np.sign(x[:, None] - y[None])  # (seeds, seeds, environments)
        return np.array([(differences.mean() + 1) / 2])

    return float(probability(ours, others)[0]), _interval(probability, ours, others)[:, 0]


def _interval(statistic: Callable[..., np.ndarray], *scores: np.ndarray) -> np.ndarray:
    """Interval of a statistic of scores ``(seeds, tasks, ...)``, ``(2, points)``; each score is drawn by itself."""
    if any(len(score) == 1 for score in scores):
        return np.full((2, len(statistic(*scores))), np.nan)
    with _same_draws():
        _, intervals = library.get_interval_estimates(
            {"": scores[0] if len(scores) == 1 else list(scores)},
            statistic,
            reps=REPETITIONS,
            confidence_interval_size=CONFIDENCE,
        )
    return intervals[""]


@contextmanager
def _same_draws() -> Iterator[None]:
    """rliable draws from numpy's global generator whatever random_state it is given: seed that, and put it back."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)
