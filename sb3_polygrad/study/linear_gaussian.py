"""A stochastic environment whose true distribution is known at every step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np

TRANSITION = np.array([[0.9, 0.3], [-0.2, 0.8]])  # A
CONTROL = np.array([[0.0], [0.5]])  # B
NOISE_STD = np.array([0.2, 0.4])  # square roots of Q's diagonal


class LinearGaussianEnv(gym.Env):
    """
    ``s' = A s + B a + N(0, Q)``: a damped rotation, pushed in its second coordinate.

    The reward is ``-|s'|²``; no episode terminates. Its state is stored and restored as that of a MuJoCo environment.
    """

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-20.0, 20.0, (1,), np.float32)  # so wide that nothing is ever clipped
        self.data = SimpleNamespace(qpos=np.zeros(1), qvel=np.zeros(1))

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Put the system into a state, as ``gymnasium.envs.mujoco.MujocoEnv.set_state`` does."""
        self.data.qpos, self.data.qvel = qpos.copy(), qvel.copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin in a random state around zero."""
        super().reset(seed=seed)
        state = 2.0 * self.np_random.normal(size=2)
        self.set_state(state[:1], state[1:])
        return state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step of the system, with noise from the environment's own generator."""
        state = np.concatenate([self.data.qpos, self.data.qvel])
        state = TRANSITION @ state + CONTROL @ action + NOISE_STD * self.np_random.normal(size=2)
        self.set_state(state[:1], state[1:])
        return state, -float(np.square(state).sum()), False, False, {}
