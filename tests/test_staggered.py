"""The staggered sampler on known linear-Gaussian systems with a linear-Gaussian policy."""

from __future__ import annotations

import math

import pytest
import torch as th

from sb3_polygrad.diffusion.base import Task
from sb3_polygrad.diffusion.staggered import StaggeredSampler, staggered_levels
from sb3_polygrad.world_models.diffusion import make_sampler
from tests.toys import LinearPolicy

A = th.tensor([[0.9, 0.3], [-0.2, 0.8]])
B = th.tensor([[0.0], [0.5]])
POLICY = LinearPolicy(gain=th.tensor([[-0.4, -0.6]]), std=th.tensor([0.7]))
FIRST = th.tensor([1.0, -0.5])
NOISE_VARIANCE = th.tensor([0.05, 0.2])


def rollout(noisy: th.Tensor, actions: th.Tensor, levels: th.Tensor) -> th.Tensor:
    """The exact denoiser of s' = A s + B a: all states follow from the first one and the actions, whatever the noise."""
    states = [noisy[:, 0]]
    for t in range(actions.shape[1]):
        states.append(states[-1] @ A.T + actions[:, t] @ B.T)
    return th.stack(states, dim=1)


def conditional_mean(noisy: th.Tensor, actions: th.Tensor, levels: th.Tensor) -> th.Tensor:
    """
    The exact denoiser of s' = A s + B a + N(0, Q), Q diagonal, of every state given its clean predecessor: with
    x = cos s' + sin ε, E[s'|x] = m + cos Q / (cos² Q + sin²) (x - cos m), m = A s + B a.
    """
    mean = noisy[:, :-1] @ A.T + actions @ B.T
    angle = levels[..., None] * math.pi / 2
    gain = angle.cos() * NOISE_VARIANCE / (angle.cos().square() * NOISE_VARIANCE + angle.sin().square() + 1e-12)
    later = mean + gain * (noisy[:, 1:] - angle.cos() * mean)
    return th.cat([noisy[:, :1], later], dim=1)


def task(denoiser, batch: int, horizon: int, policy: LinearPolicy = POLICY) -> Task:
    return Task(
        denoiser=denoiser,
        condition=lambda actions: actions,
        policy=policy,
        bound=lambda clean: clean,
        first=FIRST.expand(batch, -1),
        noise=th.randn(batch, horizon, 1),
        action_mean=th.zeros(1),
        action_std=th.ones(1),
    )


def true_moments(horizon: int, noise_variance: th.Tensor) -> list[tuple[th.Tensor, th.Tensor]]:
    """Mean and covariance of the states 1 ... horizon in the closed loop, s' = (A + B G) s + B σ z + noise."""
    closed = A + B @ POLICY.gain
    injected = B @ B.T * POLICY.std.square() + noise_variance.diag()
    mean, covariance, moments = FIRST, th.zeros(2, 2), []
    for _ in range(horizon):
        mean, covariance = closed @ mean, closed @ covariance @ closed.T + injected
        moments.append((mean, covariance))
    return moments


def assert_moments(states: th.Tensor, moments: list[tuple[th.Tensor, th.Tensor]], slack: float) -> None:
    """``slack`` is the share of the variance that the sampler may be off, beside four standard errors of sampling."""
    batch = len(states)
    for t, (mean, covariance) in enumerate(moments, start=1):
        scale = covariance.diag().sqrt()
        tolerance = 4 / math.sqrt(batch) + slack
        assert ((states[:, t].mean(dim=0) - mean).abs() <= tolerance * scale + 1e-6).all(), f"mean of state {t}"
        # Standard error of a covariance: sqrt((c_ij² + c_ii c_jj) / n), at most sqrt(2 c_ii c_jj / n).
        tolerance = 4 * math.sqrt(2 / batch) + slack
        difference = (states[:, t].T.cov() - covariance).abs()
        assert (difference <= tolerance * scale[:, None] * scale + 1e-6).all(), f"covariance of state {t}"


# ---------------------------------------------------------------------- levels


@pytest.mark.parametrize(
    ("horizon", "n_levels", "lag"), [(5, 4, 1.0), (5, 1, 1.0), (4, 3, 3.0), (6, 2, 0.0), (10, 3, 0.7), (11, 4, 1.1)]
)
def test_levels_are_the_formula(horizon: int, n_levels: int, lag: float) -> None:
    levels = staggered_levels(horizon, n_levels, lag)
    for m, row in enumerate(levels.tolist()):
        expected = [min(max((n_levels - m + lag * t) / n_levels, 0.0), 1.0) for t in range(horizon)]
        assert row == pytest.approx([0.0, *expected], abs=1e-12)
    assert (levels[0, 1:] == 1.0).all(), "begins as noise"
    assert (levels[-1] < 1e-9).all(), "ends clean"
    assert (levels[-2] > 0.0).any(), "no iteration too many"


def test_one_level_and_lag_one_cleans_one_state_per_call() -> None:
    assert th.equal(staggered_levels(3, 1, 1.0), th.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).double())


# ---------------------------------------------------------------------- training examples


