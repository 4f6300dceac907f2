"""
The policy-guided sampler against a straight transcription of Algorithm 2 in numpy, number by number.

The transcription follows the lines of the paper with the details of the authors' release: actions shown to the network scaled
by sqrt(ᾱ_i), clipped, moved along the score, standardised and given noise of the posterior's standard deviation; the change of
the states bounded over the last ten steps; the last step only clips. It shares no code with the package, only the random
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch as th
from torch.distributions import Normal

from sb3_polygrad.diffusion.base import Task
from sb3_polygrad.diffusion.gaussian import Prediction
from sb3_polygrad.world_models.diffusion import policy_guided

N, TAU, DELTA, FINAL_CLIP = 16, 0.7, 0.01, 0.25
BATCH, HORIZON, CHANNELS, ACTION_DIM = 7, 5, 3, 2

rng = np.random.default_rng(0)
STATE_WEIGHT = 0.5 * rng.normal(size=(CHANNELS, CHANNELS))
ACTION_WEIGHT = 0.5 * rng.normal(size=(ACTION_DIM, CHANNELS))
GAIN = 0.4 * rng.normal(size=(2, ACTION_DIM))  # the policy sees the first two channels
FIRST = rng.normal(size=(BATCH, CHANNELS))
# A box that is neither symmetric nor the same in both dimensions.
LOW, HIGH = np.array([-1.0, -3.0]), np.array([2.0, 5.0])
HALF_RANGE, CENTER = (HIGH - LOW) / 2, (HIGH + LOW) / 2
POLICY_STD = np.array([0.3, 0.25]) * HALF_RANGE
ACTION_MEAN, ACTION_STD = np.array([0.3, 0.5]), np.array([0.8, 2.0])


# ---------------------------------------------------------------------- in numpy


def network(noisy: np.ndarray, actions: np.ndarray, level: float) -> np.ndarray:
    """Every state from itself, its predecessor and the action between them."""
    before = np.concatenate([noisy[:, :1], noisy[:, :-1]], axis=1)
    led = np.concatenate([0 * actions[:, :1], actions], axis=1)
    return np.tanh(0.5 * noisy + before @ STATE_WEIGHT + led @ ACTION_WEIGHT + level)


def policy_mean(states: np.ndarray) -> np.ndarray:
    return CENTER + HALF_RANGE * np.tanh(states[..., :2] @ GAIN)


def state_score(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """∇_s log π(a|s), by the chain rule."""
    squashed = np.tanh(states[..., :2] @ GAIN)
    by_mean = (actions - policy_mean(states)) / POLICY_STD**2
    score = np.zeros_like(states)
    score[..., :2] = (by_mean * HALF_RANGE * (1.0 - squashed**2)) @ GAIN.T
    return score


def algorithm_2(
    draws: Iterator[np.ndarray], prediction: str, rule: str, clip_std: float | None
) -> tuple[np.ndarray, np.ndarray]:
    alpha_bar = [math.cos(math.pi / 2 * i / N) ** (2 * TAU) for i in range(N)]
    alpha_bar.append(alpha_bar[-1] * 0.001)  # β is held below 0.999
    beta = [0.0] + [1.0 - alpha_bar[i] / alpha_bar[i - 1] for i in range(1, N + 1)]

    def clipped(a: np.ndarray, states: np.ndarray) -> np.ndarray:
        if clip_std is None:
            return a
        mean = policy_mean(states)
        return np.minimum(np.maximum(a, mean - clip_std * POLICY_STD), mean + clip_std * POLICY_STD)

    a = ACTION_MEAN + ACTION_STD * next(draws)  # line 2
    x = next(draws)  # line 3
    for i in range(N, 0, -1):
        x[:, 0] = FIRST  # line 6
        shown = (np.clip(a, LOW, HIGH) - ACTION_MEAN) / ACTION_STD * math.sqrt(alpha_bar[i])
        output = network(x, shown, i / N)  # line 7
        if prediction == "epsilon":  # line 9
            clean = (x - math.sqrt(1 - alpha_bar[i]) * output) / math.sqrt(alpha_bar[i])
        else:
            clean = output
        clean = np.clip(clean, -2.0, 2.0)  # what was really seen
        clean[:, 0] = FIRST
        if i == 1:
            break
        variance = beta[i] * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i])
        if rule == "state_update":  # Appendix C.3
            score = state_score(clean, np.concatenate([a, a[:, :1]], axis=1))
            score[:, 0] = score[:, -1] = 0.0  # the start is given, and no action is taken in the last state
            clean = clean + DELTA * score
        if rule != "random_actions":  # line 10
            seen = (x if rule == "noisy_states" else clean)[:, :-1]
            a = clipped(a, seen)
            a = a + DELTA * HALF_RANGE**2 * (policy_mean(seen) - a) / POLICY_STD**2
        standardized = (a - ACTION_MEAN) / ACTION_STD
        action_noise = next(draws)
        if rule != "random_actions":
            standardized = standardized + math.sqrt(variance) * action_noise
        a = ACTION_MEAN + ACTION_STD * standardized
        # Line 13, in the usual form of the posterior.
        mean = math.sqrt(alpha_bar[i - 1]) * beta[i] / (1 - alpha_bar[i]) * clean
        mean = mean + math.sqrt(1 - beta[i]) * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * x
        if i <= 10:
            mean = x + np.clip(mean - x, -FINAL_CLIP, FINAL_CLIP)
        x = mean + math.sqrt(variance) * next(draws)
    return clean, a if rule == "random_actions" else clipped(a, clean[:, :-1])  # lines 12 and 14


# ---------------------------------------------------------------------- by the package


def by_the_sampler(noise: list[th.Tensor], prediction: Prediction, rule: str, clip_std: float | None, monkeypatch):
    draws = iter(noise)
    tensors = {name: th.tensor(array).float() for name, array in globals().items() if isinstance(array, np.ndarray)}
    low, high = tensors["LOW"], tensors["HIGH"]

    def policy(states: th.Tensor) -> Normal:
        mean = tensors["CENTER"] + tensors["HALF_RANGE"] * (states[..., :2] @ tensors["GAIN"]).tanh()
        return Normal(mean, tensors["POLICY_STD"].expand_as(mean))

    def denoiser(noisy: th.Tensor, actions: th.Tensor, level: th.Tensor) -> th.Tensor:
        return th.as_tensor(network(noisy.double().numpy(), actions.double().numpy(), float(level))).float()

    task = Task(
        denoiser=denoiser,
        condition=lambda actions: (actions.clamp(low, high) - tensors["ACTION_MEAN"]) / tensors["ACTION_STD"],
        policy=policy,
        bound=lambda clean: clean.clamp(-2.0, 2.0),
        first=tensors["FIRST"],
        noise=next(draws).float(),
        action_mean=tensors["ACTION_MEAN"],
        action_std=tensors["ACTION_STD"],
    )
    sampler = policy_guided((high - low) / 2, N, TAU, prediction, rule, delta=DELTA, clip_std=clip_std, final_clip=FINAL_CLIP)
    monkeypatch.setattr(th, "randn", lambda *shape, **_: next(draws).float().view(shape))
    monkeypatch.setattr(th, "randn_like", lambda like: next(draws).float().view_as(like))
    with th.no_grad():
        states, actions = sampler.sample(task)
    assert next(draws, None) is None, "every random number was used"
    return states, actions


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("clip_std", [3.0, None])
@pytest.mark.parametrize("rule", ["policy_score", "noisy_states", "state_update", "random_actions"])
def test_a_whole_pass_number_by_number(
    prediction: Prediction, clip_std: float | None, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    th.manual_seed(1)
    action_shape, state_shape = (BATCH, HORIZON, ACTION_DIM), (BATCH, HORIZON + 1, CHANNELS)
    # Actions and states at the start, then actions and states at each step but the last.
    noise = [th.randn(shape, dtype=th.float64) for _ in range(N) for shape in (action_shape, state_shape)]
    expected_states, expected_actions = algorithm_2((tensor.numpy().copy() for tensor in noise), prediction, rule, clip_std)
    states, actions = by_the_sampler(noise, prediction, rule, clip_std, monkeypatch)
    assert np.abs(states.numpy() - expected_states).max() < 1e-5
    assert np.abs(actions.numpy() - expected_actions).max() < 1e-5
