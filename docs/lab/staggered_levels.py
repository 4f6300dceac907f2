"""
The noise level of every state at every iteration of the staggered sampler.

    python -m sb3_polygrad.plots.staggered_levels --out docs/results/staggered_levels.png

A panel for each pair of levels and lag: from one level for all states to one state after the other. A dot marks the iteration
from which on the action taken in that state is final.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch as th

from sb3_polygrad.diffusion.staggered import staggered_levels
from sb3_polygrad.plots.figure import save


def describe(n_levels: int, lag: float) -> str:
    """What the sampler is, between its two limits."""
    if lag == 0.0:
        return "trajectory diffusion"
    if lag < n_levels:
        return "staggered"
    return "one call per step" if n_levels == 1 else "autoregressive diffusion"


def plot(horizon: int, levels: Sequence[int], lags: Sequence[float], out: Path) -> None:
    """
    :param horizon: steps per trajectory
    :param levels: K of each panel
    :param lags: L of each panel
    :param out: picture to write
    """
    settings = list(zip(levels, lags, strict=True))
    grids = [staggered_levels(horizon, n_levels, lag) for n_levels, lag in settings]
    widths = [len(grid) for grid in grids]
    figure, axes = plt.subplots(
        1, len(grids), figsize=(12, 4), width_ratios=[w + 8 for w in widths], sharey=True, squeeze=False, layout="constrained"
    )
    for axis, grid, (n_levels, lag) in zip(axes[0], grids, settings, strict=True):
        image = axis.imshow(grid.T, cmap="Blues", vmin=0.0, vmax=1.0, origin="lower", aspect="auto")
        final = th.argmax((grid == 0.0).int(), dim=0)[:-1]  # no action is taken in the last state
        axis.plot(final, range(horizon), "o", color="C1", markersize=4)
        title = f"K = {n_levels}, L = {lag:g}: {len(grid) - 1} calls\n{describe(n_levels, lag)}"
        axis.set(title=title, xlabel="network calls made")
        axis.title.set_fontsize(9)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set(ylabel="state", yticks=range(horizon + 1))
    figure.colorbar(image, ax=axes[0, -1], label="noise level u", pad=0.02)
    figure.suptitle("orange: from here on the action in this state is final", fontsize=10)
    save(figure, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--levels", type=int, nargs="+", default=[4, 4, 4, 1], help="K of each panel")
    parser.add_argument("--lags", type=float, nargs="+", default=[0.0, 1.0, 4.0, 1.0], help="L of each panel")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plot(args.horizon, args.levels, args.lags, args.out)


if __name__ == "__main__":
    main()
