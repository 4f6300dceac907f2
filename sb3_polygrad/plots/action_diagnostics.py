"""
What Figure 3 does not show: whether imagined actions are *independent* draws, from the csv files of
:mod:`sb3_polygrad.evaluation.action_distribution`.

    python -m sb3_polygrad.plots.action_diagnostics docs/results/distribution_*_h10.csv --out docs/results/diagnostics.png

Over σ: pooled standard deviation, distance to N(0, 1), lag-1 autocorrelation, share predictable from the state; over the steps
of the trajectory (from the ``_steps.csv`` beside each file): standard deviation for one σ. The dotted line is what draws have.
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

MEASURES = {
    "action_std": ("pooled standard deviation", 1.0),
    "ks": ("KS distance to N(0, 1)", 0.0),
    "autocorrelation": ("lag-1 autocorrelation", 0.0),
    "predictable": ("predictable from the state (R²)", 0.0),
}


def plot(files: Sequence[Path], rule: str, sigma: float, out: Path) -> None:
    """
    :param files: csv files with the columns env, horizon, rule, sigma and the measures
    :param rule: of guidance
    :param sigma: standard deviation of the policy in the panel over steps
    :param out: picture to write
    """
    data = pd.concat([pd.read_csv(file) for file in files])
    steps = pd.concat([pd.read_csv(file.with_name(f"{file.stem}_steps.csv")) for file in files])
    figure, axes = plt.subplots(1, len(MEASURES) + 1, figsize=(2.8 * (len(MEASURES) + 1), 3.1), layout="constrained")
    for axis, (measure, (title, ideal)) in zip(axes, MEASURES.items(), strict=False):
        for (env, horizon), curve in data[data["rule"] == rule].groupby(["env", "horizon"]):
            axis.semilogx(curve["sigma"], curve[measure], "o-", markersize=3, label=f"{env}, h = {horizon}")
        axis.axhline(ideal, linestyle=":", color="black", linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("σ")
    chosen = steps[(steps["rule"] == rule) & (steps["sigma"] == sigma)]
    for _, curve in chosen.groupby(["env", "horizon"]):
        axes[-1].plot(curve["step"] / curve["step"].max(), curve["action_std"], "o-", markersize=3)
    axes[-1].axhline(1.0, linestyle=":", color="black", linewidth=1)
    axes[-1].set_title(f"standard deviation, σ = {sigma:g}", fontsize=9)
    axes[-1].set_xlabel("step / h")
    for axis in axes:
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    save(figure, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rule", default="policy_score")
    parser.add_argument("--sigma", type=float, default=0.1, help="of the panel over steps")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plot(args.files, args.rule, args.sigma, args.out)


if __name__ == "__main__":
    main()
