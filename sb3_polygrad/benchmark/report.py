"""The report of a comparison: tables, figures and a page that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sb3_polygrad.benchmark.comparison_tables import (
    cost_table,
    curve_table,
    improvement_table,
    reach_table,
    read_results,
    return_table,
    seed_table,
)
from sb3_polygrad.benchmark.provenance import write_json
from sb3_polygrad.plots.comparison import file_name, plot


def write_report(
    folder: Path,
    out: Path,
    facts: dict[str, Any],
    at: Sequence[int] | None = None,
    ours: str = "polygrad",
    reference: str = "ppo",
    targets: Mapping[str, float] | None = None,
) -> Path:
    """
    Write ``report.md``, its tables as csv files, its figures, and ``report.json``.

    :param folder: of the csv files of all runs
    :param out: folder of the report
    :param facts: what is written down about this call
    :param at: real steps to compare at; None for all at which a curve ends
    :param ours: label whose probability of improvement over the others is told
    :param reference: label whose final return the others are to reach
    :param targets: further returns to reach, per environment
    :return: the page
    :raises ValueError: if there is nothing to report
    """
    rows = read_results(folder, ours)
    seeds = seed_table(rows)
    curves = curve_table(rows)
    tables = {
        "curves": curves,
        "returns": return_table(rows, curves, at, ours),
        "improvement": improvement_table(rows, at, ours),
        "reaching": reach_table(rows, reference, targets or {}),
        "cost": cost_table(seeds),
        "seeds": seeds,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")
    plot(curves, out / "curves.png")
    environments = list(curves["env"].unique())
    for env in environments:
        plot(curves[curves["env"] == env], out / file_name(env))
    write_json(out / "report.json", {**facts, "ours": ours, "reference": reference, "targets": dict(targets or {})})
    page = out / "report.md"
    sections = [_overview(tables["improvement"], ours), *(_section(env, tables, ours) for env in environments)]
    page.write_text("\n\n".join(["# Comparison", *sections]) + "\n", encoding="utf-8")
    return page


def _overview(improvement: pd.DataFrame, ours: str) -> str:
    """All environments together."""
    parts = ["![learning curves](curves.png)"]
    if not improvement.empty:
        parts += [
            f"How likely a seed of {ours} is better than one of another label, mean over environments.",
            _markdown(improvement),
        ]
    return "\n\n".join(parts)


def _section(env: str, tables: Mapping[str, pd.DataFrame], ours: str) -> str:
    """All about one environment."""
    of_env = {name: table[table["env"] == env].drop(columns="env") for name, table in tables.items() if "env" in table}
    parts = [f"## {env}", f"![{env}]({file_name(env)})"]
    if "returns" in of_env:
        parts += [f"Returns; improvement is the probability that a seed of {ours} is better.", _markdown(of_env["returns"])]
    if not of_env.get("reaching", pd.DataFrame()).empty:
        parts += ["Real steps and minutes of training until a return is reached.", _markdown(of_env["reaching"])]
    parts += [
        "Minutes of training per 10,000 real steps, and the least that a seed kept of its best.",
        _markdown(of_env["cost"]),
    ]
    parts += ["Single runs.", _markdown(of_env["seeds"])]
    return "\n\n".join(parts)


def _markdown(table: pd.DataFrame) -> str:
    """A table in markdown; each interval stands behind its estimate."""
    columns = [name for name in table if not name.endswith(("_low", "_high"))]
    lines = [[name.replace("_", " ") for name in columns], ["---"] * len(columns)]
    for _, row in table.iterrows():
        lines.append([_readable(row[name]) + _interval(row, name) for name in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(row: pd.Series, name: str) -> str:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return "" if low is None or pd.isna(low) else f" ({_readable(low)} to {_readable(high)})"


def _readable(value: Any) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
