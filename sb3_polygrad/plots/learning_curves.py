"""
Learning curves from the csv files of :mod:`sb3_polygrad.benchmark.learning_curves`.

    python -m sb3_polygrad.plots.learning_curves docs/results/hopper_*.csv --out docs/results/hopper.png

One line per label: the mean over seeds, with every seed behind it.
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


def plot(files: Sequence[Path], out: Path) -> None:
    """
    :param files: csv files with the columns label, env, seed, timesteps, mean_reward
    :param out: picture to write
    """
    data = pd.concat([pd.read_csv(file) for file in files])
    environments = list(data["env"].unique())
    figure, axes = plt.subplots(1, len(environments), figsize=(5.5 * len(environments), 3.8), squeeze=False)
    colors = {label: f"C{index}" for index, label in enumerate(data["label"].unique())}
    for axis, env_id in zip(axes[0], environments, strict=True):
        for label, curves in data[data["env"] == env_id].groupby("label", sort=False):
            for _, curve in curves.groupby("seed"):
                axis.plot(curve["timesteps"], curve["mean_reward"], color=colors[label], alpha=0.3, linewidth=0.9)
            mean = curves.groupby("timesteps")["mean_reward"].mean()
            n_seeds = curves["seed"].nunique()
            name = f"{label} ({n_seeds} seeds)" if n_seeds > 1 else str(label)
            axis.plot(mean.index, mean.values, color=colors[label], linewidth=2, label=name)
        axis.set(title=env_id, xlabel="real steps", ylabel="deterministic return")
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.tight_layout()
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
