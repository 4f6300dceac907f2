"""The contract of a sampler: what it is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch as th
from torch.distributions import Distribution

from sb3_polygrad.common.trajectory import Trajectory


class Corrupted(NamedTuple):
    """
    A training example for the denoiser.

    :param noisy: ``(batch, horizon + 1, channels)``, the first state clean
    :param actions: ``(batch, horizon, action_dim)`` as the denoiser is to see them
    :param level: ``(batch, n_levels)`` noise levels in [0, 1]
    :param target: what the denoiser is to put out, like ``noisy``
    """

    noisy: th.Tensor
    actions: th.Tensor
    level: th.Tensor
    target: th.Tensor


class Task(NamedTuple):
    """
    What there is to sample: callables and tensors, ``states`` being standardised, ``(batch, horizon + 1, channels)``.

    :param denoiser: ``(noisy states, actions as it sees them, level (1, n_levels)) -> output``
    :param condition: actions in the environment's units to clipped, standardised ones
    :param policy: states ``(batch, steps, channels)`` to the policy's distribution of actions there
    :param bound: holds clean estimates near what was really seen
    :param first: ``(batch, channels)`` the state every trajectory starts from
    :param noise: ``(batch, horizon, action_dim)`` standard normal draws, one per action
    :param action_mean: ``(action_dim,)`` of the real actions
    :param action_std: ``(action_dim,)`` of the real actions
    """

    denoiser: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]
    condition: Callable[[th.Tensor], th.Tensor]
    policy: Callable[[th.Tensor], Distribution]
    bound: Callable[[th.Tensor], th.Tensor]
    first: th.Tensor
    noise: th.Tensor
    action_mean: th.Tensor
    action_std: th.Tensor


class Sample(NamedTuple):
    """
    :param states: clean states, ``(batch, horizon + 1, channels)``, standardised
    :param actions: ``(batch, horizon, action_dim)``, environment units, before clipping to the box
    """

    states: th.Tensor
    actions: th.Tensor


class Sampler(Protocol):
    """A way to noise real trajectories for training, and to denoise imagined ones under a policy."""

    n_level_inputs: int
    """Noise levels per trajectory that the denoiser sees: 1, or one for each step."""

    def corrupt(self, clean: th.Tensor, actions: th.Tensor) -> Corrupted:
        """
        Noise real trajectories (Algorithm 1, lines 4 to 6).

        :param clean: ``(batch, horizon + 1, channels)``, standardised
        :param actions: ``(batch, horizon, action_dim)``, clipped and standardised
        """
        ...

    def sample(self, task: Task) -> Sample:
        """Imagine a batch of trajectories (Algorithm 2)."""
        ...

    def adapt(self, imagined: Trajectory, policy: Callable[[th.Tensor], Distribution]) -> dict[str, th.Tensor]:
        """Learn from an imagined batch (Algorithm 3, line 9); see :meth:`WorldModel.adapt`."""
        ...
