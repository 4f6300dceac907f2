"""The configuration files that come with the package, for those who do not go through the zoo."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import LinearSchedule

from sb3_polygrad.common.validation import choose

_PACKAGE = Path(__file__).parent

HYPERPARAMS = folder if (folder := _PACKAGE / "hyperparams").is_dir() else _PACKAGE.parent / "hyperparams"
"""Folder of the files: in the package where it was installed from a wheel, beside it in a checkout."""

SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf")
"""Entries that may be schedules."""

ZOO_ONLY = ("n_timesteps", "policy")
"""Entries that the zoo needs and that are not keyword arguments of a constructor call."""


def load_hyperparams(name: str, env_id: str) -> dict[str, Any]:
    """
    Settings of an algorithm for an environment, as the zoo would use them.

    >>> PolyGRAD("MlpPolicy", "Hopper-v5", **load_hyperparams("polygrad-paper", "Hopper-v5"))

    :param name: file in ``hyperparams/`` without its suffix: ``"polygrad"``, ``"polygrad-paper"``, ``"ppo"``, ...
    :param env_id: environment; the file's ``default`` entry stands for those that it does not name
    :return: keyword arguments for the constructor of the algorithm
    :raises ValueError: for an unknown name, with the nearest known one, or a schedule that is none
    """
    import yaml  # here only: training needs no files

    choose("name", name, [path.stem for path in HYPERPARAMS.glob("*.yml")])
    entries = yaml.safe_load((HYPERPARAMS / f"{name}.yml").read_text(encoding="utf-8"))
    entry = entries.get(env_id, entries["default"])
    return {key: _schedule(key, value) for key, value in entry.items() if key not in ZOO_ONLY}


def constructor_arguments(text: str) -> dict[str, Any]:
    """
    Parse settings on a command line: json such as ``{"learning_rate": "lin_0.001"}``, understood as in the files.

    :param text: a json object
    :return: keyword arguments for the constructor of the algorithm
    :raises argparse.ArgumentTypeError: for anything else
    """
    try:
        settings = json.loads(text)
        return {key: _schedule(key, value) for key, value in settings.items()}
    except (ValueError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f'must be json like {{"gamma": 0.9}}, got {text} ({error})') from None


def _schedule(name: str, value: Any) -> Any:
    """``lin_0.001``, the zoo's way to write a schedule: from that value linearly to 0. Anything else stays as it is."""
    if name not in SCHEDULES or not isinstance(value, str):
        return value
    kind, _, start = value.partition("_")
    try:
        return {"lin": lambda: LinearSchedule(float(start), 0.0, 1.0)}[kind]()
    except (KeyError, ValueError):
        raise ValueError(f"{name}: {value!r} is no schedule; write a number, or for instance lin_0.001") from None
