"""The report of a comparison: tables, figures and a page that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns

from sb3_polygrad.benchmark.provenance import write_json
from sb3_polygrad.benchmark.tables import read_results, return_table, seed_table


def write_report(
    folder: Path, out: Path, facts: dict[str, Any], at: Sequence[int] | None = None, ours: str = "polygrad"
) -> Path:
    """
    Write ``report.md``, its tables as csv files, ``curves.png``, and ``report.json``.

    :param folder: of the csv files of all runs
    :param out: folder of the report
    :param facts: what is written down about this call
    :param at: real steps to compare at; None for all at which a curve ends
    :param ours: label whose probability of improvement over the others is told
    :return: the page
    :raises ValueError: if there is nothing to report
    """
    rows = read_results(folder, ours)
    tables = {"returns": return_table(rows, at, ours), "seeds": seed_table(rows)}
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")
    plot(rows, out / "curves.png")
    write_json(out / "report.json", {**facts, "ours": ours})
    page = out / "report.md"
    sections = [
        "# Comparison",
        "![learning curves](curves.png)",
        *(_section(env, tables, ours) for env in rows["env"].unique()),
    ]
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def plot(rows: pd.DataFrame, path: Path) -> None:
    """
    Learning curves, a panel per environment: means over seeds, with bands from the worst to the best seed.

    :param rows: from :func:`~sb3_polygrad.benchmark.tables.read_results`
    :param path: of the picture
    """
    panels = {"col": "env", "col_wrap": min(3, rows["env"].nunique()), "height": 3.2, "aspect": 1.3}
    lines = {"x": "timesteps", "y": "mean_reward", "hue": "label", "kind": "line", "errorbar": ("pi", 100)}
    grid = sns.relplot(rows, **lines, **panels, facet_kws={"sharex": False, "sharey": False})
    grid.set_axis_labels("real steps", "return of deterministic episodes").set_titles("{col_name}")
    grid.savefig(path, dpi=130)


def _section(env: str, tables: Mapping[str, pd.DataFrame], ours: str) -> str:
    """All about one environment."""
    titles = {
        "returns": f"Returns; improvement is the probability that a seed of {ours} is better.",
        "seeds": "Single runs: last and best return, and minutes of training per 10,000 real steps.",
    }
    parts = [f"## {env}"]
    for name, title in titles.items():
        parts += [title, _markdown(tables[name].query("env == @env").drop(columns="env"))]
    return "\n\n".join(parts)


def _markdown(table: pd.DataFrame) -> str:
    lines = [[name.replace("_", " ") for name in table], ["---"] * len(table.columns)]
    lines += [[_readable(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _readable(value: Any) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
