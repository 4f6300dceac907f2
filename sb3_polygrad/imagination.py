"""Imagined trajectories: a world model, a policy that acts in it, and VecNormalize between the two."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch.distributions import Normal

from sb3_polygrad.common.trajectory import Trajectory, all_finite
from sb3_polygrad.common.transfer import to_device
from sb3_polygrad.episode_buffer import EpisodeBuffer
from sb3_polygrad.policies import PolyGRADPolicy
from sb3_polygrad.world_models.base import WorldModel


class ImaginedBatch(NamedTuple):
    """
    Imagined trajectories, in the environment's units and in those of the policy.

    :param trajectory: in the environment's units
    :param observations: ``(batch, horizon + 1, *observation_shape)`` as the policy sees them
    :param rewards: ``(batch, horizon)`` in the units of the critics
    """

    trajectory: Trajectory
    observations: th.Tensor
    rewards: th.Tensor

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite. The host waits for the device here."""
        return all_finite(self.trajectory)

    def detach(self) -> ImaginedBatch:
        """The same values without gradients."""
        trajectory = Trajectory(*(tensor.detach() for tensor in self.trajectory))
        return ImaginedBatch(trajectory, self.observations.detach(), self.rewards.detach())

    def summary(self) -> dict[str, th.Tensor]:
        """Scalars to log, on the device."""
        rewards, terminals, mask = (tensor.detach() for tensor in self.trajectory[2:])
        n_steps = mask.sum()
        return {
            "reward_mean": (rewards * mask).sum() / n_steps,
            "terminal_rate": (terminals * mask).sum() / n_steps,
            "horizon_mean": n_steps / len(mask),
        }


class Imagination:
    """
    Lets the policy act in the world model (Algorithm 3, line 7).

    The world model is in the environment's units; a policy that is trained under ``VecNormalize`` sees normalised observations
    and rewards. :meth:`sync` takes the wrapper's statistics; they stay as they are until the next call.

    :param world_model: what imagines
    :param policy: what acts
    """

    def __init__(self, world_model: WorldModel, policy: PolyGRADPolicy) -> None:
        self.world_model, self.policy = world_model, policy
        self._obs_statistics: tuple[th.Tensor, th.Tensor, float] | None = None  # mean, std, clip
        self._reward_statistics: tuple[float, float] | None = None  # scale, clip

    def sync(self, wrapper: VecNormalize | None) -> None:
        """
        Take the present statistics of a ``VecNormalize`` wrapper.

        :param wrapper: of the training environment, or None
        """
        self._obs_statistics = self._reward_statistics = None
        if wrapper is None:
            return
        if wrapper.norm_obs:
            statistics = wrapper.obs_rms
            assert isinstance(statistics, RunningMeanStd), "Dict observations are refused at construction"
            mean, std = (
                to_device(np.asarray(values, dtype=np.float32).flatten(), self.policy.device)
                for values in (statistics.mean, np.sqrt(statistics.var + wrapper.epsilon))
            )
            self._obs_statistics = mean, std, wrapper.clip_obs
        if wrapper.norm_reward:
            self._reward_statistics = float(np.sqrt(wrapper.ret_rms.var + wrapper.epsilon)), wrapper.clip_reward

    def __call__(self, start: th.Tensor, differentiable: bool = False) -> ImaginedBatch:
        """
        Imagine one trajectory from each start under the present policy.

        :param start: ``(batch, obs_dim)`` observations, in the environment's units
        :param differentiable: with gradients with respect to the actions, see :meth:`WorldModel.imagine`
        """
        self.policy.set_training_mode(False)
        self.world_model.eval()
        trajectory = self.world_model.imagine(start, self.policy_at, differentiable=differentiable)
        observations = self._normalized(trajectory.observations)
        observations = observations.unflatten(2, self.policy.observation_space.shape)  # type: ignore[arg-type]
        rewards = trajectory.rewards
        if self._reward_statistics is not None:
            scale, clip = self._reward_statistics
            rewards = (rewards / scale).clamp(-clip, clip)
        return ImaginedBatch(trajectory, observations, rewards)

    def policy_at(self, observations: th.Tensor) -> Normal:
        """
        The policy's distribution of actions.

        :param observations: ``(..., obs_dim)``, in the environment's units
        :return: of shape ``(..., action_dim)``
        """
        lead = observations.shape[:-1]
        seen = self._normalized(observations).reshape(-1, *self.policy.observation_space.shape)  # type: ignore[misc]
        normal = self.policy.get_distribution(seen).distribution
        assert isinstance(normal, Normal)
        return Normal(normal.mean.view(*lead, -1), normal.stddev.view(*lead, -1), validate_args=False)

    def _normalized(self, observations: th.Tensor) -> th.Tensor:
        """Observations ``(..., obs_dim)`` in the units of the policy."""
        if self._obs_statistics is None:
            return observations
        mean, std, clip = self._obs_statistics
        return ((observations - mean) / std).clamp(-clip, clip)


class StartStates:
    """
    Where imagined trajectories start: from real observations, or from where trajectories of the last batch ended.

    Differentiable trajectories are short, since gradients through many steps say little. Continued a few times, they still
    visit the states that the present policy leads to. A trajectory whose episode ended is replaced by a real observation.

    :param n_continuations: times that a trajectory is continued before its place is given to a real observation; 0 for real
        observations alone (the paper)
    """

    def __init__(self, n_continuations: int) -> None:
        self.n_continuations = n_continuations
        self.ends = th.zeros(0)  # (n, obs_dim) last observations of the last batch
        self.ages = th.zeros(0)  # (n,) times that each trajectory was continued; infinite once its episode has ended

    def draw(self, buffer: EpisodeBuffer, n: int) -> th.Tensor:
        """
        Start states of the next batch.

        :param buffer: real observations
        :param n: how many
        :return: ``(n, obs_dim)`` in the environment's units
        """
        fresh = buffer.sample_observations(n)
        if self.n_continuations == 0:
            return fresh
        if self.ends.shape != fresh.shape:
            self.ages = th.zeros(n, device=fresh.device)
            return fresh
        is_over = self.ages > self.n_continuations
        self.ages = th.where(is_over, th.zeros_like(self.ages), self.ages)
        self.ends = th.where(is_over[:, None], fresh, self.ends)  # also for a batch that is not kept
        return self.ends

    @th.no_grad()
    def keep(self, imagined: Trajectory) -> None:
        """
        Keep where the trajectories of a batch ended.

        :param imagined: a batch that started from :meth:`draw`
        """
        if self.n_continuations == 0:
            return
        goes_on = imagined.mask[:, -1] * (1.0 - imagined.terminals[:, -1])  # a probability, where endings are
        self.ends = imagined.observations[:, -1].detach().clone()
        self.ages = th.where(th.rand_like(goes_on) < goes_on, self.ages + 1.0, th.inf)

    def state_dict(self) -> dict[str, th.Tensor]:
        """What the next batch depends on."""
        return {"ends": self.ends, "ages": self.ages}

    def load_state_dict(self, state: dict[str, th.Tensor], device: th.device) -> None:
        """
        :param state: from :meth:`state_dict`
        :param device: where its tensors will be
        """
        self.ends, self.ages = state["ends"].to(device), state["ages"].to(device)
