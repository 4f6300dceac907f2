"""A policy acting in the environment itself, for studies that hold imagined trajectories against what comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from sb3_polygrad.polygrad import PolyGRAD


class Episode(NamedTuple):
    """
    :param observations: ``(n, obs_dim)`` that the policy acted in
    :param rewards: ``(n,)`` of the steps from there
    :param terminated: whether it ended by a terminal, and not by a time limit
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: bool


def real_episodes(model: PolyGRAD, env: gym.Env, n_episodes: int) -> Iterator[Episode]:
    """
    :param model: whose policy acts, with its noise
    :param env: where; the k-th episode is begun with seed k
    :param n_episodes: how many
    """
    for seed in range(n_episodes):
        observation, _ = env.reset(seed=seed)
        observations, rewards, terminated, truncated = [], [], False, False
        while not (terminated or truncated):
            observations.append(observation)
            action, _ = model.predict(observation, deterministic=False)
            observation, reward, terminated, truncated, _ = env.step(action)
            rewards.append(float(reward))
        yield Episode(np.array(observations), np.array(rewards), terminated)
