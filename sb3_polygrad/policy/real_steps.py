"""What vectorised environments hide: true successors at the end of an episode, and simulator states."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecNormalize


def true_successors(
    new_obs: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]], wrapper: VecNormalize | None
) -> np.ndarray:
    """
    Environments reset themselves at the end of an episode; the observation that ended it is in their info.

    :param new_obs: ``(n_envs, ...)`` after the step, in the environment's units; first of the next episode where done
    :param dones: ``(n_envs,)``
    :param infos: one per environment
    :param wrapper: ``VecNormalize`` around the environments, if there is one: it has normalised those last observations, and
        clipped them; as in SB3's off-policy algorithms, what was clipped stays so
    :return: ``(n_envs, ...)`` observations that the actions led to
    """
    successors = np.array(new_obs)
    for index in np.flatnonzero(dones):
        last = infos[index]["terminal_observation"]
        successors[index] = last if wrapper is None else wrapper.unnormalize_obs(last)
    return successors


def has_simulator_states(env: VecEnv) -> bool:
    """Whether the environments are MuJoCo's, whose states can be read. (Asks every environment: not on every step.)"""
    return env.has_attr("state_vector") and env.has_attr("set_state")


def simulator_states(env: VecEnv) -> np.ndarray:
    """
    Positions and velocities of MuJoCo environments, so that imagined trajectories can be checked by replaying them.

    :param env: the environments
    :return: ``(n_envs, state_dim)``
    """
    return np.stack(env.env_method("state_vector"))
