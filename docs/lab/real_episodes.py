"""A policy acting in the environment itself, for studies that hold imagined trajectories against what comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from sb3_polygrad.polygrad import PolyGRAD


class Episode(NamedTuple):
    """
    :param observations: ``(n, *observation_shape)`` that the policy acted in
    :param rewards: ``(n,)`` of the steps from there
    :param terminated: whether it ended by a terminal, and not by a time limit
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: bool


def real_episodes(model: PolyGRAD, env: gym.Env, n_episodes: int, max_steps: int = 10_000) -> Iterator[Episode]:
    """
    :param model: whose policy acts, with its noise
    :param env: where; the k-th episode is begun with seed k
    :param n_episodes: how many
    :param max_steps: an episode is cut after so many, as by a time limit
    """
    for seed in range(n_episodes):
        observation, _ = env.reset(seed=seed)
        observations, rewards, terminated = [], [], False
        for _ in range(max_steps):
            observations.append(observation)
            action, _ = model.predict(observation, deterministic=False)
            observation, reward, terminated, truncated, _ = env.step(action)
            rewards.append(float(reward))
            if terminated or truncated:
                break
        yield Episode(np.array(observations), np.array(rewards), terminated)
