"""VecNormalize's view of imagined data, on the device."""

from __future__ import annotations

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_polygrad.core.transfer import to_device


class VecNormalizeView:
    """
    Applies the statistics of a ``VecNormalize`` wrapper to tensors, as they were at the latest :meth:`refresh`.

    The world model lives in the environment's units; a policy trained under ``VecNormalize`` sees normalised observations
    and rewards. Without a wrapper (None) nothing is changed. The view's tensors stay where they are when refreshed.

    :param wrapper: the wrapper of the training environment, or None
    :param device: device of the tensors
    """

    def __init__(self, wrapper: VecNormalize | None, device: th.device) -> None:
        self.wrapper = wrapper
        self.mean = self.std = th.zeros(0)
        self.reward_scale = th.ones((), device=device)
        if wrapper is not None and wrapper.norm_obs:
            n = int(np.prod(wrapper.observation_space.shape))  # type: ignore[arg-type]
            self.mean, self.std = th.zeros(n, device=device), th.ones(n, device=device)
        self.refresh()

    @property
    def settings(self) -> tuple[bool, float] | None:
        """What :meth:`observations` does with them: whether it normalises, and where it clips."""
        return None if self.wrapper is None else (self.wrapper.norm_obs, self.wrapper.clip_obs)

    def refresh(self) -> None:
        """Take the wrapper's present statistics."""
        wrapper = self.wrapper
        if wrapper is None:
            return
        if wrapper.norm_obs:
            statistics = wrapper.obs_rms
            assert isinstance(statistics, RunningMeanStd), "Dict observations are refused at construction"
            self._write(self.mean, statistics.mean)
            self._write(self.std, np.sqrt(statistics.var + wrapper.epsilon))
        self._write(self.reward_scale, np.sqrt(wrapper.ret_rms.var + wrapper.epsilon))

    @staticmethod
    def _write(tensor: th.Tensor, values: np.ndarray | float) -> None:
        tensor.copy_(to_device(np.asarray(values, dtype=np.float32).reshape(tensor.shape), tensor.device))

    def observations(self, observations: th.Tensor) -> th.Tensor:
        """Environment units ``(..., obs_dim)`` to what the policy sees."""
        if self.wrapper is None or not self.wrapper.norm_obs:
            return observations
        clip = self.wrapper.clip_obs
        return ((observations - self.mean) / self.std).clamp(-clip, clip)

    def rewards(self, rewards: th.Tensor) -> th.Tensor:
        """Environment units to what the critic learns from."""
        if self.wrapper is None or not self.wrapper.norm_reward:
            return rewards
        clip = self.wrapper.clip_reward
        return (rewards / self.reward_scale).clamp(-clip, clip)
