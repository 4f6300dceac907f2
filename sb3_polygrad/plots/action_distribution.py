"""
Figures 3 and 9 to 12: distribution of a - μ(s) over imagined trajectories, against the policy's, from the ``_histogram.csv``
files of :mod:`sb3_polygrad.evaluation.action_distribution`.

    python -m sb3_polygrad.plots.action_distribution docs/results/*_h10_histogram.csv --out docs/results/distribution_h10.png

A row of panels per environment and horizon, a panel per σ; the policy dashed. ``--rule no_clipping`` gives Figure 12.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sb3_polygrad.plots.figure import save


def plot(files: Sequence[Path], rule: str, out: Path) -> None:
    """
    :param files: csv files with the columns env, horizon, rule, sigma, z, density
    :param rule: of guidance
    :param out: picture to write
    :raises ValueError: if the files know nothing of that rule
    """
    data = pd.concat([pd.read_csv(file) for file in files])
    known = sorted(data["rule"].unique())
    data = data[data["rule"] == rule]
    if data.empty:
        raise ValueError(f"no file has the rule {rule!r}: there are {', '.join(known)}")
    rows = list(data[["env", "horizon"]].drop_duplicates().itertuples(index=False))
    sigmas = sorted(data["sigma"].unique(), reverse=True)
    figure, axes = plt.subplots(
        len(rows), len(sigmas), figsize=(2.3 * len(sigmas), 2.1 * len(rows)), squeeze=False, layout="constrained"
    )
    grid = np.linspace(-5.0, 5.0, 401)
    for row, (env, horizon) in zip(axes, rows, strict=True):
        for axis, sigma in zip(row, sigmas, strict=True):
            panel = data[(data["env"] == env) & (data["horizon"] == horizon) & (data["sigma"] == sigma)].sort_values("z")
            axis.plot(panel["z"] * sigma, panel["density"] / sigma, label="imagined")
            gaussian = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
            axis.plot(grid * sigma, gaussian / sigma, "--", color="black", linewidth=1, label="policy")
            axis.set_title(f"σ = {sigma:g}", fontsize=9)
            axis.set_yticks([])
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(f"{env}\nh = {horizon}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("a - μ(s)", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rule", default="policy_score")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plot(args.files, args.rule, args.out)


if __name__ == "__main__":
    main()
