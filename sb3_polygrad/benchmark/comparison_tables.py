"""Numbers of a comparison. Curves are compared where all have evaluations: nothing is interpolated or extrapolated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sb3_polygrad.benchmark.curve_file import read_rows
from sb3_polygrad.benchmark.evaluations import MEASURES
from sb3_polygrad.benchmark.reliability import interquartile_mean, probability_of_improvement


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
    one = ["env", "label", "seed", "timesteps"]
    if (twice := rows[rows.duplicated(one)]).size:
        raise ValueError(f"two rows in {folder} are of the same evaluation: {twice[one].iloc[0].to_dict()}")
    order = {first: ""}
    return rows.sort_values(one, key=lambda column: column.replace(order) if column.name == "label" else column)


def curves_of(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """
    :param rows: from :func:`read_results`
    :return: env, label, and a table of its returns: a row per timesteps, a column per seed, NaN where a seed has none
    """
    for (env, label), group in rows.groupby(["env", "label"], sort=False):
        yield env, label, group.pivot(index="timesteps", columns="seed", values="mean_reward")


def curve_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Learning curves: the interquartile mean with its interval, at the steps that all seeds of a label have."""
    tables = []
    for env, label, curve in curves_of(rows):
        common = curve.dropna()
        if common.empty:
            continue
        mean, (low, high) = interquartile_mean(common.to_numpy().T)
        columns = {"env": env, "label": label, "timesteps": common.index, "seeds": common.shape[1]}
        tables.append(pd.DataFrame({**columns, "iqm": mean, "iqm_low": low, "iqm_high": high}))
    return pd.concat(tables, ignore_index=True)


def return_table(rows: pd.DataFrame, curves: pd.DataFrame, at: Sequence[int] | None, ours: str) -> pd.DataFrame:
    """
    Every label at given steps, from the seeds that have an evaluation there.

    :param rows: from :func:`read_results`
    :param curves: from :func:`curve_table`; where seeds are missing there is no interquartile mean
    :param at: real steps; None for all at which the curve of a label ends, environment by environment
    :param ours: label whose probability of improvement over the others is told
    :raises ValueError: if none has an evaluation at any of these steps
    """
    table = []
    for env, of_env in rows.groupby("env", sort=False):
        returns = {label: curve for _, label, curve in curves_of(of_env)}
        for timesteps in at or sorted({_end(curve) for curve in returns.values()}):
            reaching = {
                label: curve.loc[:timesteps, curve.loc[timesteps].notna()]
                for label, curve in returns.items()
                if timesteps in curve.index
            }
            if not reaching:
                continue
            areas = _areas(reaching)
            for label, curve in reaching.items():
                scores = curve.loc[timesteps].to_numpy()
                row = {"env": env, "timesteps": timesteps, "label": label, "seeds": len(scores)}
                row |= {"mean": scores.mean(), "min": scores.min(), "max": scores.max(), "area": areas[label]}
                if label != ours and ours in reaching:
                    better, (low, high) = probability_of_improvement(
                        reaching[ours].loc[timesteps].to_numpy()[:, None], scores[:, None]
                    )
                    row |= {"improvement": better, "improvement_low": low, "improvement_high": high}
                table.append(row)
    if not table:
        raise ValueError(f"no curve has an evaluation at {at}: choose steps at which they were evaluated")
    means = curves.drop(columns="seeds")
    return pd.DataFrame(table).merge(means, how="left", on=["env", "label", "timesteps"])


def improvement_table(rows: pd.DataFrame, at: Sequence[int] | None, ours: str) -> pd.DataFrame:
    """
    Probability of improvement over each other label, over all environments where both have an evaluation at given steps, from
    the seeds that are in all of those. An environment of a single seed is left out where others have more.

    :param rows: from :func:`read_results`
    :param at: real steps; None for all at which a curve ends
    :param ours: the label that is to be better
    """
    steps = at or sorted({_end(curve) for _, _, curve in curves_of(rows)})
    table = []
    for timesteps in steps:
        there = rows[rows["timesteps"] == timesteps]
        scores = {
            label: group.pivot(index="seed", columns="env", values="mean_reward")
            for label, group in there.groupby("label", sort=False)
        }
        for label in [label for label in scores if label != ours and ours in scores]:
            environments = [env for env in scores[ours] if env in scores[label]]
            n_seeds = pd.DataFrame({name: scores[name][environments].count() for name in (ours, label)}).min(axis=1)
            environments = n_seeds.index[n_seeds >= min(2, n_seeds.max())].tolist()
            mine, theirs = (scores[name][environments].dropna().to_numpy() for name in (ours, label))
            if mine.size == 0 or theirs.size == 0:
                continue
            better, (low, high) = probability_of_improvement(mine, theirs)
            row = {"timesteps": timesteps, "label": label, "environments": len(environments), "seeds": len(theirs)}
            table.append(row | {"improvement": better, "improvement_low": low, "improvement_high": high})
    return pd.DataFrame(table)


