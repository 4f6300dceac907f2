"""What really happens from stored simulator states, under given actions or under a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th

from sb3_polygrad.common.trajectory import Trajectory, mask_after_ending
from sb3_polygrad.world_models.base import PolicyFn


class Starts(NamedTuple):
    """
    States that trajectories begin in.

    :param observations: ``(n, obs_dim)``
    :param qpos: ``(n, n_positions)`` of the simulator
    :param qvel: ``(n, n_velocities)`` of the simulator
    """

    observations: th.Tensor
    qpos: np.ndarray
    qvel: np.ndarray

    def take(self, chosen: np.ndarray) -> Starts:
        """Those with the given indices."""
        return Starts(self.observations[chosen], self.qpos[chosen], self.qvel[chosen])


class Simulator:
    """
    A MuJoCo environment (or one with its ``set_state(qpos, qvel)``) that is put into stored states.

    The warm start of the contact solver (the contact forces of the step before) is not part of a state, so a replayed step
    equals the real one up to the tolerance of the solver, not to the last bit.

    :param env_id: environment; its time limit is not applied
    """

    def __init__(self, env_id: str) -> None:
        self.env: Any = gym.make(env_id).unwrapped
        self.env.reset(seed=0)
        box: Any = self.env.action_space
        self.action_low, self.action_high = (th.as_tensor(bound).float() for bound in (box.low, box.high))

    def replay(self, starts: Starts, actions: th.Tensor) -> Trajectory:
        """What the environment returns to given actions ``(batch, horizon, action_dim)``, clipped to its box."""
        return self._run(starts, actions.shape[1], lambda index, t, _: actions[index, t])

    @th.no_grad()
    def follow(self, starts: Starts, policy: PolicyFn, horizon: int) -> Trajectory:
        """What the environment returns to the actions of a policy; the trajectory has them as drawn, before clipping."""
        return self._run(starts, horizon, lambda _index, _t, observation: policy(observation[None]).sample()[0])

    def _run(self, starts: Starts, horizon: int, act: Callable[[int, int, th.Tensor], th.Tensor]) -> Trajectory:
        """Steps after an ending repeat its observation, with reward 0 and terminal 1, as real segments do."""
        self.env.reset(seed=int(th.randint(2**31, ())))  # noise of the environment itself, if it has any
        batch = len(starts.observations)
        observations = starts.observations[:, None].repeat(1, horizon + 1, 1)
        actions = th.zeros(batch, horizon, len(self.action_low))
        rewards, terminals = th.zeros(batch, horizon), th.zeros(batch, horizon)
        for index in range(batch):
            self.env.set_state(starts.qpos[index], starts.qvel[index])
            for t in range(horizon):
                actions[index, t] = act(index, t, observations[index, t])
                clipped = actions[index, t].clamp(self.action_low, self.action_high).numpy()
                observation, reward, ended, _, _ = self.env.step(clipped)
                observations[index, t + 1 :] = th.as_tensor(observation)
                rewards[index, t] = float(reward)
                if ended:
                    terminals[index, t:] = 1.0
                    break
        return Trajectory(observations, actions, rewards, terminals, mask_after_ending(terminals))
