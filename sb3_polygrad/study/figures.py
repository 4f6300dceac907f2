"""
Figures of a study, from the tables of :mod:`sb3_polygrad.study.runner`.

    python -m sb3_polygrad.study.figures errors.csv --out errors.png
    python -m sb3_polygrad.study.figures grid.csv --kind grid --step 9 --out grid.png
    python -m sb3_polygrad.study.figures actions.csv --kind histogram --out actions.png

``lines`` draws a measure by step, shaded from the lowest to the highest seed; ``sigma`` draws it against the standard
deviation of the policy; ``grid`` is a table over K and L, of variants named "K=2, L=1"; ``histogram`` shows the measure
``action`` beside N(0, 1). There is a column per environment and, but for ``sigma``, a row per σ.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm


def lines(data: pd.DataFrame, x: str, measure: str) -> sns.FacetGrid:
    """A measure against ``step`` or ``sigma``."""
    rows = "sigma" if x == "step" and data["sigma"].nunique() > 1 else None
    style = "variant" if data["variant"].nunique() > 1 else None
    facets = sns.relplot(
        data, x=x, y="value", hue="model", style=style, col="env", row=rows, kind="line", errorbar=("pi", 100), height=3.6
    )
    if (data["value"] > 0.0).all():
        facets.set(yscale="log")
    if x == "sigma":
        facets.set(xscale="log")
    return facets.set_axis_labels(x, measure)


def grid(data: pd.DataFrame) -> sns.FacetGrid:
    """A coloured table of the mean over seeds, by K and L."""
    names = data["variant"].str.extract(r"^K=(?P<K>[\d.]+), L=(?P<L>[\d.]+)$").astype(float)
    data = data.assign(**names).dropna(subset=["K", "L"])
    norm = LogNorm(data["value"].min(), data["value"].max())

    def table(data: pd.DataFrame, **_: Any) -> None:
        cells = data.pivot_table(index="K", columns="L", values="value")
        sns.heatmap(cells, annot=True, fmt=".2g", norm=norm, cmap="YlOrRd", cbar=False)

    facets = sns.FacetGrid(data, col="env", row="sigma", height=3.2, sharex=False, sharey=False)
    return facets.map_dataframe(table).set_axis_labels("L", "K")


def histogram(data: pd.DataFrame) -> sns.FacetGrid:
    """Densities of the standardised actions."""
    facets = sns.displot(
        data, x="value", hue="variant", col="env", row="sigma", kind="hist", stat="density", common_norm=False,
        element="step", fill=False, binrange=(-5, 5), bins=50, height=3.2, facet_kws={"sharey": False},
    )  # fmt: skip
    z = np.linspace(-5, 5, 201)
    for axis in facets.axes.flat:
        axis.plot(z, np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi), ":", color="black")
    return facets.set_axis_labels("(a - μ) / σ", "density")


def draw(table: pd.DataFrame, kind: str, measure: str, step: int | None) -> sns.FacetGrid:
    """A figure of one kind (see the head of this file); ``sigma`` and ``grid`` are of one step, the last if not given."""
    measure = "action" if kind == "histogram" else measure
    data = table[(table["measure"] == measure) & ((table["step"] > 0) | (kind != "lines"))]
    if kind in ("sigma", "grid"):
        data = data[data["step"] == (data["step"].max() if step is None else step)]
    if data.empty:
        raise ValueError(f"there is no {measure!r} to draw; the measures are {sorted(table['measure'].unique())}")
    if kind == "histogram":
        return histogram(data)
    return grid(data) if kind == "grid" else lines(data, "sigma" if kind == "sigma" else "step", measure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="csv files of studies")
    parser.add_argument("--kind", choices=["lines", "sigma", "grid", "histogram"], default="lines")
    parser.add_argument("--measure", default="mse_median")
    parser.add_argument("--step", type=int, help="step to draw in sigma and grid; the last if not given")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    table = pd.concat([pd.read_csv(file) for file in args.files], ignore_index=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(table, args.kind, args.measure, args.step).savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
