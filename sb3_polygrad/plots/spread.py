"""
Spread and coverage against the truth, from the csv file of :mod:`sb3_polygrad.evaluation.spread_study`.

    python -m sb3_polygrad.plots.spread docs/results/spread_study.csv --out docs/results/spread_study.png

A panel per measure, over the number of levels K, a line per denoiser and lag L, averaged over steps; the policy-guided
sampler as a horizontal line for each N.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from sb3_polygrad.plots.figure import save
from sb3_polygrad.plots.sampler_grid import name_columns

MEASURES = {
    "spread": ("std of samples / true std", 1.0),
    "coverage": ("true mass of the 90 % interval", 0.9),
    "crps": ("CRPS over the truth's, minus 1", 0.0),
}


def plot(file: Path, out: Path) -> None:
    """
    :param file: csv with the columns sampler, denoiser, K, L, N, step and the measures
    :param out: picture to write
    """
    data = pd.read_csv(file)
    staggered, guided = data[data["sampler"] == "staggered"].copy(), data[data["sampler"] == "policy_guided"]
    columns = name_columns(staggered)
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(3.9 * len(MEASURES), 3.6), layout="constrained")
    for axis, (measure, (label, ideal)) in zip(axes, MEASURES.items(), strict=True):
        axis.axhline(ideal, color="black", linewidth=1, label="truth")
        for column in columns:
            means = staggered[staggered["column"] == column].groupby("K")[measure].mean()
            axis.semilogx(means.index, means.to_numpy(), "o-", base=2, markersize=3, label=column)
        for style, (n_steps, rows) in zip(("--", ":"), guided.groupby("N"), strict=False):
            axis.axhline(rows[measure].mean(), linestyle=style, color="gray", label=f"policy-guided, N = {n_steps:g}")
        levels = sorted(staggered["K"].unique())
        axis.set(xlabel="K", ylabel=label, xticks=levels, xticklabels=[f"{n:g}" for n in levels])
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plot(args.file, args.out)


if __name__ == "__main__":
    main()
