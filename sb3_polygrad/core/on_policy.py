"""How well imagined actions match the policy that should have drawn them."""

from __future__ import annotations

import torch as th

from sb3_polygrad.core.trajectory import Trajectory


def standardized_actions(trajectory: Trajectory, mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Eq. 9: ``(a - μ(s)) / σ(s)``; draws from the policy give independent N(0, 1).

    :param trajectory: imagined trajectories
    :param mean: ``(batch, horizon, action_dim)`` of the policy at the imagined observations
    :param std: like ``mean``
    :return: like ``mean``
    """
    return (trajectory.actions - mean) / std


def action_std(standardized: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    σ_ā: standard deviation over batch and time, averaged over action dimensions; steps after an ending do not count.

    :param standardized: ``(batch, horizon, action_dim)``
    :param mask: ``(batch, horizon)``
    :return: scalar
    """
    weight = mask[..., None]
    total = weight.sum().clamp(min=1.0)
    mean = (standardized * weight).sum(dim=(0, 1)) / total
    variance = ((standardized - mean).square() * weight).sum(dim=(0, 1)) / total
    return variance.sqrt().mean()


def action_autocorrelation(standardized: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """
    Lag-1 autocorrelation of the standardised actions, averaged over action dimensions: 0 if they are truly on-policy.

    :param standardized: ``(batch, horizon, action_dim)``
    :param mask: ``(batch, horizon)``
    :return: scalar
    """
    weight = mask[:, 1:, None]  # a pair counts if its later step happened
    before, after = standardized[:, :-1], standardized[:, 1:]
    scale = ((before.square() * weight).sum(dim=(0, 1)) * (after.square() * weight).sum(dim=(0, 1))).sqrt()
    return ((before * after * weight).sum(dim=(0, 1)) / scale.clamp(min=1e-8)).mean()
