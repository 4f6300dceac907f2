"""What has to stand beside a number so that it can be trusted: command, versions, hardware, time."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sb3_polygrad.checkpoint.files import whole_file

OURS = (Path(__file__).parents[1] / "version.txt").read_text().strip()
PACKAGES = ("stable_baselines3", "sb3_contrib", "torch", "gymnasium", "mujoco", "numpy")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance(module: str, **details: Any) -> dict[str, Any]:
    """
    :param module: the module that was run with ``python -m``
    :param details: what else belongs to the measurement
    :return: a mapping to be written as json
    """
    return {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "versions": {"sb3_polygrad": OURS, **{package: _version(package) for package in PACKAGES}},
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        **details,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write json that a person can read, schedules as text; under its name it only appears whole."""

    def text(value: object) -> str:
        if callable(value):
            return repr(value)
        raise TypeError(f"{value!r} cannot be written as json")

    with whole_file(path) as file:
        file.write((json.dumps(content, indent=2, default=text) + "\n").encode())
