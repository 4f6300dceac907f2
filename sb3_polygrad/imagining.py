"""Imagined trajectories under the present policy: Algorithm 3, line 7."""

from __future__ import annotations

import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch.distributions import Normal

from sb3_polygrad.core.capture import Captured
from sb3_polygrad.core.on_policy import standardized_actions
from sb3_polygrad.core.trajectory import Trajectory
from sb3_polygrad.core.trajectory_buffer import TrajectoryBuffer
from sb3_polygrad.policy.policies import PolyGRADPolicy
from sb3_polygrad.policy.vec_normalize import VecNormalizeView
from sb3_polygrad.world_models.base import WorldModel


class Imagining(OnPolicyAlgorithm):
    """How PolyGRAD imagines; :class:`~sb3_polygrad.PolyGRAD` is the algorithm."""

    policy: PolyGRADPolicy
    replay_buffer: TrajectoryBuffer
    world_model: WorldModel
    cuda_graphs: bool
    _kept_view: VecNormalizeView | None
    _imagining: Captured
    _seen_normalized: bool

    def imagine(self, n_trajectories: int, start: th.Tensor | None = None) -> Trajectory:
        """
        Imagine trajectories under the present policy (Algorithm 3, line 7).

        :param n_trajectories: how many
        :param start: ``(n_trajectories, obs_dim)`` start observations in the environment's units; drawn from
            ``replay_buffer`` if not given
        :return: the trajectories, in the environment's units, on the device
        :raises RuntimeError: if the world model was not fitted yet, or the ``VecNormalize`` that the policy needs is missing
        :raises ValueError: if ``start`` has another length
        """
        view = self._ready_to_imagine()
        if start is None:
            start = self.replay_buffer.sample_observations(n_trajectories)
        elif len(start) != n_trajectories:
            raise ValueError(f"start has {len(start)} observations, but n_trajectories={n_trajectories}: they must agree")
        start = start.to(self.device)
        if not (self.cuda_graphs and self.world_model.capturable):
            return self._imagine_from(start)
        return self._imagining(start, key=view.settings)

    def _imagine_expected(self, n_trajectories: int) -> Trajectory:
        """The same with gradients, from start observations of ``replay_buffer``: the world model's ``imagine_expected``."""
        imagine_expected = self.world_model.imagine_expected
        assert imagine_expected is not None, "_setup_model has seen to it"
        self._ready_to_imagine()
        start = self.replay_buffer.sample_observations(n_trajectories)
        return imagine_expected(start.to(self.device), self._imagined_policy)

    def _ready_to_imagine(self) -> VecNormalizeView:
        """Acting, not learning, and VecNormalize as it is now."""
        if self._seen_normalized and self._vec_normalize_env is None:
            raise RuntimeError("the policy was trained under VecNormalize: load the model with its environment to imagine")
        self.policy.set_training_mode(False)
        self.world_model.eval()
        return self._view

    def _imagine_from(self, start: th.Tensor) -> Trajectory:
        return self.world_model.imagine(start, self._imagined_policy)

    def _imagined_policy(self, observations: th.Tensor) -> Normal:
        """The policy at observations ``(..., obs_dim)`` in the environment's units."""
        assert self._kept_view is not None
        return self._distribution(self._kept_view.observations(observations))

    def _imagined_by(self) -> list[th.Tensor]:
        """All tensors that an imagined batch depends on, besides its start."""
        assert self._kept_view is not None
        policy = (*self.policy.parameters(), *self.policy.buffers(), self._kept_view.mean, self._kept_view.std)
        return [*self.world_model.imagined_by(), *policy]

    def standardized_actions(self, trajectory: Trajectory) -> th.Tensor:
        """
        Eq. 9 for imagined actions under the present policy: independent N(0, 1) if they are its draws.

        :param trajectory: as :meth:`imagine` returned it
        :return: ``(batch, horizon, action_dim)``
        """
        with th.no_grad():
            normal = self._distribution(self._view.observations(trajectory.observations[:, :-1]))
        return standardized_actions(trajectory, normal.mean, normal.stddev)

    @property
    def _view(self) -> VecNormalizeView:
        """VecNormalize as it is now; the same tensors every time, as long as the environment has the same wrapper."""
        if self._kept_view is None or self._kept_view.wrapper is not self._vec_normalize_env:
            self._kept_view = VecNormalizeView(self._vec_normalize_env, self.device)
        self._kept_view.refresh()
        return self._kept_view

    def _distribution(self, observations: th.Tensor) -> Normal:
        """The policy at observations ``(..., obs_dim)`` as it sees them, shaped ``(..., action_dim)``."""
        lead = observations.shape[:-1]
        normal = self.policy.get_distribution(self._to_policy(observations)).distribution
        assert isinstance(normal, Normal)
        return Normal(normal.mean.view(*lead, -1), normal.stddev.view(*lead, -1), validate_args=False)

    def _to_policy(self, observations: th.Tensor) -> th.Tensor:
        """Flat observations ``(..., obs_dim)`` to the shape that the policy expects."""
        return observations.reshape(-1, *self.observation_space.shape)  # type: ignore[misc]
