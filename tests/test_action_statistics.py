"""Statistics of standardised actions, on samples whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch as th

from sb3_polygrad.evaluation.action_statistics import action_statistics, ks_distance, per_step_std, predictable_share

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


def test_draws_look_like_draws() -> None:
    statistics = action_statistics(th.randn(BATCH, HORIZON, 2), th.randn(BATCH, HORIZON, 3), MASK)
    assert statistics["action_std"] == pytest.approx(1.0, abs=0.02)
    assert statistics["ks"] < 0.01
    assert abs(statistics["autocorrelation"]) < 0.03
    assert abs(statistics["predictable"]) < 0.01


def test_predictable_share_is_the_explained_variance() -> None:
    # Variance 0.8 from the observation, 0.2 of its own; a constant feature must not disturb.
    observations = th.cat([th.randn(BATCH, HORIZON, 1), th.full((BATCH, HORIZON, 1), 7.0)], dim=-1)
    actions = math.sqrt(0.8) * observations[..., :1] + math.sqrt(0.2) * th.randn(BATCH, HORIZON, 1)
    assert predictable_share(actions, 3.0 * observations + 1.0, MASK) == pytest.approx(0.8, abs=0.02)


def test_steps_that_did_not_happen_do_not_count() -> None:
    mask = (th.arange(HORIZON) < 3).float().expand(BATCH, -1)
    actions, observations = th.randn(BATCH, HORIZON, 1), th.randn(BATCH, HORIZON, 2)
    actions[:, 3:] = 1e3
    statistics = action_statistics(actions, observations, mask)
    assert statistics["action_std"] == pytest.approx(1.0, abs=0.03) and statistics["ks"] < 0.015


def test_per_step_std() -> None:
    scale = th.tensor([0.5, 1.0, 1.5, 2.0, 2.5])
    assert th.allclose(per_step_std(th.randn(BATCH, HORIZON, 3) * scale[:, None], MASK), scale, rtol=0.05)
