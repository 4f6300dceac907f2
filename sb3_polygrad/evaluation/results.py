"""Tables of results as csv files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def readable(value: Any) -> Any:
    """Floats with five significant digits, everything else as it is."""
    return f"{value:.5g}" if isinstance(value, float) else value


def beside(out: Path, ending: str) -> Path:
    """``runs/a_0.5`` to ``runs/a_0.5.csv``: nothing of a given name is taken for a suffix."""
    return out.with_name(out.name + ending)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """
    :param path: file to write; its folder is made
    :param rows: need not all have the same columns
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: readable(value) for name, value in row.items()} for row in rows)
