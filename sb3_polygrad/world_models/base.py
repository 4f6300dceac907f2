"""The contract of a world model. Nothing here knows Stable-Baselines3."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import torch as th
from torch import nn
from torch.distributions import Distribution

from sb3_polygrad.core.trajectory import Trajectory

PolicyFn = Callable[[th.Tensor], Distribution]
"""Observations ``(..., obs_dim)`` in the environment's units to the policy's distribution, ``(..., action_dim)``."""


class Context(NamedTuple):
    """
    The real steps that led to the start of imagined trajectories, the latest last.

    :param observations: ``(batch, n_steps, obs_dim)`` in which was acted; the start is the one after them
    :param actions: ``(batch, n_steps, action_dim)`` as the environment received them
    """

    observations: th.Tensor
    actions: th.Tensor


class Imagine(Protocol):
    """See :meth:`WorldModel.imagine`."""

    def __call__(self, start: th.Tensor, policy: PolicyFn, context: Context | None = None) -> Trajectory: ...


class WorldModel(nn.Module, ABC):
    """
    A model of an environment's dynamics, rewards and endings.

    All tensors that go in and come out are in the environment's units; how they are standardised is the model's affair.
    Being an ``nn.Module``, it is saved and restored through its ``state_dict`` (statistics and controllers included) and
    the one of its ``optimizer``. Random numbers come from torch's global generator.

    :param obs_dim: length of an observation
    :param action_dim: length of an action
    :param horizon: steps of the trajectories that it imagines, of the windows it is fitted on, too, unless it says so
    """

    capturable: ClassVar[bool] = False
    """Whether :meth:`imagine` may be replayed as a CUDA graph: see :class:`~sb3_polygrad.core.capture.Captured`."""
    cuda_graphs: bool = True
    """Whether CUDA graphs are wanted; a model that captures its :meth:`fit` looks at it."""
    optimizer: th.optim.Optimizer
    window: int
    """Steps of the windows that :meth:`fit` takes."""

    def __init__(self, obs_dim: int, action_dim: int, horizon: int) -> None:
        super().__init__()
        self.obs_dim, self.action_dim, self.horizon = obs_dim, action_dim, horizon
        self.window = horizon

    def imagined_by(self) -> list[th.Tensor]:
        """All tensors that :meth:`imagine` depends on besides its arguments."""
        return [*self.parameters(), *self.buffers()]

    @abstractmethod
    def observe(self, observations: th.Tensor, next_observations: th.Tensor, actions: th.Tensor, outcomes: th.Tensor) -> None:
        """
        Take note of new real steps, each shown once (running statistics).

        :param observations: ``(n, obs_dim)`` in which was acted
        :param next_observations: ``(n, obs_dim)`` their successors
        :param actions: ``(n, action_dim)`` as the environment received them
        :param outcomes: ``(n, 2)`` rewards and terminals
        """

    @abstractmethod
    def fit(self, batch: Trajectory) -> dict[str, th.Tensor]:
        """
        One gradient step on real windows.

        :param batch: windows of ``window`` steps
        :return: scalar tensors to log, on the device, detached; ``"loss"`` is one of them, and ``"skipped"`` may be: 1 if the
            gradient was not finite, and therefore not followed
        """

    @abstractmethod
    def imagine(self, start: th.Tensor, policy: PolicyFn, context: Context | None = None) -> Trajectory:
        """
        Imagine one trajectory of ``horizon`` steps from each start under a policy. Without gradients.

        :param start: ``(batch, obs_dim)``
        :param policy: observations to the distribution of actions
        :param context: what happened before, for models with a memory; the others leave it aside. A model must do without
            (PolyGRAD gives none): it then begins as at the first step of a window
        :return: the trajectories; actions as drawn, before clipping to the box. If the network fails numerically, rewards
            and observations are NaN, which the caller has to look for
        :raises RuntimeError: if the model was never fitted
        """

    @property
    def imagine_expected(self) -> Imagine | None:
        """
        Like :meth:`imagine`, but with gradients with respect to the actions (straight through draws of classes). None for a
        model that has none, the default.

        What is drawn without a gradient is not drawn: ``terminals`` are the probabilities that a step that is taken ends the
        episode, and ``mask`` is the probability that it is taken.
        """
        return None

    def adapt(self, standardized_std: th.Tensor, policy_std: th.Tensor) -> dict[str, th.Tensor]:
        """
        Learn from the latest imagined batch how to follow the policy better (Algorithm 3, line 9). By default nothing.

        :param standardized_std: σ_ā (Eq. 9), scalar
        :param policy_std: standard deviations of the policy that acted, ``(..., action_dim)``
        :return: scalar tensors to log
        """
        return {}
