"""
Error by step from the ``_steps.csv`` files of :mod:`sb3_polygrad.evaluation.sampler_study`.

    python -m sb3_polygrad.plots.sampler_errors docs/results/samplers_hopper_h10_steps.csv --out docs/results/samplers.png

A row of panels per environment, a panel per σ; the median over trajectories. A colour per sampler and denoiser, a line
style for each of its settings.
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

LINE_STYLES = ("-", "--", "-.", ":")


def family(row: pd.Series) -> str:
    """What is drawn in one colour."""
    return f"staggered, {row['denoiser']}" if row["sampler"] == "staggered" else "policy-guided"


def name(row: pd.Series) -> str:
    """Short name of a sampler."""
    settings = ("K", "L") if row["sampler"] == "staggered" else ("N",)
    return f"{row['family']}: " + " ".join(f"{setting}={row[setting]:g}" for setting in settings)


def plot(files: Sequence[Path], out: Path) -> None:
    """
    :param files: csv files with the columns env, sampler, denoiser, K, L, N, sigma, step, mse_median
    :param out: picture to write
    """
    data = pd.concat([pd.read_csv(file) for file in files])
    data["family"] = data.apply(family, axis=1)
    data["name"] = data.apply(name, axis=1)
    environments, sigmas = list(data["env"].unique()), sorted(data["sigma"].unique(), reverse=True)
    styles = {
        label: dict(color=f"C{index}", linestyle=LINE_STYLES[place % len(LINE_STYLES)])
        for index, (_, members) in enumerate(data.groupby("family", sort=False))
        for place, label in enumerate(members["name"].unique())
    }
    figure, axes = plt.subplots(
        len(environments),
        len(sigmas),
        figsize=(2.9 * len(sigmas), 2.8 * len(environments)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, env_id in zip(axes, environments, strict=True):
        for axis, sigma in zip(row, sigmas, strict=True):
            panel = data[(data["env"] == env_id) & (data["sigma"] == sigma)]
            for label, curve in panel.groupby("name", sort=False):
                axis.semilogy(curve["step"], curve["mse_median"], label=label, **styles[label])
            axis.set_title(f"{env_id}, σ = {sigma:g}", fontsize=9)
            axis.grid(alpha=0.3)
    figure.supylabel("median squared error, standardised", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plot(args.files, args.out)


if __name__ == "__main__":
    main()