@pytest.mark.parametrize("flat_fraction", [0.0, 0.3, 1.0])
def test_corrupted_segments_have_a_ramp_of_noise(flat_fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_polygrad.diffusion.staggered.FLAT_FRACTION", flat_fraction)
    batch, horizon = 5_000, 6
    clean, actions = th.full((batch, horizon + 1, 2), 3.0), th.randn(batch, horizon, 1)
    noisy, seen_actions, level, target = StaggeredSampler(horizon).corrupt(clean, actions)
    assert th.equal(noisy[:, 0], clean[:, 0]), "the start is never noisy"
    assert th.equal(target, clean) and th.equal(seen_actions, actions)
    assert level.shape == (batch, horizon) and level.min() >= 0.0 and level.max() <= 1.0
    assert (level.diff(dim=1) >= -1e-6).all(), "later states are never cleaner"
    flat = (level.amax(dim=1) - level.amin(dim=1) < 1e-6) & (level[:, 0] > 0.0) & (level[:, 0] < 1.0)
    assert flat.float().mean().item() == pytest.approx(flat_fraction, abs=0.03)
    assert level.amax(dim=0).min() > 0.99 and level.amin(dim=0).max() < 0.01, "every state is seen at all levels"
    # What is left after the signal is standard normal noise.
    angle = level[..., None] * math.pi / 2
    noise = ((noisy[:, 1:] - angle.cos() * clean[:, 1:]) / angle.sin())[level > 0.2]
    assert noise.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(noise.numel()))
    assert noise.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(noise.numel()))


def test_flat_ramps_are_favoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_polygrad.diffusion.staggered.FLAT_FRACTION", 0.0)
    # The slope is the square of a uniform number: half of the ramps rise by less than 0.25 per step, some more by the cut.
    level = StaggeredSampler(6).corrupt(th.zeros(5_000, 7, 1), th.zeros(5_000, 6, 1)).level
    assert 0.5 < (level.diff(dim=1).amax(dim=1) < 0.25).float().mean() < 0.65


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize(("n_levels", "lag"), [(1, 1.0), (4, 1.0), (3, 3.0), (2, 5.0), (4, 2.0)])
def test_deterministic_system_is_exact(n_levels: int, lag: float) -> None:
    batch, horizon = 10_000, 5
    states, actions = StaggeredSampler(horizon, n_levels, lag).sample(task(rollout, batch, horizon))
    steps = states[:, :-1] @ A.T + actions @ B.T
    assert th.allclose(states[:, 1:], steps, atol=1e-4), "every step is s' = A s + B a"
    assert_moments(states, true_moments(horizon, th.zeros(2)), slack=0.0)


@pytest.mark.parametrize(("n_levels", "lag"), [(1, 1.0), (4, 1.0), (4, 0.0), (3, 0.5), (2, 5.0)])
def test_actions_are_exact_draws(n_levels: int, lag: float) -> None:
    horizon = 5
    problem = task(rollout, 200, horizon)
    states, actions = StaggeredSampler(horizon, n_levels, lag).sample(problem)
    policy = POLICY(states[:, :-1])
    assert th.allclose((actions - policy.mean) / policy.stddev, problem.noise, atol=1e-4)


def test_low_entropy_is_no_special_case() -> None:
    # δ guidance fails below σ = 0.1; draws do not.
    problem = task(rollout, 200, 5, LinearPolicy(POLICY.gain, th.tensor([1e-3])))
    states, actions = StaggeredSampler(5, 4).sample(problem)
    assert th.allclose((actions - POLICY(states[:, :-1]).mean) / 1e-3, problem.noise, atol=5e-3)


def test_noisy_system_has_the_true_moments() -> None:
    # K = L is autoregressive: every state is denoised in many DDIM steps with all earlier ones clean (error about 6 / K).
    batch, horizon, n_levels = 5_000, 3, 256
    problem = task(conditional_mean, batch, horizon)
    states, actions = StaggeredSampler(horizon, n_levels, lag=n_levels).sample(problem)
    assert_moments(states, true_moments(horizon, NOISE_VARIANCE), slack=0.03)
    # The noise of the system is independent of the action and as large as it should be.
    residual = states[:, 1:] - states[:, :-1] @ A.T - actions @ B.T
    assert th.allclose(residual.var(dim=(0, 1)), NOISE_VARIANCE, rtol=4 * math.sqrt(2 / batch / horizon) + 0.03)
    correlation = (residual * problem.noise).mean(dim=(0, 1)) / NOISE_VARIANCE.sqrt()
    assert (correlation.abs() < 4 / math.sqrt(batch * horizon)).all()


def test_counts_of_network_calls() -> None:
    calls = []

    def counting(noisy: th.Tensor, actions: th.Tensor, levels: th.Tensor) -> th.Tensor:
        calls.append((noisy.clone(), levels.clone()))
        return rollout(noisy, actions, levels)

    StaggeredSampler(10, n_levels=8, lag=1.0).sample(task(counting, 3, 10))
    assert len(calls) == 8 + 9, "K + L (h - 1)"
    assert all(th.equal(noisy[:, 0], FIRST.expand(3, -1)) for noisy, _ in calls), "the start is never noisy"
    assert all(levels.shape == (1, 10) for _, levels in calls)


def test_a_clean_state_never_changes_again() -> None:
    # A denoiser that says something else at every call: what is clean must not listen.
    seen = []

    def restless(noisy: th.Tensor, actions: th.Tensor, levels: th.Tensor) -> th.Tensor:
        seen.append((noisy.clone(), levels[0].clone()))
        return th.full_like(noisy, float(len(seen)))

    states, _ = StaggeredSampler(4, n_levels=2, lag=1.0).sample(task(restless, 5, 4))
    for noisy, levels in seen:
        clean = th.cat([th.zeros(1), levels]) == 0.0
        assert th.equal(noisy[:, clean], states[:, clean])


def test_rejects_bad_settings() -> None:
    for settings, fault in (({"n_levels": 0}, "n_levels must be at least 1"), ({"lag": -1.0}, "lag must be at least 0")):
        with pytest.raises(ValueError, match=fault):
            make_sampler({"name": "staggered", **settings}, 5, th.ones(1))


def test_a_longer_lag_costs_no_iterations_in_which_nothing_changes() -> None:
    assert th.equal(StaggeredSampler(4, n_levels=2, lag=7.0).levels, StaggeredSampler(4, n_levels=2, lag=2.0).levels)
