"""Measures of imagined trajectories, where the answer is known in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from torch.distributions import Normal

from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.study.measures import Rows, action_rows, ending_rows, error_rows, spread_rows
from sb3_polygrad.study.simulator import Simulator, Starts
from tests.linear_gaussian import LinearGaussianSystem

ALIVE = [[0.0, 0.0]] * 3


def trajectory(states: Any, terminals: Any, rewards: float = 0.0) -> Trajectory:
    ends = th.as_tensor(terminals)
    observations = th.as_tensor(states)[..., None]
    return Trajectory(observations, th.zeros(*ends.shape, 1), th.full(ends.shape, rewards), ends, mask_after_ending(ends))


def at(rows: Rows, step: int) -> dict[str, float]:
    return {measure: value for t, measure, value in rows if t == step}


def test_errors_by_hand() -> None:
    imagined = trajectory([[0.0, 1.0, 4.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0]], ALIVE, rewards=1.0)
    real = trajectory([[0.0, 1.0, 2.0], [0.0, 2.0, 2.0], [0.0, 1.0, 9.0]], [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    rows = error_rows(imagined, real, obs_std=th.tensor([2.0]), reward_std=0.5)
    # Differences 0, 1, 2, in units of 2; the third trajectory really ends with its first step, which still counts.
    assert (at(rows, 1)["n"], at(rows, 2)["n"]) == (3, 2)
    assert at(rows, 1)["mse_mean"] == pytest.approx(5 / 12) and at(rows, 1)["mse_median"] == 0.25
    assert at(rows, 1)["no_change_mean"] == pytest.approx((1 + 4 + 1) / 4 / 3)
    assert at(rows, 1)["reward_mse"] == pytest.approx(4.0)
    assert at(rows, 2)["mse_mean"] == pytest.approx(4 / 4 / 2)
    endings = ending_rows(imagined, real)
    assert at(endings, 2) == pytest.approx({"ended": 0.0, "ended_real": 1 / 3, "ending_error": 1 / 3})


def test_a_step_that_nobody_reaches_has_no_error() -> None:
    ended = trajectory([[0.0, 1.0, 1.0]], [[1.0, 1.0]])
    assert at(error_rows(ended, ended), 2) == {"n": 0.0}


def actions_of(standardized: th.Tensor) -> dict[str, float]:
    mask = th.ones(standardized.shape[:2])
    imagined = Trajectory(th.randn(*mask.shape, 3)[:, [*range(mask.shape[1]), 0]], standardized, mask, 0.0 * mask, mask)
    return at(action_rows(imagined, standardized), 0)


def test_draws_look_like_draws() -> None:
    measured = actions_of(th.randn(20_000, 5, 2))
    assert measured["action_std"] == pytest.approx(1.0, abs=0.01) and measured["action_mean"] == pytest.approx(0.0, abs=0.01)
    assert measured["ks"] < 0.005 and measured["kurtosis"] == pytest.approx(3.0, abs=0.05)
    assert measured["at_clip"] == pytest.approx(0.0009, abs=0.0003)
    assert abs(measured["autocorrelation"]) < 0.01 and abs(measured["predictable"]) < 0.01


def test_what_is_no_draw_shows() -> None:
    wide = actions_of(2.0 * th.randn(20_000, 5, 1) + 0.5)
    assert wide["action_std"] == pytest.approx(2.0, abs=0.02) and wide["action_mean"] == pytest.approx(0.5, abs=0.02)
    assert actions_of(3.0 * th.randn(500, 5, 1).sign())["at_clip"] == 1.0


def test_action_std_by_step() -> None:
    mask, scale = th.ones(4_000, 3), th.tensor([0.5, 1.0, 1.5])
    mask[1:, 2] = 0.0  # one trajectory is left: nothing can be said
    standardized = th.randn(4_000, 3, 2) * scale[:, None]
    rows = action_rows(Trajectory(th.randn(4_000, 4, 1), standardized, mask, 0.0 * mask, mask), standardized)
    assert [row[:2] for row in rows[-2:]] == [(1, "action_std"), (2, "action_std")]
    assert [row[2] for row in rows[-2:]] == pytest.approx([0.5, 1.0], rel=0.05)


# ---------------------------------------------------------------------- spread


def gaussian(mean: float, std: float, n: int) -> Trajectory:
    states = th.cat([th.zeros(n, 1), mean + std * th.randn(n, 1)], dim=1)
    return trajectory(states, th.zeros(n, 1))


def test_the_truth_has_the_right_spread_and_the_best_score() -> None:
    measured = at(spread_rows(gaussian(1.0, 3.0, 20_000), gaussian(1.0, 3.0, 20_000), n_starts=1), 1)
    assert measured["spread"] == pytest.approx(1.0, abs=0.02) and measured["bias"] < 0.03
    assert measured["crps_excess"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_score_of_a_point_prediction_by_hand(shift: float) -> None:
    # CRPS of a point is E|x - Y|; the truth's own is std / sqrt(π).
    folded = shift * math.erf(shift / math.sqrt(2)) + 2 * math.exp(-(shift**2) / 2) / math.sqrt(2 * math.pi)
    measured = at(spread_rows(gaussian(3.0 * shift, 0.0, 20_000), gaussian(0.0, 3.0, 20_000), n_starts=1), 1)
    assert measured["crps_excess"] == pytest.approx(folded - 1 / math.sqrt(math.pi), abs=0.02)
    assert measured["spread"] == pytest.approx(0.0) and measured["bias"] == pytest.approx(shift, abs=0.03)


def test_starts_are_kept_apart_and_what_follows_an_ending_does_not_count() -> None:
    # Two starts far apart; within each the spread is 1. After the ending the observation is held, whatever the model says.
    offset = th.tensor([0.0, 100.0]).repeat_interleave(5_000)[:, None]
    states = [th.cat([offset, offset + th.randn(10_000, 1), th.full((10_000, 1), wild)], dim=1) for wild in (1e6, 0.0)]
    rows = spread_rows(*(trajectory(values, th.ones(10_000, 2)) for values in states), n_starts=2)
    assert at(rows, 1)["spread"] == pytest.approx(1.0, abs=0.05) and at(rows, 2) == at(rows, 1)


def test_moments_are_those_of_the_environment() -> None:
    system, horizon, n = LinearGaussianSystem(), 3, 4_000
    start = th.tensor([[1.0, -0.5]])
    mean, covariance = system.moments(start, horizon, std=0.7)
    starts = Starts(start, np.array([[1.0]]), np.array([[-0.5]])).take(np.zeros(n, dtype=int))
    real = Simulator("LinearGaussian-v0").follow(starts, system.policy(0.7), horizon)
    for side in (real, system.imagine(start.expand(n, 2), horizon, std=0.7)):
        assert th.allclose(side.observations[:, 1:].mean(dim=0), mean[0], atol=0.05)
        assert th.allclose(side.observations[:, horizon].T.cov(), covariance[-1], atol=0.05)
    # A perfect world model has the right spread, one that ignores the noise of the environment has less.
    quiet = system.imagine(start.expand(n, 2), horizon, std=0.7)
    measured = at(spread_rows(quiet, real, n_starts=1), horizon)
    assert measured["spread"] == pytest.approx(1.0, abs=0.05) and measured["crps_excess"] < 0.005
    system.noise_std = th.zeros(2)
    _, less = system.moments(start, horizon, std=0.7)
    measured = at(spread_rows(system.imagine(start.expand(n, 2), horizon, std=0.7), real, n_starts=1), horizon)
    expected = (less[-1].diagonal() / covariance[-1].diagonal()).sqrt().mean()
    assert measured["spread"] == pytest.approx(float(expected), abs=0.03)


def test_the_policy_is_followed_and_clipped() -> None:
    simulator = Simulator("Hopper-v5")
    state = simulator.env.state_vector()[None]
    starts = Starts(th.zeros(1, 11), state[:, :6], state[:, 6:]).take(np.zeros(2, dtype=int))

    def policy(observations: th.Tensor) -> Normal:
        return Normal(th.full((len(observations), 3), 5.0), 1e-3)

    followed, replayed = simulator.follow(starts, policy, 2), simulator.replay(starts, th.ones(2, 2, 3))
    assert th.allclose(followed.observations[:, 1:], replayed.observations[:, 1:])
    assert (followed.actions > 4.0).all(), "as drawn, before clipping"
