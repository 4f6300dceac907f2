"""Checks of plain settings: names against the known ones, values against the annotations of the function that takes them."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("an integer", lambda value: isinstance(value, (int, np.integer)) and not isinstance(value, bool)),
    float: ("a finite number", lambda value: is_number(value) and math.isfinite(value)),
    str: ("a string", lambda value: isinstance(value, str)),
    type(None): ("None", lambda value: value is None),
}
"""Types of settings that are checked: how they are called, and what is of them."""


def choose(argument: str, name: str, known: Iterable[str]) -> str:
    """
    Check a name against the known ones.

    :param argument: the argument that is checked, for the message
    :raises ValueError: with the nearest known name
    """
    known = sorted(known)
    if name in known:
        return name
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ValueError(f"{argument}: {name!r} is not known; {hint}known are {', '.join(map(repr, known))}")


def is_number(value: Any) -> bool:
    """A number, and not True or False."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def at_least_one(text: str) -> int:
    """Of a command line: an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def json_object(text: str) -> dict[str, Any]:
    """Of a command line: ``{"gamma": 0.9}``."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is no json ({error}): {text}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be like {{"gamma": 0.9}}, got {text}')
    return value


def check_types(argument: str, function: Any, given: Mapping[str, Any]) -> None:
    """
    Refuse settings whose type is not the annotated one; what is annotated with anything but plain types is left alone.

    :param argument: where the settings stand, for the message
    :param function: a function or class that will take them
    :param given: the settings
    :raises TypeError: for a setting that is of another kind than the function says
    """
    hints = typing.get_type_hints(vars(function)["__init__"] if isinstance(function, type) else function)
    for name, value in given.items():
        options = [_plain(option) for option in _options(hints.get(name))]
        if not options or not all(option in KINDS for option in options):
            continue
        if not any(KINDS[option][1](value) for option in options):
            expected = " or ".join(KINDS[option][0] for option in options)
            raise TypeError(f"{argument}: {name} must be {expected}, got {value!r}")


def _options(hint: Any) -> tuple[Any, ...]:
    """``int | None`` to ``(int, NoneType)``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return () if hint is None else (hint,)


def _plain(option: Any) -> Any:
    """A choice among strings is a string here; the function itself knows the choices."""
    if typing.get_origin(option) is Literal and all(isinstance(choice, str) for choice in typing.get_args(option)):
        return str
    return option
