"""Mask, GAE and returns of imagined trajectories, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_polygrad.common.on_policy import action_autocorrelation, action_std, standardized_actions
from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.policy.imagined_rollout_buffer import ImaginedRolloutBuffer

GAMMA, LAMBDA = 0.9, 0.5


def make_trajectory(rewards: list[list[float]], terminals: list[list[float]]) -> Trajectory:
    """Observation of step t of trajectory b is 10 b + t, its action the negative of that."""
    batch, horizon = len(rewards), len(rewards[0])
    observations = 10.0 * th.arange(batch)[:, None, None] + th.arange(horizon + 1)[:, None]
    ends = th.tensor(terminals)
    return Trajectory(observations, -observations[:, :-1], th.tensor(rewards), ends, mask_after_ending(ends))


def filled(
    rewards: list[list[float]],
    terminals: list[list[float]],
    values: list[list[float]],
    gamma: float = GAMMA,
    lam: float = LAMBDA,
) -> ImaginedRolloutBuffer:
    trajectory = make_trajectory(rewards, terminals)
    batch, horizon = trajectory.rewards.shape
    box = spaces.Box(-np.inf, np.inf, (1,))
    buffer = ImaginedRolloutBuffer(horizon, box, box, device="cpu", gamma=gamma, gae_lambda=lam, n_envs=batch)
    log_probs = trajectory.observations[:, :-1, 0] / 100
    buffer.fill(trajectory, trajectory.observations[:, :-1], th.tensor(values), log_probs)
    return buffer


# ---------------------------------------------------------------------- mask


def test_mask_counts_the_ending_step_and_none_after_it() -> None:
    terminals = th.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    expected = th.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert th.equal(mask_after_ending(terminals), expected)


# ---------------------------------------------------------------------- GAE


def test_gae_with_an_ending_in_the_middle() -> None:
    buffer = filled(rewards=[[1.0, 2.0, 7.0, 7.0]], terminals=[[0.0, 1.0, 1.0, 1.0]], values=[[0.5, -1.0, 3.0, 3.0, 9.0]])
    # The ending step has no future; the step before it sees the ending step's value and advantage.
    at_ending = 2.0 - (-1.0)
    before = 1.0 + GAMMA * (-1.0) - 0.5 + GAMMA * LAMBDA * at_ending
    assert buffer.advantages[0, :2].tolist() == pytest.approx([before, at_ending])
    assert buffer.returns[0, :2].tolist() == pytest.approx([before + 0.5, 2.0])
    assert buffer.mask[0].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_end_of_the_horizon_bootstraps() -> None:
    buffer = filled(rewards=[[1.0, 2.0]], terminals=[[0.0, 0.0]], values=[[0.5, -1.0, 4.0]])
    last = 2.0 + GAMMA * 4.0 - (-1.0)
    first = 1.0 + GAMMA * (-1.0) - 0.5 + GAMMA * LAMBDA * last
    assert buffer.advantages[0].tolist() == pytest.approx([first, last])


def test_an_ending_at_the_last_step_does_not_bootstrap() -> None:
    buffer = filled(rewards=[[1.0, 2.0]], terminals=[[0.0, 1.0]], values=[[0.0, 0.0, 100.0]])
    assert buffer.returns[0, 1].item() == pytest.approx(2.0)


def test_lambda_one_is_the_discounted_sum() -> None:
    rewards = [1.0, -2.0, 3.0, 0.5]
    buffer = filled([rewards], [[0.0] * 4], [[0.3, 0.1, -5.0, 2.0, 7.0]], lam=1.0)
    for t in range(4):
        expected = sum(GAMMA ** (k - t) * rewards[k] for k in range(t, 4)) + GAMMA ** (4 - t) * 7.0
        assert buffer.returns[0, t].item() == pytest.approx(expected)


def test_trajectories_do_not_touch_each_other() -> None:
    alone = filled([[1.0, 2.0]], [[0.0, 1.0]], [[0.5, -1.0, 4.0]])
    both = filled([[5.0, 5.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]], [[9.0, 9.0, 9.0], [0.5, -1.0, 4.0]])
    assert th.equal(both.advantages[1], alone.advantages[0])  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the buffer


def test_minibatches_hold_every_step_once_with_its_own_values() -> None:
    buffer = filled([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [[0.1] * 4, [0.2] * 4])
    batches = list(buffer.get(4))
    assert [len(batch.mask) for batch in batches] == [4, 2]
    whole = next(buffer.get(None))
    assert whole.observations.flatten().tolist() == [0, 1, 2, 10, 11, 12], "all at once comes in order"
    index = {obs: row for row, obs in enumerate(whole.observations.flatten().tolist())}
    seen = []
    for batch in batches:
        rows = [index[obs] for obs in batch.observations.flatten().tolist()]
        seen += rows
        for name in batch._fields:
            assert th.equal(getattr(batch, name), getattr(whole, name)[rows]), name
    assert sorted(seen) == list(range(6))
    assert whole.old_log_prob.tolist() == pytest.approx([0.0, 0.01, 0.02, 0.10, 0.11, 0.12])
    assert whole.old_values.tolist() == pytest.approx([0.1] * 3 + [0.2] * 3)


def test_minibatches_are_in_random_order() -> None:
    buffer = filled([[0.0] * 50], [[0.0] * 50], [[0.0] * 51])
    first, second = (next(buffer.get(50)).observations.flatten().tolist() for _ in range(2))
    assert first != second != sorted(second)


def test_takes_whole_batches_of_its_own_shape_only() -> None:
    buffer = filled([[1.0, 2.0]], [[0.0, 0.0]], [[0.0, 0.0, 0.0]])
    with pytest.raises(TypeError, match="fill"):
        buffer.add()
    longer = make_trajectory([[1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0]])
    with pytest.raises(AssertionError, match=r"expected \(batch, horizon\) = \(1, 2\)"):
        buffer.fill(longer, longer.observations[:, :-1], th.zeros(1, 4), th.zeros(1, 3))
    buffer.reset()
    with pytest.raises(AssertionError, match="empty"):
        next(buffer.get(1))


# ---------------------------------------------------------------------- how on-policy a batch is


def test_standardised_actions_return_the_noise() -> None:
    noise, mean, std = th.randn(4, 3, 2), th.randn(4, 3, 2), th.rand(4, 3, 2) + 0.1
    trajectory = make_trajectory([[0.0] * 3] * 4, [[0.0] * 3] * 4)._replace(actions=mean + std * noise)
    assert th.allclose(standardized_actions(trajectory, mean, std), noise, atol=1e-5)


def test_action_std_is_the_mean_over_dimensions_of_what_happened() -> None:
    # Dimension 0: -1 and 1 (std 1); dimension 1: 0 and 6 (std 3); the masked step would change both.
    actions = th.tensor([[[-1.0, 0.0], [1.0, 6.0], [99.0, 99.0]]])
    assert action_std(actions, th.tensor([[1.0, 1.0, 0.0]])).item() == pytest.approx(2.0)


def test_autocorrelation_of_an_autoregressive_process() -> None:
    rho, z = 0.6, [th.randn(20_000, 1)]
    for _ in range(9):
        z.append(rho * z[-1] + math.sqrt(1.0 - rho**2) * th.randn(20_000, 1))
    actions, everything = th.stack(z, dim=1), th.ones(20_000, 10)
    assert action_autocorrelation(actions, everything).item() == pytest.approx(rho, abs=0.01)
    assert action_autocorrelation(th.randn(20_000, 10, 1), everything).item() == pytest.approx(0.0, abs=0.01)
    # Pairs whose later step did not happen do not count.
    broken, mask = actions.clone(), everything.clone()
    broken[:, 5:], mask[:, 5:] = -100.0, 0.0
    assert action_autocorrelation(broken, mask).item() == pytest.approx(rho, abs=0.015)
