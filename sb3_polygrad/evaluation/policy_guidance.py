"""The policy-guided sampler as it is after training under a policy: with δ tuned."""

from __future__ import annotations

import copy

import torch as th

from sb3_polygrad.common.on_policy import action_std, standardized_actions
from sb3_polygrad.world_models.base import PolicyFn
from sb3_polygrad.world_models.diffusion import DiffusionWorldModel


def tune_delta(model: DiffusionWorldModel, start: th.Tensor, policy: PolicyFn, rounds: int) -> DiffusionWorldModel:
    """
    A copy whose action update scale δ was tuned for this policy by Eq. 10.

    :param model: a fitted policy-guided world model
    :param start: ``(batch, obs_dim)`` states to imagine from at each round
    :param policy: the policy
    :param rounds: updates of δ
    """
    model = copy.deepcopy(model)
    for _ in range(rounds):
        trajectory = model.imagine(start, policy)
        normal = policy(trajectory.observations[:, :-1])
        standardized = standardized_actions(trajectory, normal.mean, normal.stddev)
        model.adapt(action_std(standardized, trajectory.mask), normal.stddev)
    return model
