"""A callback that logs how well imagined actions match the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_polygrad.common.action_diagnostics import action_diagnostics, standardized_actions

if TYPE_CHECKING:
    from sb3_polygrad.polygrad import PolyGRAD


class ActionDiagnostics(BaseCallback):
    """
    Imagines trajectories now and then and logs how well their actions match the policy (``imagination/action_...``).

    The policy-guided sampler logs the same at every update; for all other models, whose actions are draws, this is a check.
    It draws random numbers, so that a run with it differs from one without.

    :param freq: real steps, of all environments together, between two logs
    :param n_trajectories: how many are imagined
    :param verbose: as in SB3
    """

    model: PolyGRAD

    def __init__(self, freq: int = 1_000, n_trajectories: int = 512, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.freq, self.n_trajectories = freq, n_trajectories

    def _on_step(self) -> bool:
        is_due = self.num_timesteps // self.freq > (self.num_timesteps - self.training_env.num_envs) // self.freq
        if is_due and self.model._n_updates > 0:
            imagined = self.model.imagine(self.n_trajectories)
            with th.no_grad():
                policy = self.model.imagination.policy_at(imagined.observations[:, :-1])
            standardized = standardized_actions(imagined, policy.mean, policy.stddev)
            for name, value in action_diagnostics(standardized, imagined).items():
                self.logger.record(f"imagination/{name}", float(value))
        return True
