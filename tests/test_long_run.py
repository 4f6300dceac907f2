"""What the critic says, what the world model says, and what comes."""

from __future__ import annotations

import pytest
import torch as th

from sb3_polygrad.core.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.evaluation.long_run import imagined_returns, measure, real_episodes
from sb3_polygrad.world_models.base import PolicyFn, WorldModel
from tests.test_endings import Falling
from tests.toys import PointEnv, tiny_model


class Counting(WorldModel):
    """``x' = x + 1``, reward 1; it ends when x' is 3 or more."""

    def __init__(self, obs_dim: int, action_low: th.Tensor, action_high: th.Tensor, horizon: int) -> None:
        super().__init__(obs_dim, len(action_low), horizon)

    def imagine(self, start: th.Tensor, policy: PolicyFn, context: object = None) -> Trajectory:
        observations = start[:, None] + th.arange(self.horizon + 1.0)[:, None]
        terminals = (observations[:, 1:, 0] >= 3.0).float()
        actions = th.zeros(len(start), self.horizon, self.action_dim)
        return Trajectory(observations, actions, th.ones_like(terminals), terminals, mask_after_ending(terminals))

    def fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        return {}

    def observe(self, *steps: th.Tensor) -> None:
        pass


def test_imagined_returns_go_over_many_horizons() -> None:
    model = tiny_model(PointEnv(), policy_update="ppo", gamma=0.5)
    model.world_model = Counting(1, th.tensor([-1.0]), th.tensor([1.0]), model.horizon)
    start = th.tensor([[2.0], [0.0], [-100.0]])  # one step, three steps, and more than are imagined
    expected = th.tensor([1.0, 1.75, 2.0 - 0.5**39])
    assert th.allclose(imagined_returns(model, start, 40), expected) and 40 % model.horizon != 40


@pytest.mark.parametrize("ends", [True, False])
def test_real_returns_are_those_that_are_known(ends: bool) -> None:
    model = tiny_model(PointEnv(), gamma=0.9)
    episodes = real_episodes(model, Falling(length=5) if ends else PointEnv(length=5), n_episodes=2, cut=3)
    assert episodes.lengths == [5, 5] and len(episodes.totals) == 2
    assert len(episodes.observations) == len(episodes.returns) == (10 if ends else 4)
    rewards = -(episodes.observations[1:, 0] ** 2)
    assert episodes.returns[0].item() == pytest.approx((rewards[0] + 0.9 * episodes.returns[1]).item(), rel=1e-5)


def test_measure_has_all_columns() -> None:
    model = tiny_model(Falling(length=5)).learn(60)
    row = measure(model, Falling(length=5), n_episodes=2, n_states=16, n_steps=20)
    assert set(row) == {"value", "imagined", "real", "episode_return", "episode_length"}
    assert all(th.tensor(value).isfinite() for value in row.values())
