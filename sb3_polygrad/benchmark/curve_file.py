"""A run on disk: a csv file with a row per evaluation, and a json file beside it that says what was run."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from sb3_polygrad.benchmark.evaluations import MEASURES
from sb3_polygrad.benchmark.provenance import write_json
from sb3_polygrad.checkpoint.files import whole_file

COLUMNS = ("label", "algorithm", "env", "seed", *MEASURES)


class CurveFile:
    """
    :param path: of the csv file
    :param run: what all rows have in common: label, algorithm, env, seed
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run
        self.notes_path = path.with_suffix(".json")

    def read_notes(self) -> dict[str, Any] | None:
        """
        :return: what was run, or None if nothing was
        :raises ValueError: if the file is damaged
        """
        if not self.notes_path.is_file():
            return None
        try:
            notes = json.loads(self.notes_path.read_text())
            if {"run", "id", "steps", "continued"} <= notes.keys():
                return notes
        except (ValueError, AttributeError):  # no json, or no object
            pass
        raise ValueError(f"{self.notes_path} is damaged: move it away, and the csv file beside it")

    def begin(self, notes: dict[str, Any], rows: list[dict[str, str]]) -> None:
        """
        Begin the files anew; neither is ever half written.

        :param notes: what is run
        :param rows: that are kept, as :func:`read_rows` gives them
        """
        write_json(self.notes_path, notes)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        with whole_file(self.path) as file:
            file.write(text.getvalue().encode())

    def set_aside(self) -> None:
        """
        Keep the files as ``NAME.csv.before`` and ``NAME.json.before``: the run begins anew, and may be interrupted. Of several
        interrupted attempts the one with most rows is kept.
        """
        before = self.path.with_name(f"{self.path.name}.before")
        if len(read_rows(before)) < len(read_rows(self.path)):
            self.path.replace(before)
            self.notes_path.replace(self.notes_path.with_name(f"{self.notes_path.name}.before"))

    def append(self, row: dict[str, Any]) -> None:
        """Add an evaluation, as :class:`~sb3_polygrad.benchmark.evaluations.Evaluations` gives it."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({**self.run, **row})


def read_rows(path: Path) -> list[dict[str, str]]:
    """
    :param path: of a csv file
    :return: its whole rows (one that a kill has cut off is left out); none if there is no file
    :raises ValueError: if its columns are others than :data:`COLUMNS`, or a row is damaged
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader([line for line in file if line.endswith("\n")])
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{path} was not written by sb3_polygrad.benchmark.compare: its columns are {reader.fieldnames}")
    rows = list(reader)
    try:
        [float(row[name]) for row in rows for name in MEASURES]
    except (TypeError, ValueError):  # a value that is missing, or no number
        raise ValueError(f"{path} is damaged: one of its rows is not whole. Mend it, or move it away") from None
    return rows
