"""What the critic says, what the world model says, and what comes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch as th

from sb3_polygrad import PolyGRAD
from sb3_polygrad.core.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.evaluation import long_run
from sb3_polygrad.evaluation.long_run import imagined_returns, known_returns, measure
from sb3_polygrad.evaluation.real_episodes import real_episodes
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
    assert th.allclose(imagined_returns(model, start, 40), expected) and model.horizon < 40


@pytest.mark.parametrize("ends", [True, False])
def test_real_returns_are_those_that_are_known(ends: bool) -> None:
    model = tiny_model(PointEnv(), gamma=0.9)
    episodes = list(real_episodes(model, Falling(length=5) if ends else PointEnv(length=5), n_episodes=2))
    assert [(len(episode.rewards), episode.terminated) for episode in episodes] == [(5, ends)] * 2
    observations, returns = known_returns(episodes[0], gamma=0.9, unknown=0.9**4)
    assert len(observations) == len(returns) == (5 if ends else 2)
    assert returns[0] == pytest.approx(sum(0.9**k * reward for k, reward in enumerate(episodes[0].rewards)))
    assert returns[0] == pytest.approx(episodes[0].rewards[0] + 0.9 * returns[1])


def test_a_batch_that_is_not_finite_ends_the_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model(Falling(length=5)).learn(60)
    monkeypatch.setattr(PolyGRAD, "resume", lambda *args, **kwargs: model)
    monkeypatch.setattr(PolyGRAD, "_learn_from", lambda *args: "the imagined trajectories")
    monkeypatch.setattr(long_run.gym, "make", lambda _: Falling(length=5))
    args = argparse.Namespace(env="", checkpoint="", seeds=[0], updates=2, every=1, episodes=1, states=4, steps=4, threads=1)
    args.out = tmp_path / "study"
    with pytest.raises(ValueError, match="update 1: the imagined trajectories were not finite"):
        long_run.study(args)
    assert len((tmp_path / "study.csv").read_text().splitlines()) == 2, "what was measured is kept"


def test_without_a_known_return_it_says_so() -> None:
    model = tiny_model(PointEnv(), gamma=0.99)
    with pytest.raises(ValueError, match=r"the time limit is too short for gamma=0\.99"):
        measure(model, PointEnv(length=5), n_episodes=2, n_states=4, n_steps=4)


def test_measuring_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learnt = []
    for every in (1, 2):
        model = tiny_model(Falling(length=5)).learn(60)
        monkeypatch.setattr(PolyGRAD, "resume", lambda *args, model=model, **kwargs: model)
        monkeypatch.setattr(long_run.gym, "make", lambda _: Falling(length=5))
        args = dict(env="", checkpoint="", seeds=[0], updates=2, every=every, episodes=1, states=4, steps=4, threads=1)
        long_run.study(argparse.Namespace(**args, out=tmp_path / "a_0.5"))
        learnt.append(th.cat([parameter.flatten() for parameter in model.policy.parameters()]))
    assert th.equal(*learnt) and (tmp_path / "a_0.5.csv").is_file()


def test_measure_has_all_columns() -> None:
    model = tiny_model(Falling(length=5)).learn(60)
    row = measure(model, Falling(length=5), n_episodes=2, n_states=16, n_steps=20)
    assert set(row) == {"value", "imagined", "real", "episode_return", "episode_length"}
    assert all(th.tensor(value).isfinite() for value in row.values())
