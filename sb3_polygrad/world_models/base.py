"""The contract of a world model. Nothing here knows Stable-Baselines3."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch as th
from torch import nn
from torch.distributions import Distribution

from sb3_polygrad.common.trajectory import Trajectory

PolicyFn = Callable[[th.Tensor], Distribution]
"""Observations ``(..., obs_dim)`` in the environment's units to the policy's distribution, ``(..., action_dim)``."""

Metrics = dict[str, th.Tensor]
"""Scalar tensors to log, detached, on the device."""


class WorldModel(nn.Module, ABC):
    """
    A model of an environment's dynamics, rewards and terminations.

    All tensors that go in and come out are in the environment's units; each model normalises internally. A world model is
    saved and restored through its ``state_dict`` (statistics and controllers included) and that of its ``optimizer``. Random
    numbers come from torch's global generator.

    :param obs_dim: length of an observation
    :param action_dim: length of an action
    :param horizon: steps of the trajectories that it imagines
    :param window: steps of the segments that :meth:`fit` takes; ``horizon`` if not given
    """

    optimizer: th.optim.Optimizer
    differentiable: bool = False
    """Whether ``imagine(..., differentiable=True)`` is possible: a property of the class, not of its settings."""

    def __init__(self, obs_dim: int, action_dim: int, horizon: int, window: int | None = None) -> None:
        super().__init__()
        self.obs_dim, self.action_dim, self.horizon = obs_dim, action_dim, horizon
        self.window = horizon if window is None else window

    @abstractmethod
    def observe(self, steps: Trajectory) -> None:
        """
        Take note of new real steps, each shown once (running statistics).

        :param steps: segments of one step, ``(n, 1)``
        """

    @abstractmethod
    def fit(self, segments: Trajectory) -> Metrics:
        """
        One gradient step on real segments.

        :param segments: of ``window`` steps, ``(batch, window)``
        :return: scalars to log; ``"loss"`` is one of them, and ``"skipped"`` may be: 1 if the gradient was not finite, and the
            step not taken
        """

    @abstractmethod
    def imagine(self, start: th.Tensor, policy: PolicyFn, *, differentiable: bool = False) -> Trajectory:
        """
        Imagine one trajectory of ``horizon`` steps from each start under a policy.

        :param start: ``(batch, obs_dim)``
        :param policy: observations to the distribution of actions
        :param differentiable: with gradients with respect to the actions. What is drawn without a gradient is not drawn then:
            ``terminals`` are the probabilities that a step that is taken ends the episode, and ``mask`` is the probability
            that it is taken. Else there are no gradients, and terminals are 0 or 1
        :return: the trajectories; actions as drawn, before clipping to the box. If the network fails numerically, rewards and
            observations are NaN, which the caller has to look for
        :raises RuntimeError: if the model was never fitted
        :raises ValueError: if gradients are asked for and the model has none
        """

    def adapt(self, imagined: Trajectory, policy: PolicyFn) -> Metrics:
        """
        Learn from the latest imagined batch how to follow the policy better (Algorithm 3, line 9). By default nothing.

        :param imagined: the batch
        :param policy: the policy that acted
        :return: scalars to log
        """
        return {}
