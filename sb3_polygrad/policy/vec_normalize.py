"""VecNormalize's view of imagined data, on the device."""

from __future__ import annotations

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize


class VecNormalizeView:
    """
    Applies the present statistics of a ``VecNormalize`` wrapper to tensors.

    The world model lives in the environment's units; a policy trained under ``VecNormalize`` sees normalised observations
    and rewards. Without a wrapper (None) nothing is changed.

    :param wrapper: the wrapper of the training environment, or None
    :param device: device of the tensors
    """

    def __init__(self, wrapper: VecNormalize | None, device: th.device) -> None:
        self.wrapper = wrapper
        self.mean = self.std = th.zeros(0)
        self.reward_scale = 1.0
        if wrapper is None:
            return
        if wrapper.norm_obs:
            statistics = wrapper.obs_rms
            assert isinstance(statistics, RunningMeanStd), "Dict observations are refused at construction"
            self.mean = self._tensor(statistics.mean, device)
            self.std = self._tensor(np.sqrt(statistics.var + wrapper.epsilon), device)
        self.reward_scale = float(np.sqrt(wrapper.ret_rms.var + wrapper.epsilon))

    @staticmethod
    def _tensor(values: np.ndarray, device: th.device) -> th.Tensor:
        return th.as_tensor(np.asarray(values, dtype=np.float32).reshape(-1), device=device)

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
