"""
Learning curves of a comparison, from ``curves.csv`` of the report of :mod:`sb3_polygrad.benchmark.compare`.

    python -m sb3_polygrad.plots.comparison runs/comparison/report/curves.csv --out curves.png

A panel per environment, a line per label: the interquartile mean over its seeds, in its bootstrap interval.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from sb3_polygrad.plots.figure import save

PANELS_PER_ROW = 3
LINES = ("solid", "dashed", "dotted", "dashdot")


def file_name(env: str) -> str:
    """The picture of one environment."""
    return re.sub(r"[^\w.-]", "-", f"curves_{env}.png")


def plot(curves: pd.DataFrame, out: Path) -> None:
    """
    :param curves: columns env, label, timesteps, seeds, iqm, iqm_low, iqm_high
    :param out: picture to write
    """
    environments = list(curves["env"].unique())
    n_columns = min(len(environments), PANELS_PER_ROW)
    n_rows = -(-len(environments) // n_columns)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(5.5 * n_columns, 3.8 * n_rows), squeeze=False)
    styles = {  # ten colours, solid first
        label: {"color": f"C{index % 10}", "linestyle": LINES[index // 10 % len(LINES)]}
        for index, label in enumerate(curves["label"].unique())
    }
    for axis in axes.flat[len(environments) :]:
        axis.set_axis_off()
    for axis, env in zip(axes.flat, environments, strict=False):
        for label, curve in curves[curves["env"] == env].groupby("label", sort=False):
            n_seeds = curve["seeds"].iloc[0]
            name = f"{label} ({n_seeds} seed{'s' if n_seeds > 1 else ''})"
            axis.plot(curve["timesteps"], curve["iqm"], **styles[label], linewidth=1.8, label=name)
            interval = curve["iqm_low"], curve["iqm_high"]
            axis.fill_between(curve["timesteps"], *interval, color=styles[label]["color"], alpha=0.18)
        axis.set(title=env, xlabel="real steps", ylabel="deterministic return")
        axis.legend(frameon=False, fontsize="small")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plot(pd.read_csv(args.curves), args.out)


if __name__ == "__main__":
    main()
