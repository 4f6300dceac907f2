"""A run that learns nothing must say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from sb3_polygrad.common.trajectory import all_finite

MAX_FAULTY_UPDATES = 100
"""Faulty updates in a row before a run is given up."""


class FaultMonitor:
    """Counts updates in a row that taught nothing because something was not finite."""

    def __init__(self) -> None:
        self.n_faulty = 0

    def check(self, faults: Mapping[str, bool], policy: nn.Module, save: Callable[[], Path]) -> None:
        """
        Judge one update.

        :param faults: what may not have been finite throughout the update, and whether it was so
        :param policy: what was updated
        :param save: saves the run as it is
        :raises ValueError: at the last of :data:`MAX_FAULTY_UPDATES` faulty updates in a row, or if the policy is not finite
        """
        if not all_finite(policy.parameters()):  # an optimiser's own doing
            raise ValueError(
                "the optimiser made parameters of the policy not finite: lower learning_rate or critic_learning_rate, or look "
                "at optimizer_kwargs in policy_kwargs"
            )
        present = [fault for fault, is_present in faults.items() if is_present]
        self.n_faulty = self.n_faulty + 1 if present else 0
        if self.n_faulty < MAX_FAULTY_UPDATES:
            return
        self.n_faulty = 0
        raise ValueError(
            f"{present[0]} were not finite for {MAX_FAULTY_UPDATES} updates in a row: nothing is learnt any more. The run as "
            f"it is now was saved in {save()}; lower the learning_rate of world_model_kwargs, or look for huge rewards or "
            "observations in the environment, and go on from an earlier checkpoint"
        )
