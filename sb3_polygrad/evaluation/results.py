"""Tables of results as csv files."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from sb3_polygrad.common.files import whole_file


def readable(value: Any) -> Any:
    """Floats with five significant digits, everything else as it is."""
    return f"{value:.5g}" if isinstance(value, float) else value


def beside(out: Path, ending: str) -> Path:
    """``runs/a_0.5`` to ``runs/a_0.5.csv``: nothing of a given name is taken for a suffix."""
    return out.with_name(out.name + ending)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """
    A table in the place of the former one, which stays if this cannot be written to the end.

    :param path: file to write; its folder is made
    :param rows: need not all have the same columns
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows({name: readable(value) for name, value in row.items()} for row in rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())
