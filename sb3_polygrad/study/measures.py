"""Measures of imagined trajectories, as rows ``(step, measure, value)``; ``docs/study.md`` says what each means."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.stats
import torch as th

from sb3_polygrad.common.action_diagnostics import action_autocorrelation, action_std, predictable_share, standardized_actions
from sb3_polygrad.common.trajectory import Trajectory
from sb3_polygrad.polygrad import PolyGRAD
from sb3_polygrad.study.simulator import Simulator, Starts
from sb3_polygrad.world_models.base import PolicyFn, WorldModel

Rows = list[tuple[int, str, float]]

SPREAD_STARTS = 20
"""States that the measure ``spread`` imagines from, each as often as the number of trajectories allows."""


def error_rows(
    imagined: Trajectory, real: Trajectory, obs_std: th.Tensor | float = 1.0, reward_std: th.Tensor | float = 1.0
) -> Rows:
    """``errors`` of imagined trajectories; the real ones have the same actions and begin with the same observations."""
    rows: Rows = []
    for t in range(imagined.horizon):
        both = (imagined.mask[:, t] * real.mask[:, t]) > 0.0
        rows.append((t + 1, "n", float(both.sum())))
        if not both.any():
            continue
        truth = real.observations[both, t + 1]
        for name, guess in (("mse", imagined.observations[both, t + 1]), ("no_change", real.observations[both, 0])):
            errors = ((guess - truth) / obs_std).square().mean(dim=1)
            rows += [(t + 1, f"{name}_mean", float(errors.mean())), (t + 1, f"{name}_median", float(errors.median()))]
        reward_errors = ((imagined.rewards - real.rewards)[both, t] / reward_std).square()
        rows.append((t + 1, "reward_mse", float(reward_errors.mean())))
    return rows


def ending_rows(imagined: Trajectory, real: Trajectory) -> Rows:
    """``endings`` of imagined trajectories and of the real ones with the same actions."""
    shares = {
        "ended": imagined.terminals.mean(dim=0),
        "ended_real": real.terminals.mean(dim=0),
        "ending_error": (imagined.terminals != real.terminals).float().mean(dim=0),
    }
    return [(t + 1, name, float(share)) for name, by_step in shares.items() for t, share in enumerate(by_step)]


def action_rows(imagined: Trajectory, standardized: th.Tensor) -> Rows:
    """``actions`` of imagined trajectories, with their standardised actions ``(batch, horizon, action_dim)``."""
    z = standardized[imagined.mask > 0.0].double().flatten().numpy()
    rows: Rows = [
        (0, "action_std", float(action_std(standardized, imagined.mask))),
        (0, "action_mean", float(z.mean())),
        (0, "ks", float(scipy.stats.kstest(z, "norm").statistic)),
        (0, "autocorrelation", float(action_autocorrelation(standardized, imagined.mask))),
        (0, "predictable", float(predictable_share(standardized, imagined.observations[:, :-1], imagined.mask))),
        (0, "kurtosis", float(scipy.stats.kurtosis(z, fisher=False))),
        (0, "at_clip", float(np.mean(np.abs(np.abs(z) - 3.0) <= 0.05))),
    ]
    for t in range(imagined.horizon):
        here = slice(t, t + 1)
        if imagined.mask[:, t].sum() > 1:
            rows.append((t + 1, "action_std", float(action_std(standardized[:, here], imagined.mask[:, here]))))
    return rows


def actions_of(model: PolyGRAD, n_trajectories: int = 2_000) -> pd.DataFrame:
    """
    Whether the actions that a model imagines are draws from its policy: ``actions``, with the columns step, measure, value.

    :param model: loaded with its replay buffer, and with its environment if it was trained under ``VecNormalize``
    :param n_trajectories: how many to imagine, from random observations of the buffer
    """
    imagined = model.imagine(n_trajectories)
    with th.no_grad():
        normal = model.imagination.policy_at(imagined.observations[:, :-1])
    rows = action_rows(imagined, standardized_actions(imagined, normal.mean, normal.stddev))
    return pd.DataFrame(rows, columns=["step", "measure", "value"])


def spread_rows(imagined: Trajectory, real: Trajectory, n_starts: int) -> Rows:
    """``spread`` of as many trajectories from each start, those of one start in succession."""
    samples = [_held(side).reshape(n_starts, -1, *side.observations.shape[1:]) for side in (imagined, real)]
    (guess, truth), rows = samples, []  # (starts, n, horizon + 1, obs_dim)
    std = truth.std(axis=1, ddof=1) + 1e-8
    energy = np.vectorize(scipy.stats.energy_distance, signature="(n),(m)->()")
    measures = {
        "spread": guess.std(axis=1, ddof=1) / std,
        # E|X - Y| - E|X - X'| / 2 less the same of the truth, E|Y - Y'| / 2, is half the squared energy distance.
        "crps_excess": energy(np.moveaxis(guess, 1, -1), np.moveaxis(truth, 1, -1)) ** 2 / 2 / std,
        "bias": ((guess.mean(axis=1) - truth.mean(axis=1)) / std) ** 2,
    }
    for name, values in measures.items():
        by_step = values[:, 1:].mean(axis=(0, 2))
        rows += [(t + 1, name, float(v)) for t, v in enumerate(np.sqrt(by_step) if name == "bias" else by_step)]
    return rows


def _held(trajectory: Trajectory) -> np.ndarray:
    """Observations, where the one that an episode ended with is repeated to the end."""
    last = trajectory.mask.sum(dim=1, keepdim=True).long()
    steps = th.minimum(th.arange(trajectory.horizon + 1), last)[..., None].expand_as(trajectory.observations)
    return trajectory.observations.gather(1, steps).double().numpy()


@dataclass
class Batch:
    """An imagined batch, and what it is measured against; ``obs_std`` and ``reward_std`` are those of the data."""

    model: WorldModel
    policy: PolicyFn
    starts: Starts
    imagined: Trajectory
    simulator: Simulator
    obs_std: th.Tensor
    reward_std: th.Tensor

    @cached_property
    def real(self) -> Trajectory:
        """The imagined actions in the simulator."""
        return self.simulator.replay(self.starts, self.imagined.actions)

    @cached_property
    def standardized(self) -> th.Tensor:
        """The imagined actions about the policy's mean, in its standard deviations."""
        with th.no_grad():
            normal = self.policy(self.imagined.observations[:, :-1])
        return standardized_actions(self.imagined, normal.mean, normal.stddev)

    def errors(self) -> Rows:
        """This and the other measures: see the head of the file."""
        return error_rows(self.imagined, self.real, self.obs_std, self.reward_std)

    def endings(self) -> Rows:
        """Share of endings."""
        return ending_rows(self.imagined, self.real)

    def actions(self) -> Rows:
        """Statistics of actions."""
        return action_rows(self.imagined, self.standardized)

    def samples(self) -> Rows:
        """Standardised actions, for a histogram."""
        z = self.standardized[self.imagined.mask > 0.0].flatten()
        return [(0, "action", float(value)) for value in z[th.randperm(len(z))[:1_000]]]

    def spread(self) -> Rows:
        """Spread of trajectories from the same start."""
        n = min(SPREAD_STARTS, len(self.starts.observations))
        starts = self.starts.take(np.arange(n).repeat(max(2, len(self.starts.observations) // n)))
        real = self.simulator.follow(starts, self.policy, self.imagined.horizon)
        return spread_rows(self.model.imagine(starts.observations, self.policy), real, n)

    def time(self) -> Rows:
        """Time per batch."""
        spent = []
        for _ in range(3):
            begin = time.perf_counter(), time.process_time()
            self.model.imagine(self.starts.observations, self.policy)
            spent.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        seconds, cpu_seconds = np.median(spent, axis=0)
        n_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return [(0, "seconds", seconds), (0, "cpu_seconds", cpu_seconds), (0, "parameters", float(n_parameters))]


MEASURES = {f.__name__: f for f in (Batch.errors, Batch.endings, Batch.actions, Batch.samples, Batch.spread, Batch.time)}
"""The measures that a study can name."""
