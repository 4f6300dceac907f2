"""Statistics of standardised actions, on samples whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch as th

from sb3_polygrad.common.action_diagnostics import action_autocorrelation, action_std, ks_distance, predictable_share

BATCH, HORIZON = 4_000, 5
MASK = th.ones(BATCH, HORIZON)


def test_ks_distance_by_hand() -> None:
    # One sample at the median: the step from 0 to 1 is half away from the curve. Two samples: at ±0.6745, quarter points.
    assert ks_distance(th.zeros(1)) == pytest.approx(0.5)
    assert ks_distance(th.tensor([0.67449, -0.67449])) == pytest.approx(0.25, abs=1e-4)
    assert ks_distance(th.full((10,), 8.0)) == pytest.approx(1.0)


def test_ks_distance_of_a_wider_gaussian_is_the_gap_of_the_curves() -> None:
    # Φ(x) - Φ(x / 2) is largest where the densities are equal: x² = 8/3 ln 2.
    x = math.sqrt(8 / 3 * math.log(2))
    expected = float(th.special.ndtr(th.tensor(x)) - th.special.ndtr(th.tensor(x / 2)))
    assert ks_distance(2 * th.randn(200_000)) == pytest.approx(expected, abs=0.005)


def test_autocorrelation_of_an_autoregressive_process() -> None:
    steps = [th.randn(BATCH, 1)]
    for _ in range(HORIZON - 1):
        steps.append(0.6 * steps[-1] + 0.8 * th.randn(BATCH, 1))
    assert action_autocorrelation(th.stack(steps, dim=1), MASK) == pytest.approx(0.6, abs=0.02)
    assert action_autocorrelation(th.randn(BATCH, HORIZON, 2), MASK) == pytest.approx(0.0, abs=0.03)


def test_predictable_share_is_the_explained_variance() -> None:
    # Variance 0.8 from the observation, 0.2 of its own; a constant feature must not disturb.
    observations = th.cat([th.randn(BATCH, HORIZON, 1), th.full((BATCH, HORIZON, 1), 7.0)], dim=-1)
    actions = math.sqrt(0.8) * observations[..., :1] + math.sqrt(0.2) * th.randn(BATCH, HORIZON, 1)
    assert predictable_share(actions, 3.0 * observations + 1.0, MASK) == pytest.approx(0.8, abs=0.02)


def test_steps_that_did_not_happen_do_not_count() -> None:
    mask = (th.arange(HORIZON) < 3).float().expand(BATCH, -1)
    actions = th.randn(BATCH, HORIZON, 1)
    actions[:, 3:] = 1e3
    assert action_std(actions, mask) == pytest.approx(1.0, abs=0.03)
    assert ks_distance(actions, mask[..., None] > 0.0) < 0.015


def test_nothing_can_be_said_of_too_few_steps() -> None:
    one = th.zeros(1, 2, 1)
    assert math.isnan(predictable_share(one, one, th.ones(1, 2)))
