"""Coverage and CRPS, in closed form; the linear-Gaussian system's moments against its own simulation."""

from __future__ import annotations

import math

import pytest
import torch as th

from sb3_polygrad.evaluation.linear_gaussian import LinearGaussianSystem
from sb3_polygrad.evaluation.spread import coverage, crps, optimal_crps

MEAN, STD = th.tensor([2.0, -1.0]), th.tensor([0.5, 3.0])


def test_the_truth_covers_itself_and_has_the_best_score() -> None:
    samples = MEAN + STD * th.randn(20_000, 2)
    assert th.allclose(coverage(samples, MEAN, STD), th.tensor(0.9), atol=0.01)
    assert th.allclose(crps(samples, MEAN, STD), optimal_crps(STD), rtol=0.02)


def test_half_the_spread_covers_less() -> None:
    samples = MEAN + STD / 2 * th.randn(20_000, 2)
    expected = 2 * th.special.ndtr(th.tensor(1.6449 / 2)) - 1
    assert th.allclose(coverage(samples, MEAN, STD), expected, atol=0.01)


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_score_of_point_predictions_by_hand(shift: float) -> None:
    # All samples equal: E|x - Y|, which at the mean is std sqrt(2/π), sqrt(2) times the best score.
    samples = (MEAN + shift * STD).expand(10, 2)
    density = math.exp(-(shift**2) / 2) / math.sqrt(2 * math.pi)
    folded = shift * math.erf(shift / math.sqrt(2)) + 2 * density
    assert th.allclose(crps(samples, MEAN, STD), folded * STD, rtol=1e-4)


def test_moments_are_those_of_the_simulated_system() -> None:
    system, horizon, n = LinearGaussianSystem(), 4, 50_000
    start = th.tensor([[1.0, -0.5]])
    mean, covariance = system.moments(start, horizon, std=0.7)
    states = start.expand(n, 2)
    for t in range(horizon):
        states = system.step(states, system.policy(0.7)(states).sample())
        assert th.allclose(states.mean(dim=0), mean[0, t], atol=0.02)
        assert th.allclose(states.T.cov(), covariance[t], atol=0.02)


def test_dataset_is_made_of_steps_of_the_system() -> None:
    system = LinearGaussianSystem()
    data = system.collect(n_episodes=200, length=5, stds=(0.1, 1.0))
    inside = ~data.truncated[:-1]
    assert data.truncated.sum() == 200 and (data.observations[1:][inside] == data.next_observations[:-1][inside]).all()
    expected = th.as_tensor(data.observations) @ system.transition.T + th.as_tensor(data.actions) @ system.control.T
    residual = th.as_tensor(data.next_observations) - expected
    assert th.allclose(residual.std(dim=0), system.noise_std, rtol=0.1)
    assert data.to_buffer(horizon=5).n_windows == 200, "windows end where episodes do"


def test_buffer_of_a_large_dataset_has_whole_windows_only() -> None:
    system = LinearGaussianSystem()
    data = system.collect(n_episodes=100, length=33, stds=(0.1,))
    buffer = data.to_buffer(horizon=5)
    # Three parts of 1,100 steps: two of the 100 episodes lie across a seam, and each of these loses up to four windows.
    assert len(buffer) == 3_300 and 100 * 29 - 2 * 4 <= buffer.n_windows <= 100 * 29
    windows = buffer.sample(2_000)
    following = {tuple(a): tuple(b) for a, b in zip(data.observations.tolist(), data.next_observations.tolist(), strict=True)}
    for path in windows.observations.tolist():
        assert all(following[tuple(path[t])] == tuple(path[t + 1]) for t in range(5))
