"""Imagined endings beside real ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sb3_polygrad import PolyGRAD
from sb3_polygrad.evaluation.endings import measure, real_steps
from sb3_polygrad.evaluation.real_episodes import real_episodes
from sb3_polygrad.world_models.standardized import StandardizedWorldModel
from tests.toys import PointEnv


class Falling(PointEnv):
    """What would be its time limit is a terminal."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, _, fallen, info = super().step(action)
        return observation, reward, fallen, False, info


@pytest.mark.parametrize(("env", "expected"), [(Falling, [5, 4, 3, 2, 1]), (PointEnv, [np.inf] * 5)])
def test_real_steps_know_how_far_their_ending_is(env: type[PointEnv], expected: list[float]) -> None:
    model = PolyGRAD("MlpPolicy", env(length=5), seed=0, device="cpu")
    observations, until_ending = real_steps(model, env(length=5), n_episodes=2)
    assert observations.shape == (10, 1)
    assert until_ending.tolist() == expected * 2, "a time limit is no ending"


def test_an_episode_without_an_end_is_cut() -> None:
    model = PolyGRAD("MlpPolicy", PointEnv(length=5), seed=0, device="cpu")
    episodes = list(real_episodes(model, PointEnv(length=10**9), n_episodes=2, max_steps=7))
    assert [(len(episode.rewards), episode.terminated) for episode in episodes] == [(7, False)] * 2


def test_shares_are_shares_and_the_model_is_left_as_it_was() -> None:
    model = PolyGRAD("MlpPolicy", PointEnv(length=7), seed=0, learning_starts=50, horizon=4, n_imagined=8, device="cpu")
    model.learn(60)
    shares = measure(model, PointEnv(length=7), n_episodes=3, n_trajectories=50)
    assert set(shares) == {"real", "drawn", "cut"} and all(0.0 <= share <= 1.0 for share in shares.values())
    assert isinstance(model.world_model, StandardizedWorldModel) and model.world_model.ending_is_probability
