"""The one shape that real windows and imagined trajectories share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch as th


class Trajectory(NamedTuple):
    """
    A batch of trajectories of ``horizon`` steps; imagined data keeps the shape of real data.

    Step ``t`` is "in ``observations[:, t]`` do ``actions[:, t]``, receive ``rewards[:, t]``, arrive in
    ``observations[:, t + 1]``, which ends the episode if ``terminals[:, t]``". Units are the environment's own.

    :param observations: ``(batch, horizon + 1, obs_dim)``
    :param actions: ``(batch, horizon, action_dim)``; imagined ones are the policy's draws before clipping to the box,
        real ones are what the environment received
    :param rewards: ``(batch, horizon)``
    :param terminals: ``(batch, horizon)``, 1.0 from the step that ends the episode on, else 0.0
    :param mask: ``(batch, horizon)``, 1.0 for steps that happened (the ending step included), 0.0 after it

    In trajectories imagined with gradients ``terminals`` are the probabilities that a step ends the episode if it is taken,
    and ``mask`` is the probability that it is taken.
    """

    observations: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    terminals: th.Tensor
    mask: th.Tensor

    @property
    def horizon(self) -> int:
        """Number of steps."""
        return self.actions.shape[1]


def all_finite(tensors: Iterable[th.Tensor]) -> bool:
    """Whether no value is NaN or infinite; the device is asked once for all of them."""
    return bool(th.stack([th.isfinite(tensor).all() for tensor in tensors]).all())


def mask_after_ending(terminals: th.Tensor) -> th.Tensor:
    """
    Weight of every step: ``w^t = prod_{k<t} (1 - d^k)``, so that the ending step itself counts.

    Departs from the authors' release, which also zeroes the ending step: the action that ends an episode must be
    learnt from.

    :param terminals: ``(batch, horizon)`` of 0.0 and 1.0
    :return: ``(batch, horizon)`` of 0.0 and 1.0
    """
    alive_after = th.cumprod(1.0 - terminals, dim=1)
    return th.cat([th.ones_like(terminals[:, :1]), alive_after[:, :-1]], dim=1)
