"""Real steps of the environments into the buffer: Algorithm 3, lines 4 and 5."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_polygrad.core.pace import PaceWarning
from sb3_polygrad.core.trajectory_buffer import TrajectoryBuffer
from sb3_polygrad.policy.imagined_rollout_buffer import ImaginedRolloutBuffer
from sb3_polygrad.policy.real_steps import has_simulator_states, simulator_states, true_successors


class Collecting(OnPolicyAlgorithm):
    """How PolyGRAD makes real steps; :class:`~sb3_polygrad.PolyGRAD` is the algorithm."""

    replay_buffer: TrajectoryBuffer
    learning_starts: int
    _last_original_obs: np.ndarray | None
    _n_updates: int
    _n_unobserved: int
    _rollout_step: int
    _in_step: bool
    _pace: PaceWarning
    _seen_normalized: bool

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        if self._in_step:
            self._last_obs = None  # the environments have moved on, no one knows where to
            self._in_step = False
        if reset_num_timesteps or self._last_obs is None:
            self.replay_buffer.interrupt()  # the environments are about to be reset
        if reset_num_timesteps:
            self._rollout_step = 0
        self._pace = PaceWarning()
        self._seen_normalized = self._vec_normalize_env is not None
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    @property
    def _in_prefill(self) -> bool:
        """Too little is known to learn from. (The buffer decides, not num_timesteps: a second learn() goes on at once.)"""
        buffer = self.replay_buffer
        capacity = buffer.capacity * buffer.n_envs
        if buffer.n_windows == 0 and len(buffer) >= min(2 * self.learning_starts, capacity):
            buffer.sample(1)  # says what is wrong
        return len(buffer) < min(self.learning_starts, capacity) or buffer.n_windows == 0

    def _act(self) -> np.ndarray:
        """Actions for the present observations, before clipping: random until something was learnt."""
        if self._in_prefill and self._n_updates == 0:
            return np.array([self.action_space.sample() for _ in range(self.n_envs)])
        with th.no_grad():
            actions = self.policy._predict(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        return actions.cpu().numpy().reshape(-1, *self.action_space.shape)  # type: ignore[misc]

    def collect_rollouts(  # type: ignore[override]
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: ImaginedRolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Real steps into ``replay_buffer`` (Algorithm 3, lines 4 and 5); ``rollout_buffer`` is left alone.

        :param env: the training environment
        :param callback: called after each step
        :param rollout_buffer: unused, holds imagined data
        :param n_rollout_steps: steps per environment
        :return: False if the callback asked to stop
        :raises ValueError: if the environment produces a value that is not finite; nothing of that step is stored
        """
        assert self._last_obs is not None, "No previous observation was provided"
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        readable = has_simulator_states(env)
        while self._rollout_step < n_rollout_steps:  # after an interruption, what is left of them
            actions = self._act()
            clipped_actions = np.clip(actions, self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]
            states = simulator_states(env) if readable else None
            self._in_step = True
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += env.num_envs
            # Stored before the callback may stop the run or save it: no real step is lost.
            self._store_steps(clipped_actions, new_obs, rewards, dones, infos, states)  # type: ignore[arg-type]
            self._update_info_buffer(infos, dones)
            self._rollout_step += 1
            self._in_step = False
            callback.update_locals(locals())
            if not callback.on_step():
                return False
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _store_steps(
        self,
        actions: np.ndarray,
        new_obs: np.ndarray,
        rewards: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
        states: np.ndarray | None,
    ) -> None:
        """One step of every environment into the buffer, in the environment's own units."""
        wrapper = self._vec_normalize_env
        if wrapper is None:
            self._last_original_obs, new_original_obs = self._last_obs, new_obs  # type: ignore[assignment]
        else:
            new_original_obs, rewards = wrapper.get_original_obs(), wrapper.get_original_reward()  # type: ignore[assignment]
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos]) & dones
        try:
            self.replay_buffer.add(
                self._last_original_obs.reshape(self.n_envs, -1),  # type: ignore[union-attr]
                actions.reshape(self.n_envs, -1),
                rewards,
                true_successors(new_original_obs, dones, infos, wrapper).reshape(self.n_envs, -1),
                dones & ~truncated,
                truncated,
                states,
            )
        except ValueError:
            self._last_obs = None  # the environments have moved on: whoever goes on after this error begins with a reset
            raise
        self._n_unobserved += 1
        self._last_obs, self._last_original_obs, self._last_episode_starts = new_obs, new_original_obs, dones
