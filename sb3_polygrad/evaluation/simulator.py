"""What really happens: imagined actions replayed in the simulator, from the state in which they were imagined."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending


class Simulator:
    """
    A MuJoCo environment that can be put into a stored state.

    The simulator's warm start (the contact forces of the step before) is not part of that state, so a replayed step equals
    the real one up to the tolerance of the contact solver, not to the last bit.

    :param env_id: environment; its time limit is not applied
    """

    def __init__(self, env_id: str) -> None:
        self.env: Any = gym.make(env_id).unwrapped
        self.env.reset(seed=0)
        box: Any = self.env.action_space
        self.action_low, self.action_high = (th.as_tensor(bound).float() for bound in (box.low, box.high))

    def replay(self, states: np.ndarray, actions: th.Tensor) -> Trajectory:
        """
        Steps after an ending repeat its observation, with reward 0 and terminal 1, as real windows do.

        :param states: ``(batch, state_dim)`` positions and velocities to start from
        :param actions: ``(batch, horizon, action_dim)``, clipped to the box here
        :return: what the environment answers; observation 0 is not the environment's answer, and stays zero
        """
        batch, horizon, _ = actions.shape
        clipped = actions.clamp(self.action_low, self.action_high).numpy()
        observations = np.zeros((batch, horizon + 1, self.env.observation_space.shape[0]), dtype=np.float32)
        rewards, terminals = (np.zeros((batch, horizon), dtype=np.float32) for _ in range(2))
        n_positions = self.env.model.nq
        for index, state in enumerate(states):
            self.env.set_state(state[:n_positions], state[n_positions:])
            for t in range(horizon):
                observation, rewards[index, t], ended, _, _ = self.env.step(clipped[index, t])
                observations[index, t + 1] = observation
                if ended:
                    observations[index, t + 2 :] = observation
                    terminals[index, t:] = 1.0
                    break
        ends = th.as_tensor(terminals)
        return Trajectory(th.as_tensor(observations), actions, th.as_tensor(rewards), ends, mask_after_ending(ends))
