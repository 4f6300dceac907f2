"""A real step as the buffer keeps it: in the environment's units, with its true successor."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecNormalize


def real_step(
    obs: np.ndarray,
    original_obs: np.ndarray | None,
    actions: np.ndarray,
    new_obs: np.ndarray,
    rewards: np.ndarray,
    dones: np.ndarray,
    infos: list[dict[str, Any]],
    wrapper: VecNormalize | None,
) -> tuple[np.ndarray, ...]:
    """
    The arguments of :meth:`EpisodeBuffer.add` from one step of a ``VecEnv``.

    Observations and actions are ``(n_envs, ...)``, rewards and dones ``(n_envs,)``.

    :param obs: in which was acted, as the policy saw them; ``original_obs`` in the environment's units, under ``VecNormalize``
    :param new_obs: after the step; where done, the first of the next episode
    :param wrapper: ``VecNormalize`` around the environments, if there is one
    :return: observations, actions, rewards, next observations, terminated, truncated
    """
    n_envs = len(dones)
    if wrapper is not None:
        assert original_obs is not None
        obs, new_obs, rewards = original_obs, wrapper.get_original_obs(), wrapper.get_original_reward()  # type: ignore[assignment]
    successors = np.array(new_obs)
    for index in np.flatnonzero(dones):
        # Environments reset themselves; the observation that ended the episode is in their info. VecNormalize has normalised
        # and clipped it: as in SB3's off-policy algorithms, what was clipped stays so.
        last = infos[index]["terminal_observation"]
        successors[index] = last if wrapper is None else wrapper.unnormalize_obs(last)
    truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos]) & dones
    flat = [values.reshape(n_envs, -1) for values in (obs, actions, successors)]
    return flat[0], flat[1], rewards, flat[2], dones & ~truncated, truncated