def _end(curve: pd.DataFrame) -> int:
    """The last step that all seeds have, or the last of any if there is no such."""
    common = curve.dropna()
    return (curve if common.empty else common).index.max()


def _areas(curves: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    """Area under each curve divided by its width, with straight lines between the evaluations that all these curves have."""
    joined = pd.concat(curves, axis=1).dropna()
    widths = np.diff(joined.index)
    areas = {}
    for label in curves:
        returns = joined[label].mean(axis=1).to_numpy()
        areas[label] = widths @ (returns[1:] + returns[:-1]) / 2 / widths.sum() if len(widths) else returns[-1]
    return areas


def seed_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Every run: its last evaluation, its best, how much of the best it kept, and what 10,000 real steps took."""
    table = []
    for (env, label, seed), run in rows.groupby(["env", "label", "seed"], sort=False):
        last, best = run.iloc[-1], run.loc[run["mean_reward"].idxmax()]
        row = {"env": env, "label": label, "seed": seed, "timesteps": last["timesteps"]}
        row |= {"final": last["mean_reward"], "best": best["mean_reward"], "best_at": best["timesteps"]}
        # A share of a return that is negative would say nothing.
        row["final_of_best"] = last["mean_reward"] / best["mean_reward"] if best["mean_reward"] > 0 else np.nan
        for name, clock in (("minutes_per_10000", "training_seconds"), ("cpu_minutes_per_10000", "training_cpu_seconds")):
            row[name] = last[clock] / 60 / last["timesteps"] * 10_000
        table.append(row)
    return pd.DataFrame(table)


def cost_table(seeds: pd.DataFrame) -> pd.DataFrame:
    """
    :param seeds: from :func:`seed_table`
    :return: per env and label: seeds, means of the minutes, and the least that a seed kept of its best
    """
    groups = seeds.groupby(["env", "label"], sort=False)
    return groups.agg(
        seeds=("seed", "count"),
        minutes_per_10000=("minutes_per_10000", "mean"),
        cpu_minutes_per_10000=("cpu_minutes_per_10000", "mean"),
        final_of_best_min=("final_of_best", "min"),
    ).reset_index()


def reach_table(rows: pd.DataFrame, reference: str, targets: Mapping[str, float]) -> pd.DataFrame:
    """
    Real steps and minutes of training until an evaluation is as good as a target: medians over the seeds, where a seed that
    never gets there counts as infinitely late.

    :param rows: from :func:`read_results`
    :param reference: label; its mean at the last step that all its seeds have is a target of its environment
    :param targets: further ones, per environment
    """
    table = []
    clocks = ["timesteps", "training_seconds", "training_cpu_seconds"]
    for env, of_env in rows.groupby("env", sort=False):
        curves = {label: curve for _, label, curve in curves_of(of_env)}
        goals = {}
        if reference in curves:
            end = _end(curves[reference])
            goals[f"{reference} at {end:,}"] = curves[reference].loc[end].mean()
        if env in targets:
            goals["stated"] = targets[env]
        for goal, target in goals.items():
            for label, runs in of_env.groupby("label", sort=False):
                good = runs[runs["mean_reward"] >= target]
                first = good.groupby("seed")[clocks].first().reindex(runs["seed"].unique(), fill_value=np.inf)
                row = {"env": env, "goal": goal, "target": target, "label": label}
                row |= {"seeds": len(first), "reached": good["seed"].nunique(), "within": _end(curves[label])}
                row["steps"] = first["timesteps"].median()
                row["minutes"] = first["training_seconds"].median() / 60
                row["cpu_minutes"] = first["training_cpu_seconds"].median() / 60
                table.append(row)
    return pd.DataFrame(table).replace(np.inf, np.nan)
