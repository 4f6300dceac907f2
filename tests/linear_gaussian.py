"""The linear-Gaussian system of the studies in torch, and its true distribution at every step."""

from __future__ import annotations

import torch as th
from torch.distributions import Normal

from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.study.linear_gaussian import CONTROL, NOISE_STD, TRANSITION
from sb3_polygrad.world_models.base import PolicyFn


class LinearGaussianSystem:
    """``s' = A s + B a + N(0, Q)`` under policies ``a ~ N(G s, σ²)``; no action is ever clipped, nothing terminates."""

    def __init__(self) -> None:
        self.transition, self.control = th.as_tensor(TRANSITION).float(), th.as_tensor(CONTROL).float()
        self.noise_std = th.as_tensor(NOISE_STD).float()
        self.gain = th.tensor([[-0.4, -0.6]])  # G
        self.action_low, self.action_high = th.tensor([-20.0]), th.tensor([20.0])

    def policy(self, std: float) -> PolicyFn:
        """The linear policy with this standard deviation."""

        def policy(observations: th.Tensor) -> Normal:
            mean = observations @ self.gain.T
            return Normal(mean, th.full_like(mean, std), validate_args=False)

        return policy

    def imagine(self, start: th.Tensor, horizon: int, std: float) -> Trajectory:
        """True trajectories, as a perfect world model would imagine them."""
        states, actions = [start], []
        for _ in range(horizon):
            actions.append(self.policy(std)(states[-1]).sample())
            noise = self.noise_std * th.randn_like(start)
            states.append(states[-1] @ self.transition.T + actions[-1] @ self.control.T + noise)
        observations, ones = th.stack(states, dim=1), th.ones(len(start), horizon)
        rewards = -observations[:, 1:].square().sum(dim=-1)
        return Trajectory(observations, th.stack(actions, dim=1), rewards, 0.0 * ones, ones)

    def moments(self, start: th.Tensor, horizon: int, std: float) -> tuple[th.Tensor, th.Tensor]:
        """Means ``(batch, horizon, 2)`` and covariances ``(horizon, 2, 2)`` of the states after 1, 2, … steps: a Gaussian."""
        closed_loop = self.transition + self.control @ self.gain
        added = self.control @ self.control.T * std**2 + self.noise_std.square().diag()
        mean, covariance = start, th.zeros(2, 2)
        means, covariances = [], []
        for _ in range(horizon):
            mean, covariance = mean @ closed_loop.T, closed_loop @ covariance @ closed_loop.T + added
            means.append(mean)
            covariances.append(covariance)
        return th.stack(means, dim=1), th.stack(covariances)
