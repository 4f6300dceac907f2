"""The policy-guided sampler with denoisers that are exact for a known Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch as th
from torch.distributions import Normal

from sb3_polygrad.diffusion.base import Task
from sb3_polygrad.diffusion.controllers import DeltaController
from sb3_polygrad.diffusion.gaussian import GaussianDiffusion, Prediction
from sb3_polygrad.diffusion.guidance import PolicyScoreGuidance
from sb3_polygrad.diffusion.policy_guided import PolicyGuidedSampler
from sb3_polygrad.diffusion.schedules import cosine_schedule
from sb3_polygrad.world_models.diffusion import make_sampler
from tests.toys import LinearPolicy

HORIZON, ACTION_DIM = 3, 2


STANDARD_POLICY = LinearPolicy(th.zeros(ACTION_DIM, 1), th.ones(ACTION_DIM))


def sampler(
    n_steps: int, prediction: Prediction = "x0", clip_std: float | None = None, delta: float = 0.005, **settings: Any
) -> PolicyGuidedSampler:
    guidance = PolicyScoreGuidance(DeltaController(delta), th.ones(ACTION_DIM), clip_std)
    return PolicyGuidedSampler(GaussianDiffusion(cosine_schedule(n_steps), prediction), guidance, **settings)


def task(denoiser: Callable, first: th.Tensor, policy: Callable = STANDARD_POLICY, **changes: Any) -> Task:
    settings = dict(
        denoiser=denoiser,
        condition=lambda actions: actions,
        policy=policy,
        bound=lambda clean: clean,
        first=first,
        noise=th.randn(len(first), HORIZON, ACTION_DIM),
        action_mean=th.zeros(ACTION_DIM),
        action_std=th.ones(ACTION_DIM),
    )
    return Task(**{**settings, **changes})


def signal_of(level: th.Tensor, n_steps: int) -> float:
    """ᾱ at a noise level i/N."""
    return cosine_schedule(n_steps)[round(level.item() * n_steps)].item()


# A Gaussian over the states (s^1, s^2, s^3) of one channel, given that s^0 = first: mean and covariance.
GAUSSIAN_COVARIANCE = th.tensor([[1.0, 0.6, 0.2], [0.6, 0.8, 0.5], [0.2, 0.5, 0.7]])


def gaussian_mean(first: th.Tensor) -> th.Tensor:
    return first * th.tensor([1.0, 0.5, -0.5])


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
def test_states_follow_the_gaussian_that_the_denoiser_knows(prediction: Prediction) -> None:
    n_steps, batch = 128, 8_000

    def denoiser(noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        signal = signal_of(level, n_steps)
        mean = gaussian_mean(noisy[:, 0])
        # E[x₀ | x_i] by Gaussian conditioning, with x_i = sqrt(ᾱ) x₀ + sqrt(1-ᾱ) ε.
        spread = signal * GAUSSIAN_COVARIANCE + (1.0 - signal) * th.eye(HORIZON)
        gain = math.sqrt(signal) * GAUSSIAN_COVARIANCE @ th.linalg.inv(spread)
        clean = mean + (noisy[:, 1:, 0] - math.sqrt(signal) * mean) @ gain.T
        clean = th.cat([noisy[:, :1, 0], clean], dim=1)[..., None]
        return clean if prediction == "x0" else (noisy - math.sqrt(signal) * clean) / math.sqrt(1.0 - signal)

    first = th.full((batch, 1), 0.8)
    states = sampler(n_steps, prediction).sample(task(denoiser, first)).states[..., 0]
    assert th.equal(states[:, :1], first), "the start is inpainted, to the last bit"
    # 4 standard errors of a mean over 8000 draws; the covariance also has the error of 128 steps.
    assert th.allclose(states[:, 1:].mean(dim=0), gaussian_mean(first[0]), atol=4 / math.sqrt(batch))
    assert th.allclose(states[:, 1:].T.cov(), GAUSSIAN_COVARIANCE, atol=0.06)


def deterministic(noisy: th.Tensor, actions: th.Tensor, level: th.Tensor, n_steps: int) -> th.Tensor:
    """``s^{t+1} = 0.9 s^t + 0.2 a_0 - 0.1 a_1``, from the first state and the actions, which come scaled by sqrt(ᾱ)."""
    actions = actions / math.sqrt(signal_of(level, n_steps))
    states = [noisy[:, 0]]
    for t in range(HORIZON):
        states.append(0.9 * states[-1] + (actions[:, t] @ th.tensor([0.2, -0.1]))[:, None])
    return th.stack(states, dim=1)


def test_states_are_where_the_returned_actions_lead() -> None:
    n_steps, first = 8, th.randn(500, 1)
    policy = LinearPolicy(th.tensor([[0.5], [-0.5]]), th.tensor([0.4, 0.6]))
    states, actions = sampler(n_steps).sample(task(lambda *x: deterministic(*x, n_steps), first, policy))
    expected = deterministic(first[:, None], actions, th.tensor(0.0), n_steps)
    assert th.allclose(states, expected, atol=1e-4)


@pytest.mark.parametrize("delta", [0.001, 0.02])
def test_actions_have_the_moments_of_the_guided_chain(delta: float) -> None:
    # With a policy N(μ, σ²) that ignores the state, line 10 is a ← a + δ/σ² (μ - a) + sqrt(β̃_i) σ_data ε from N(m, σ_data²).
    n_steps, batch = 16, 20_000
    policy_mean, policy_std = th.tensor([0.5, -1.0]), th.tensor([0.5, 0.3])
    data_mean, data_std = th.tensor([2.0, 0.0]), th.tensor([1.5, 0.5])

    def policy(states: th.Tensor) -> Normal:
        shape = (*states.shape[:-1], ACTION_DIM)
        return Normal(policy_mean.expand(shape), policy_std.expand(shape))

    mean, variance = data_mean, data_std.square()
    alpha_bar = [math.cos(math.pi / 2 * i / n_steps) ** 2 for i in range(n_steps)]
    alpha_bar.append(0.001 * alpha_bar[-1])
    for i in range(n_steps, 1, -1):
        beta = 1.0 - alpha_bar[i] / alpha_bar[i - 1]
        keep = 1.0 - delta / policy_std.square()
        mean = policy_mean + keep * (mean - policy_mean)
        variance = keep.square() * variance + beta * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * data_std.square()

    problem = task(lambda noisy, *_: noisy, th.zeros(batch, 1), policy, action_mean=data_mean, action_std=data_std)
    actions = sampler(n_steps, delta=delta).sample(problem).actions
    error = 4 * variance.sqrt() / math.sqrt(batch)  # per step: four standard errors
    assert ((actions.mean(dim=0) - mean).abs() < error).all()
    assert th.allclose(actions.std(dim=0) / variance.sqrt(), th.ones(HORIZON, ACTION_DIM), atol=4 / math.sqrt(2 * batch))


def test_returned_actions_are_clipped_to_the_policy_at_the_returned_states() -> None:
    n_steps, policy = 8, LinearPolicy(th.tensor([[0.5], [-0.5]]), th.tensor([0.1, 0.1]))
    # Actions start far from the policy and δ is too small to bring them near.
    problem = task(lambda *x: deterministic(*x, n_steps), th.randn(50, 1), policy, action_mean=th.full((ACTION_DIM,), 5.0))
    states, actions = sampler(n_steps, clip_std=3.0, delta=1e-6).sample(problem)
    distance = (actions - policy(states[:, :-1]).mean) / 0.1
    assert distance.abs().max().item() == pytest.approx(3.0, abs=1e-3)


def test_the_denoiser_sees_what_it_was_trained_on() -> None:
    n_steps, seen = 5, []

    def denoiser(noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        seen.append((noisy.clone(), actions.clone(), level.item()))
        return noisy.clone()

    first = th.randn(6, 1)
    problem = task(denoiser, first, condition=th.zeros_like, action_mean=th.tensor([0.5, 1.0]))
    sampler(n_steps).sample(problem)
    assert [level for *_, level in seen] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2]), "one call per diffusion step"
    assert all(th.equal(noisy[:, 0], first) for noisy, *_ in seen), "line 6: the start is never noisy"
    assert all((actions == 0.0).all() for _, actions, _ in seen), "it sees the conditioned actions"


def test_conditioning_is_scaled_by_the_signal_and_has_no_noise() -> None:
    n_steps, seen = 4, []

    def denoiser(noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        seen.append(actions.clone())
        return noisy.clone()

    sampler(n_steps).sample(task(denoiser, th.zeros(2, 1), condition=th.ones_like))
    expected = [math.sqrt(cosine_schedule(n_steps)[i].item()) for i in range(n_steps, 0, -1)]
    assert [actions.unique().item() for actions in seen] == pytest.approx(expected, rel=1e-5)


def test_corrupted_windows_are_the_forward_process() -> None:
    n_steps, batch = 4, 4_000
    clean, actions = th.full((batch, HORIZON + 1, 1), 2.0), th.ones(batch, HORIZON, ACTION_DIM)
    noisy, seen_actions, level, target = sampler(n_steps).corrupt(clean, actions)
    assert th.equal(noisy[:, 0], clean[:, 0]), "the start is inpainted in training too"
    assert th.equal(target, clean)
    for i in range(1, n_steps + 1):
        chosen = level[:, 0] == i / n_steps
        assert chosen.sum() > batch / n_steps * 0.8, "diffusion steps are drawn uniformly"
        signal = cosine_schedule(n_steps)[i].item()
        assert th.allclose(seen_actions[chosen], th.tensor(math.sqrt(signal)), atol=1e-6), "scaled, without noise"
        later = noisy[chosen, 1:]
        error = 4 / math.sqrt(later.numel())
        assert later.mean().item() == pytest.approx(2.0 * math.sqrt(signal), abs=error)
        assert later.std().item() == pytest.approx(math.sqrt(1.0 - signal), abs=error)


def test_epsilon_target_is_the_noise_that_was_added() -> None:
    clean = th.randn(50, HORIZON + 1, 1)
    noisy, _, level, target = sampler(8, "epsilon").corrupt(clean, th.zeros(50, HORIZON, ACTION_DIM))
    signal = th.tensor([signal_of(at, 8) for at in level])[:, None, None]
    assert th.allclose(noisy[:, 1:], (signal.sqrt() * clean + (1.0 - signal).sqrt() * target)[:, 1:], atol=1e-6)


def test_final_clip_bounds_the_change_of_the_states() -> None:
    # The denoiser says 100 throughout. Unbounded the last state is 100; bounded over the last ten steps each step moves 0.25
    # at most, and only the very last one, which returns the clean estimate, is free (as in the release).
    seen: list[th.Tensor] = []

    def denoiser(noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        seen.append(noisy.clone())
        return th.full_like(noisy, 100.0)

    sampler(12, final_clip=0.25).sample(task(denoiser, th.zeros(400, 1)))
    changes = th.stack([(after - before)[:, 1:].mean() for before, after in pairwise(seen)])
    assert len(changes) == 11 and changes[0] > 0.5, "step 12 is not among the last ten, step 11 neither"
    assert th.allclose(changes[2:], th.tensor(0.25), atol=0.15), "the mean moves by the bound, the rest is noise"


@pytest.mark.parametrize("name", ["final_clip", "clip_std", "delta", "noise_tau"])
def test_a_setting_of_zero_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"world_model_kwargs\['sampler'\]: {name} must be greater than 0"):
        make_sampler({"name": "policy_guided", name: 0.0}, HORIZON, th.ones(ACTION_DIM))
