"""Mask, GAE and returns of imagined trajectories, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.distributions import Normal

from sb3_polygrad.common.action_diagnostics import action_autocorrelation, action_std, standardized_actions
from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.imagination import ImaginedBatch
from sb3_polygrad.imagined_buffer import ImaginedRolloutBuffer, gae

GAMMA, LAMBDA = 0.9, 0.5


class KnownPolicy:
    """
    Values that are given, and ``a ~ N(-s / 10, 1)``.

    :param values: ``(batch, horizon + 1)`` of all observations of a batch
    """

    def __init__(self, values: list[list[float]]) -> None:
        self.values = th.tensor(values)

    def target_values(self, observations: th.Tensor) -> th.Tensor:
        assert observations.shape == (self.values.numel(), 1)
        return self.values.flatten()

    def get_distribution(self, observations: th.Tensor) -> Any:
        return Known(observations)


class Known:
    def __init__(self, observations: th.Tensor) -> None:
        self.mean = -observations / 10

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return Normal(self.mean, 1.0).log_prob(actions).sum(dim=-1)


def make_trajectory(rewards: list[list[float]], terminals: list[list[float]]) -> Trajectory:
    """Observation of step t of trajectory b is 10 b + t, its action the negative of that."""
    batch, horizon = len(rewards), len(rewards[0])
    observations = 10.0 * th.arange(batch)[:, None, None] + th.arange(horizon + 1)[:, None]
    ends = th.tensor(terminals)
    return Trajectory(observations, -observations[:, :-1], th.tensor(rewards), ends, mask_after_ending(ends))


def empty(batch: int, horizon: int, gamma: float = GAMMA, lam: float = LAMBDA) -> ImaginedRolloutBuffer:
    box = spaces.Box(-np.inf, np.inf, (1,))
    return ImaginedRolloutBuffer(horizon, box, box, device="cpu", gamma=gamma, gae_lambda=lam, n_envs=batch)


def fill(buffer: ImaginedRolloutBuffer, trajectory: Trajectory, values: list[list[float]]) -> None:
    batch = ImaginedBatch(trajectory, trajectory.observations, trajectory.rewards)
    buffer.fill(batch, KnownPolicy(values))  # type: ignore[arg-type]


def filled(
    rewards: list[list[float]],
    terminals: list[list[float]],
    values: list[list[float]],
    gamma: float = GAMMA,
    lam: float = LAMBDA,
) -> ImaginedRolloutBuffer:
    buffer = empty(len(rewards), len(rewards[0]), gamma, lam)
    fill(buffer, make_trajectory(rewards, terminals), values)
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
    assert buffer.all_steps().advantages[:2].tolist() == pytest.approx([before, at_ending])
    assert buffer.all_steps().returns[:2].tolist() == pytest.approx([before + 0.5, 2.0])
    assert buffer.all_steps().mask.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_end_of_the_horizon_bootstraps() -> None:
    buffer = filled(rewards=[[1.0, 2.0]], terminals=[[0.0, 0.0]], values=[[0.5, -1.0, 4.0]])
    last = 2.0 + GAMMA * 4.0 - (-1.0)
    first = 1.0 + GAMMA * (-1.0) - 0.5 + GAMMA * LAMBDA * last
    assert buffer.all_steps().advantages.tolist() == pytest.approx([first, last])


def test_an_ending_at_the_last_step_does_not_bootstrap() -> None:
    buffer = filled(rewards=[[1.0, 2.0]], terminals=[[0.0, 1.0]], values=[[0.0, 0.0, 100.0]])
    assert buffer.all_steps().returns[1].item() == pytest.approx(2.0)


def test_lambda_one_is_the_discounted_sum() -> None:
    rewards = [1.0, -2.0, 3.0, 0.5]
    buffer = filled([rewards], [[0.0] * 4], [[0.3, 0.1, -5.0, 2.0, 7.0]], lam=1.0)
    for t in range(4):
        expected = sum(GAMMA ** (k - t) * rewards[k] for k in range(t, 4)) + GAMMA ** (4 - t) * 7.0
        assert buffer.all_steps().returns[t].item() == pytest.approx(expected)


def test_trajectories_do_not_touch_each_other() -> None:
    alone = filled([[1.0, 2.0]], [[0.0, 1.0]], [[0.5, -1.0, 4.0]])
    both = filled([[5.0, 5.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]], [[9.0, 9.0, 9.0], [0.5, -1.0, 4.0]])
    assert th.equal(both.all_steps().advantages[2:], alone.all_steps().advantages)


def test_a_probability_of_an_ending_weighs_what_comes_after() -> None:
    # An ending with probability 1/4 is a quarter of the drawn endings: the expectation is linear in it.
    values = th.tensor([[0.5, -1.0, 4.0]])
    results = [gae(th.tensor([[1.0, 2.0]]), values, th.tensor([[p, 0.0]]), GAMMA, LAMBDA) for p in (0.0, 0.25, 1.0)]
    assert th.allclose(results[1], 0.75 * results[0] + 0.25 * results[2])


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gradients_of_returns_are_those_of_finite_differences(lam: float) -> None:
    arguments = [th.randn(3, 4), th.randn(3, 5), th.rand(3, 4)]
    arguments = [argument.double().requires_grad_() for argument in arguments]
    assert th.autograd.gradcheck(lambda *tensors: gae(*tensors, GAMMA, lam), arguments)


# ---------------------------------------------------------------------- the buffer


def test_minibatches_hold_every_step_once_with_its_own_values() -> None:
    buffer = filled([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [[0.1] * 4, [0.2] * 4])
    batches = list(buffer.minibatches(n_epochs=2, n_minibatches=4))
    assert [len(batch.mask) for batch in batches] == [2, 2, 2] * 2, "six steps in four parts are three of two"
    whole = buffer.all_steps()
    assert whole.observations.flatten().tolist() == [0, 1, 2, 10, 11, 12], "all at once comes in order"
    index = {obs: row for row, obs in enumerate(whole.observations.flatten().tolist())}
    seen = []
    for batch in batches:
        rows = [index[obs] for obs in batch.observations.flatten().tolist()]
        seen += rows
        for name in batch._fields:
            assert th.equal(getattr(batch, name), getattr(whole, name)[rows]), name
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6)), "once in every epoch"
    # Actions are 0.9 standard deviations per unit of the observation away from the mean.
    expected = [-0.5 * (0.9 * obs) ** 2 - 0.5 * math.log(2 * math.pi) for obs in (0, 1, 2, 10, 11, 12)]
    assert whole.old_log_prob.tolist() == pytest.approx(expected, rel=1e-5)
    assert (whole.returns - whole.advantages).tolist() == pytest.approx([0.1] * 3 + [0.2] * 3), "the values"


def test_minibatches_are_in_random_order() -> None:
    buffer = filled([[0.0] * 50], [[0.0] * 50], [[0.0] * 51])
    first, second = (batch.observations.flatten().tolist() for batch in buffer.minibatches(2, 1))
    assert first != second != sorted(second)


def test_the_policy_sees_observations_and_critics_rewards_in_their_own_units() -> None:
    trajectory = make_trajectory([[1.0, 2.0]], [[0.0, 1.0]])
    buffer = empty(1, 2)
    batch = ImaginedBatch(trajectory, trajectory.observations + 100.0, 10.0 * trajectory.rewards)
    buffer.fill(batch, KnownPolicy([[0.0, 0.0, 0.0]]))  # type: ignore[arg-type]
    assert buffer.all_steps().observations.flatten().tolist() == [100.0, 101.0]
    assert buffer.all_steps().returns[1].item() == pytest.approx(20.0)


def test_a_batch_with_gradients_keeps_them_until_they_are_dropped() -> None:
    trajectory = make_trajectory([[1.0, 2.0]], [[0.0, 0.0]])
    shift = th.zeros(1, requires_grad=True)
    buffer = empty(1, 2)
    fill(buffer, trajectory._replace(rewards=trajectory.rewards + shift), [[0.5, -1.0, 4.0]])
    gradient = th.autograd.grad(buffer.all_steps().returns.sum(), shift, retain_graph=True)[0]
    assert gradient.item() == pytest.approx(2.0 + GAMMA * LAMBDA), "both rewards, and the second in the first return"
    assert buffer.all_steps().old_log_prob.numel() == 0, "which no update needs then"
    before = buffer.all_steps().returns
    buffer.detach()
    assert not any(tensor.requires_grad for tensor in buffer.all_steps())
    assert th.equal(buffer.all_steps().returns, before)


def test_takes_whole_batches_of_its_own_shape_only() -> None:
    buffer = filled([[1.0, 2.0]], [[0.0, 0.0]], [[0.0, 0.0, 0.0]])
    with pytest.raises(TypeError, match="fill"):
        buffer.add()
    with pytest.raises(AssertionError, match=r"expected \(batch, horizon\)"):
        fill(buffer, make_trajectory([[1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0]]), [[0.0] * 4])
    assert buffer.full
    buffer.reset()
    assert not buffer.full
    with pytest.raises(AssertionError, match="empty"):
        buffer.all_steps()


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
