"""
Levels and lags of the staggered sampler: error and calls over K and L, from the csv files of
:mod:`sb3_polygrad.evaluation.sampler_study`.

    python -m sb3_polygrad.plots.sampler_grid docs/results/samplers_hopper_h10_grid.csv --out docs/results/sampler_grid.png

A panel per σ with the median error after nine steps, and one with the network calls; a column per denoiser and lag.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from sb3_polygrad.plots.figure import save


def draw_table(axis: Axes, table: pd.DataFrame, norm: LogNorm, cmap: str, title: str) -> None:
    """Coloured cells with their numbers."""
    axis.imshow(table, norm=norm, cmap=cmap, aspect="auto")
    for i, values in enumerate(table.to_numpy()):
        for j, value in enumerate(values):
            axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=8)
    axis.set(title=title, xticks=range(table.shape[1]))
    axis.set_xticklabels(table.columns, rotation=90, fontsize=8)


def name_columns(data: pd.DataFrame) -> list[str]:
    """
    Adds to every row the name of its column: denoiser and L, or "L = K" for a denoiser that has no other lag.

    :param data: with the columns denoiser, K and L
    :return: the columns in their order
    """
    autoregressive = (data["K"] == data["L"]).groupby(data["denoiser"]).transform("all")
    data["column"] = data["denoiser"] + ", L = " + data["L"].map("{:g}".format).mask(autoregressive, "K")
    return list(data.sort_values(["denoiser", "L"])["column"].unique())


def plot(file: Path, out: Path) -> None:
    """
    :param file: csv with the columns env, horizon, sampler, denoiser, K, L, sigma, calls, mse9_median
    :param out: picture to write
    """
    data = pd.read_csv(file)
    data = data[data["sampler"] == "staggered"].copy()
    columns = name_columns(data)
    sigmas = sorted(data["sigma"].unique(), reverse=True)
    figure, axes = plt.subplots(
        1, len(sigmas) + 1, figsize=(2.7 * (len(sigmas) + 1), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    norm = LogNorm(data["mse9_median"].min() / 2, data["mse9_median"].max())
    for axis, sigma in zip(axes[0], sigmas, strict=False):
        table = data[data["sigma"] == sigma].pivot_table(index="K", columns="column", values="mse9_median")[columns]
        draw_table(axis, table, norm, "YlOrRd", f"median error, σ = {sigma:g}")
    calls = data.pivot_table(index="K", columns="column", values="calls")[columns]
    draw_table(axes[0, -1], calls, LogNorm(data["calls"].min() / 2, data["calls"].max() * 2), "Blues", "network calls")
    axes[0, 0].set(ylabel="K", yticks=range(len(calls)), yticklabels=[f"{n:g}" for n in calls.index])
    figure.suptitle(
        f"{data['env'].iloc[0]}, horizon {data['horizon'].iloc[0]}: staggered sampler after nine steps", fontsize=11
    )
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
