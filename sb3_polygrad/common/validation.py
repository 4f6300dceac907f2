"""Checks of settings against the signature of the function that takes them: names, types, choices and ranges."""

from __future__ import annotations

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np


class Range(NamedTuple):
    """
    The values that a number may have, as part of an annotation: ``Annotated[float, Range(0.0, 1.0)]``.

    :param low: lower bound
    :param high: upper bound
    :param open_low: the lower bound itself is excluded
    :param open_high: the upper bound itself is excluded
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float, np.integer, np.floating))
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return bool(above and below)  # neither is true of NaN

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'greater than' if self.open_low else 'at least'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


Count = Annotated[int, Range(1)]
"""An integer of 1 or more."""

Positive = Annotated[float, Range(0.0, open_low=True)]
"""A number greater than 0."""

NotNegative = Annotated[float, Range(0.0)]
"""A number of 0 or more."""

Fraction = Annotated[float, Range(0.0, 1.0)]
"""A number in [0, 1]."""

Decay = Annotated[float, Range(0.0, 1.0, open_high=True)]
"""A number in [0, 1): what an average keeps of itself. (With 1 it would never move.)"""

LearningRate = Annotated[float, Range(0.0, 1.0, open_low=True)]
"""A number in (0, 1]."""

KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, (bool, np.bool_))),
    int: ("an integer", lambda value: isinstance(value, (int, np.integer)) and not isinstance(value, bool)),
    float: ("a finite number", lambda value: is_number(value) and math.isfinite(value)),
    str: ("a string", lambda value: isinstance(value, str)),
    dict: ("a dict", lambda value: isinstance(value, dict)),
    Mapping: ("a mapping", lambda value: isinstance(value, Mapping)),  # type: ignore[type-abstract]
    type(None): ("None", lambda value: value is None),
}
"""Types that are checked: how a message calls them, and whether a value is of them."""


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not True or False."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def choose(argument: str, name: Any, known: Iterable[str]) -> str:
    """
    Check a name against the known ones.

    :param argument: the argument that is checked, for the message
    :param name: what was given
    :param known: names that are allowed
    :raises ValueError: with the nearest known name
    """
    known = sorted(known)
    if name in known:
        return name
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ValueError(f"{argument}: {name!r} is not known; {hint}known are {', '.join(map(repr, known))}")


def check_settings(argument: str, function: Any, given: Mapping[str, Any], not_settings: Iterable[str] = ()) -> None:
    """
    Check settings against the parameters of the function or class that will take them.

    Plain types, ``None``, ``Literal`` choices and :class:`Range` are checked; any other annotation accepts everything.

    :param argument: where the settings stand, for the message; ``""`` for plain arguments
    :param function: a function or class
    :param given: the settings
    :param not_settings: parameters that the caller passes itself
    :raises TypeError: for a value of another type
    :raises ValueError: for an unknown name (with the nearest known one), or a value that is out of range
    """
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except NameError:  # annotations that only a type checker can resolve stay strings, and accept everything
        parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if not takes_any:
        for name in given:
            choose(argument, name, set(parameters) - {"self", *not_settings})
    prefix = f"{argument}: " if argument else ""
    for name, value in given.items():
        if name in parameters:
            _check_value(prefix, name, parameters[name].annotation, value)


def _check_value(prefix: str, name: str, hint: Any, value: Any) -> None:
    """Check a value against an annotation, whose alternatives may each have a range."""
    options = [_parts(option) for option in _alternatives(hint)]
    if not all(kind in KINDS or typing.get_origin(kind) is Literal for kind, _ in options):
        return
    of_type = [(kind, range_) for kind, range_ in options if _is_of(kind, value)]
    if not of_type:
        literals = [choice for kind, _ in options if kind not in KINDS for choice in typing.get_args(kind)]
        if literals and isinstance(value, str):
            choose(f"{prefix}{name}", value, literals)
        expected = " or ".join(KINDS[kind][0] if kind in KINDS else f"one of {literals}" for kind, _ in options)
        raise TypeError(f"{prefix}{name} must be {expected}, got {value!r}")
    ranges = [range_ for _, range_ in of_type]
    if not any(range_ is None or value in range_ for range_ in ranges):
        raise ValueError(f"{prefix}{name} must be {' or '.join(map(str, ranges))}, got {value!r}")


def _is_of(kind: Any, value: Any) -> bool:
    if kind in KINDS:
        return KINDS[kind][1](value)
    return isinstance(value, str) and value in typing.get_args(kind)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """``int | None`` to ``(int, NoneType)``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(option for part in typing.get_args(hint) for option in _alternatives(part))
    return (hint,)


def _parts(option: Any) -> tuple[Any, Range | None]:
    """``Annotated[int, Range(1)]`` to ``(int, Range(1))``."""
    ranges = [extra for extra in getattr(option, "__metadata__", ()) if isinstance(extra, Range)]
    plain = typing.get_args(option)[0] if hasattr(option, "__metadata__") else option
    origin = typing.get_origin(plain)
    return (origin if origin in KINDS else plain), (ranges[0] if ranges else None)
