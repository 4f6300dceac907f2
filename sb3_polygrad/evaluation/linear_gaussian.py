"""A stochastic environment whose true distribution is known at every step."""

from __future__ import annotations

import numpy as np
import torch as th
from torch.distributions import Normal

from sb3_polygrad.evaluation.dataset import Dataset
from sb3_polygrad.world_models.base import PolicyFn


class LinearGaussianSystem:
    """
    ``s' = A s + B a + N(0, Q)`` under policies ``a ~ N(G s, σ²)``: a damped rotation, pushed in its second coordinate.

    The actions' box is so wide that nothing is ever clipped. The reward is ``-|s'|²``; nothing ends.
    """

    def __init__(self) -> None:
        self.transition = th.tensor([[0.9, 0.3], [-0.2, 0.8]])  # A
        self.control = th.tensor([[0.0], [0.5]])  # B
        self.noise_std = th.tensor([0.2, 0.4])  # square roots of Q's diagonal
        self.gain = th.tensor([[-0.4, -0.6]])  # G
        self.action_low, self.action_high = th.tensor([-20.0]), th.tensor([20.0])

    def policy(self, std: float) -> PolicyFn:
        """The linear policy with this standard deviation."""

        def policy(observations: th.Tensor) -> Normal:
            mean = observations @ self.gain.T
            return Normal(mean, th.full_like(mean, std), validate_args=False)

        return policy

    def step(self, states: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Draw successors, ``(batch, 2)``."""
        noise = self.noise_std * th.randn_like(states)
        return states @ self.transition.T + actions @ self.control.T + noise

    def moments(self, start: th.Tensor, horizon: int, std: float) -> tuple[th.Tensor, th.Tensor]:
        """
        The true distribution of the states under a policy, a Gaussian.

        :param start: ``(batch, 2)``
        :param horizon: number of steps
        :param std: of the policy
        :return: means ``(batch, horizon, 2)`` and covariances ``(horizon, 2, 2)`` of the states after 1, 2, … steps
        """
        closed_loop = self.transition + self.control @ self.gain
        added = self.control @ self.control.T * std**2 + self.noise_std.square().diag()
        mean, covariance = start, th.zeros(2, 2)
        means, covariances = [], []
        for _ in range(horizon):
            mean, covariance = mean @ closed_loop.T, closed_loop @ covariance @ closed_loop.T + added
            means.append(mean)
            covariances.append(covariance)
        return th.stack(means, dim=1), th.stack(covariances)

    def collect(self, n_episodes: int, length: int, stds: tuple[float, ...]) -> Dataset:
        """
        Episodes from states around zero, each under a policy with one of several standard deviations.

        :param n_episodes: number of episodes
        :param length: steps in each, cut by a time limit
        :param stds: standard deviations of the policies, in turn
        """
        std = th.tensor(stds)[th.arange(n_episodes) % len(stds), None]
        states = 2.0 * th.randn(n_episodes, 2)
        observations, actions = [states], []
        for _ in range(length):
            actions.append(states @ self.gain.T + std * th.randn(n_episodes, 1))
            states = self.step(states, actions[-1])
            observations.append(states)
        path = th.stack(observations, dim=1)  # (episodes, length + 1, 2)
        before, after = path[:, :-1].flatten(0, 1).numpy(), path[:, 1:].flatten(0, 1).numpy()
        return Dataset(
            observations=before,
            actions=th.stack(actions, dim=1).flatten(0, 1).numpy(),
            rewards=-np.square(after).sum(axis=1),
            next_observations=after,
            terminated=np.zeros(len(before), dtype=bool),
            truncated=np.arange(1, len(before) + 1) % length == 0,
            simulator_states=before.astype(np.float64),
        )
