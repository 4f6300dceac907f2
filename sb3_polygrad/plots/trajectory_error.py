"""
Errors by step from the csv files of :mod:`sb3_polygrad.evaluation.trajectory_error` (Figures 5 and 8).

    python -m sb3_polygrad.plots.trajectory_error docs/results/error_*[!y].csv --out docs/results/error.png

A panel per environment; a line per model (and horizon, of those that are fitted for one): the mean over seeds of the median
over trajectories, shaded from the best seed to the worst. Dotted: the state does not change.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from sb3_polygrad.plots.figure import save


def plot(files: Sequence[Path], out: Path, measure: str = "mse_median") -> None:
    """
    :param files: csv files with the columns env, model, horizon, seed, step, the measure and that of no change
    :param out: picture to write
    :param measure: column to draw
    """
    data = pd.concat([pd.read_csv(file) for file in files])
    environments = list(data["env"].unique())
    lines = list(dict.fromkeys(zip(data["model"], data["horizon"], strict=True)))
    colors = {model: f"C{index}" for index, model in enumerate(data["model"].unique())}
    several = data.groupby("model")["horizon"].nunique()
    figure, axes = plt.subplots(
        1, len(environments), figsize=(4.6 * len(environments), 4.2), squeeze=False, layout="constrained"
    )
    for axis, env_id in zip(axes[0], environments, strict=True):
        panel = data[data["env"] == env_id]
        for model, horizon in lines:
            curves = panel[(panel["model"] == model) & (panel["horizon"] == horizon)].groupby("step")[measure]
            label = f"{model}, h = {horizon}" if several[model] > 1 else model
            style = ["-", "--", "-."][sorted(data.loc[data["model"] == model, "horizon"].unique()).index(horizon) % 3]
            axis.semilogy(curves.mean(), style, color=colors[model], label=label, linewidth=1.5)
            axis.fill_between(curves.min().index, curves.min(), curves.max(), color=colors[model], alpha=0.15)
        unchanged = panel.groupby("step")[measure.replace("mse", "no_change")].mean()
        axis.semilogy(unchanged, ":", color="black", label="no change")
        axis.set(title=env_id, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"standardised squared error ({measure.removeprefix('mse_')})")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    save(figure, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--measure", choices=["mse_median", "mse_mean"], default="mse_median", help="column to draw")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plot(args.files, args.out, args.measure)


if __name__ == "__main__":
    main()
