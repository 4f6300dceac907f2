"""
Seconds per batch against the horizon from the csv files of :mod:`sb3_polygrad.evaluation.timing` (Figure 4).

    python -m sb3_polygrad.plots.timing docs/results/timing_walker2d.csv --out docs/results/timing.png

A panel per file. On a machine with other work to do, ``--measure cpu_seconds`` is what to look at.
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


def plot(files: Sequence[Path], out: Path, measure: str = "seconds") -> None:
    """
    :param files: csv files with the columns env, size, device, model, horizon, batch and the measure
    :param out: picture to write
    :param measure: column to draw
    """
    tables = [pd.read_csv(file) for file in files]
    models = list(dict.fromkeys(model for table in tables for model in table["model"]))
    figure, axes = plt.subplots(1, len(tables), figsize=(6.4 * len(tables), 5.0), squeeze=False, layout="constrained")
    for axis, table in zip(axes[0], tables, strict=True):
        for model, rows in table.groupby("model", sort=False):
            axis.loglog(rows["horizon"], rows[measure], "o-", color=f"C{models.index(str(model))}", label=model, markersize=4)
        first = table.iloc[0]
        axis.set(
            title=f"{first['env']}, {first['size']} sizes, {first['device']}",
            xlabel="horizon",
            ylabel=f"{measure.replace('_', ' ')} per batch of {first['batch']}",
        )
        axis.set_xticks(horizons := sorted(table["horizon"].unique()), map(str, horizons))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--measure", choices=["seconds", "cpu_seconds"], default="seconds", help="column to draw")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plot(args.files, args.out, args.measure)


if __name__ == "__main__":
    main()
