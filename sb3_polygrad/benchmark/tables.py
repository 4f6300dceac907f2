"""Tables of a comparison. Curves are compared where all have evaluations: nothing is interpolated or extrapolated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rliable import metrics

from sb3_polygrad.benchmark.curve_file import read_rows
from sb3_polygrad.benchmark.evaluations import MEASURES

ONE_EVALUATION = ["env", "label", "seed", "timesteps"]


def read_results(folder: Path, first: str = "") -> pd.DataFrame:
    """
    :param folder: of the csv files of all runs
    :param first: label that comes first in all tables; the others follow by name
    :return: all rows, ordered by env, label, seed, timesteps
    :raises ValueError: if there are none, or two for the same evaluation
    """
    rows = pd.DataFrame([row for path in sorted(folder.glob("*.csv")) for row in read_rows(path)])
    if rows.empty:
        raise ValueError(f"there are no evaluations in {folder}: it must be the --out of `compare run`")
    rows = rows.astype({"seed": int, **dict.fromkeys(MEASURES, float)}).astype({"timesteps": int})
    if (twice := rows[rows.duplicated(ONE_EVALUATION)]).size:
        raise ValueError(f"two rows in {folder} are of the same evaluation: {twice[ONE_EVALUATION].iloc[0].to_dict()}")
    order = {first: ""}
    return rows.sort_values(ONE_EVALUATION, key=lambda column: column.replace(order) if column.name == "label" else column)


def last_common_step(curve: pd.DataFrame) -> int:
    """
    :param curve: rows of one label in one environment
    :return: the last step at which all its seeds were evaluated (the last of any, if there is none)
    """
    n_seeds = curve.groupby("timesteps")["seed"].nunique()
    return n_seeds.index[n_seeds == n_seeds.max()].max()


def return_table(rows: pd.DataFrame, at: Sequence[int] | None, ours: str) -> pd.DataFrame:
    """
    Mean, least and greatest return of every label at given steps, over the seeds that have an evaluation there.

    :param rows: from :func:`read_results`
    :param at: real steps; None for all at which the curve of a label ends, environment by environment
    :param ours: label whose probability of improvement over each other label is told (Agarwal et al., 2021)
    :raises ValueError: if none has an evaluation at any of these steps
    """
    table = []
    for env, of_env in rows.groupby("env", sort=False):
        ends = {last_common_step(curve) for _, curve in of_env.groupby("label")}
        for timesteps in at or sorted(ends):
            there = of_env[of_env["timesteps"] == timesteps]
            returns = {label: group["mean_reward"].to_numpy() for label, group in there.groupby("label", sort=False)}
            for label, values in returns.items():
                row = {"env": env, "timesteps": timesteps, "label": label, "seeds": len(values)}
                row |= {"mean": values.mean(), "min": values.min(), "max": values.max(), "improvement": np.nan}
                if label != ours and ours in returns:
                    row["improvement"] = metrics.probability_of_improvement(returns[ours][:, None], values[:, None])
                table.append(row)
    if not table:
        raise ValueError(f"no curve has an evaluation at {at}: choose steps at which they were evaluated")
    return pd.DataFrame(table)


def seed_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every run: its last evaluation, its best, the fraction of the best that it kept, and what 10,000 real steps took."""
    table = []
    for (env, label, seed), run in rows.groupby(["env", "label", "seed"], sort=False):
        last, best = run.iloc[-1], run.loc[run["mean_reward"].idxmax()]
        row = {"env": env, "label": label, "seed": seed, "timesteps": last["timesteps"]}
        row |= {"final": last["mean_reward"], "best": best["mean_reward"], "best_at": best["timesteps"]}
        # A fraction of a return that is negative would say nothing.
        row["final_of_best"] = last["mean_reward"] / best["mean_reward"] if best["mean_reward"] > 0 else np.nan
        for name, clock in (("minutes_per_10000", "training_seconds"), ("cpu_minutes_per_10000", "training_cpu_seconds")):
            row[name] = last[clock] / 60 / last["timesteps"] * 10_000
        table.append(row)
    return pd.DataFrame(table)
