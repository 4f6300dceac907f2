"""Checks of settings against a signature: names, types, choices and ranges."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest

from sb3_polygrad.common.validation import (
    Count,
    Decay,
    Fraction,
    LearningRate,
    NotNegative,
    Positive,
    Range,
    check_settings,
    choose,
    is_number,
)

if TYPE_CHECKING:
    from nowhere import OnlyForTypeCheckers  # type: ignore[import-not-found]

NAN, INF = float("nan"), float("inf")


# ---------------------------------------------------------------------- names


def test_a_known_name_is_returned() -> None:
    assert choose("sampler", "staggered", ["policy_guided", "staggered"]) == "staggered"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stagered", "sampler: 'stagered' is not known; did you mean 'staggered'? known are 'policy_guided', 'staggered'"),
        ("policy", "sampler: 'policy' is not known; did you mean 'policy_guided'? known are 'policy_guided', 'staggered'"),
        ("xyz", "sampler: 'xyz' is not known; known are 'policy_guided', 'staggered'"),
        ("", "sampler: '' is not known; known are 'policy_guided', 'staggered'"),
        (None, "sampler: None is not known; known are 'policy_guided', 'staggered'"),
        (3, "sampler: 3 is not known; known are 'policy_guided', 'staggered'"),
        (["staggered"], "sampler: ['staggered'] is not known; did you mean 'staggered'? known are"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(name: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        choose("sampler", name, {"staggered", "policy_guided"})
    assert str(error.value).startswith(message)


def settings(width: Count = 4, rate: LearningRate = 1e-3, kind: Literal["a", "bee"] = "a") -> None: ...


def test_names_are_those_of_the_parameters() -> None:
    check_settings("kwargs", settings, {"width": 1, "rate": 0.5, "kind": "bee"})
    check_settings("kwargs", settings, {})
    with pytest.raises(ValueError, match=r"^kwargs: 'widht' is not known; did you mean 'width'"):
        check_settings("kwargs", settings, {"widht": 1})


def test_parameters_that_the_caller_passes_are_no_settings() -> None:
    with pytest.raises(ValueError, match=r"^kwargs: 'width' is not known; .*known are 'kind', 'rate'"):
        check_settings("kwargs", settings, {"width": 1}, not_settings=["width"])


def test_a_function_that_takes_any_name_is_given_any() -> None:
    def takes_any(width: Count, **kwargs: Any) -> None: ...

    check_settings("kwargs", takes_any, {"unheard_of": object()})
    with pytest.raises(ValueError, match=r"^kwargs: width must be at least 1, got 0"):
        check_settings("kwargs", takes_any, {"width": 0})


def test_plain_arguments_need_no_prefix() -> None:
    with pytest.raises(ValueError, match=r"^width must be at least 1, got 0"):
        check_settings("", settings, {"width": 0})


# ---------------------------------------------------------------------- what may be checked


class Base:
    def __init__(self, width: Count = 4) -> None: ...


class Inherits(Base):
    """Has no constructor of its own."""


@dataclass
class Data:
    width: Count = 4


class Instance:
    def __call__(self, width: Count = 4) -> None: ...


def makes(other: Any, width: Count = 4) -> None: ...


@pytest.mark.parametrize("function", [Base, Inherits, Data, Instance(), functools.partial(makes, None), Base(1).__init__])
def test_everything_that_can_be_called_is_checked(function: Any) -> None:
    check_settings("kwargs", function, {"width": 1})
    with pytest.raises(ValueError, match="kwargs: width must be at least 1"):
        check_settings("kwargs", function, {"width": 0})
    with pytest.raises(TypeError, match="kwargs: width must be an integer"):
        check_settings("kwargs", function, {"width": 1.5})
    for name in ("widht", "self"):
        with pytest.raises(ValueError, match=f"kwargs: '{name}' is not known"):
            check_settings("kwargs", function, {name: 1})


def test_annotations_that_cannot_be_resolved_accept_everything() -> None:
    def function(width: Count, other: OnlyForTypeCheckers) -> None: ...

    check_settings("kwargs", function, {"width": 1, "other": 2})
    with pytest.raises(ValueError, match="did you mean 'other'"):
        check_settings("kwargs", function, {"othr": 2})


@pytest.mark.parametrize("annotation", [Any, Callable[[float], float], Base, int | Base, "nonsense", None])
def test_other_annotations_accept_everything(annotation: Any) -> None:
    for value in (None, 3, "x", object()):
        check_value(annotation, value)


def test_no_annotation_accepts_everything() -> None:
    check_settings("", lambda value: None, {"value": object()})


# ---------------------------------------------------------------------- types


def check_value(annotation: Any, value: Any) -> None:
    def function(value: Any) -> None: ...

    function.__annotations__["value"] = annotation
    check_settings("", function, {"value": value})


TYPES: dict[Any, tuple[list[Any], list[Any], str]] = {
    bool: ([True, False, np.bool_(True)], [1, 0, "True", None, 0.0], "True or False"),
    int: ([0, -3, 2**70, np.int64(3)], [True, np.bool_(True), 1.0, "1", None, NAN, np.float32(1.0)], "an integer"),
    float: (
        [0.5, 3, -1e300, np.float32(0.5), np.int64(3)],
        [NAN, INF, -INF, np.float64("nan"), True, "0.5", None, [0.5]],
        "a finite number",
    ),
    str: (["", "x"], [1, None, b"x"], "a string"),
    dict[str, Any]: ([{}, {"a": 1}], [None, [], "x", [("a", 1)]], "a dict"),
    Mapping[str, Any]: ([{}, {"a": 1}], [None, [], "x"], "a mapping"),
    int | None: ([None, 3], ["3", 1.5, True], "an integer or None"),
    str | float | None: ([None, "x", 0.5], [[], NAN, True], "a string or a finite number or None"),
}


@pytest.mark.parametrize("annotation", TYPES)
def test_values_of_the_type_are_accepted(annotation: Any) -> None:
    for value in TYPES[annotation][0]:
        check_value(annotation, value)


@pytest.mark.parametrize("annotation", TYPES)
def test_values_of_another_type_are_refused(annotation: Any) -> None:
    _, others, words = TYPES[annotation]
    for value in others:
        with pytest.raises(TypeError) as error:
            check_value(annotation, value)
        assert str(error.value) == f"value must be {words}, got {value!r}"


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        *[(value, True) for value in (1, 0.5, NAN, np.int32(1), np.float32(1))],
        *[(value, False) for value in (True, np.bool_(False), "1", None, [1])],
    ],
)
def test_what_is_a_number(value: Any, is_one: bool) -> None:
    assert is_number(value) is is_one


# ---------------------------------------------------------------------- choices


CHOICES = Literal["pathwise", "ppo", "a2c"]


@pytest.mark.parametrize("annotation", [CHOICES, CHOICES | None, None | CHOICES])
def test_choices(annotation: Any) -> None:
    for value in ("pathwise", "ppo", "a2c"):
        check_value(annotation, value)
    with pytest.raises(ValueError) as error:
        check_value(annotation, "pppo")
    assert str(error.value) == "value: 'pppo' is not known; did you mean 'ppo'? known are 'a2c', 'pathwise', 'ppo'"
    for value in (3, ["ppo"], True, NAN):
        with pytest.raises(TypeError, match=r"value must be .*one of \['pathwise', 'ppo', 'a2c'\]"):
            check_value(annotation, value)


def test_none_is_no_choice_unless_it_is_allowed() -> None:
    check_value(CHOICES | None, None)
    with pytest.raises(TypeError, match=r"value must be one of .*, got None"):
        check_value(CHOICES, None)


def test_choices_beside_numbers() -> None:
    annotation = Literal["auto"] | Count
    check_value(annotation, "auto")
    check_value(annotation, 1)
    with pytest.raises(ValueError, match="did you mean 'auto'"):
        check_value(annotation, "auot")
    with pytest.raises(ValueError, match="value must be at least 1, got 0"):
        check_value(annotation, 0)


# ---------------------------------------------------------------------- ranges


RANGES: list[tuple[Any, list[float], list[float], str]] = [
    (Count, [1, 2, 10**9], [0, -1], "at least 1"),
    (Positive, [1e-300, 1, 1e300], [0.0, -1e-300, 0], "greater than 0"),
    (NotNegative, [0.0, 0, 1e300], [-1e-300, -1], "at least 0"),
    (Fraction, [0, 0.0, 0.5, 1.0, 1], [-1e-9, 1.0 + 1e-9, 2], "in [0, 1]"),
    (Decay, [0, 0.99], [1.0, 1, -1e-9], "in [0, 1)"),
    (LearningRate, [1e-300, 1.0], [0.0, 1.0 + 1e-9], "in (0, 1]"),
    (Annotated[float, Range(-2.5, 0.25, True, True)], [-2.4, 0.0], [-2.5, 0.25], "in (-2.5, 0.25)"),
    (Annotated[int, Range(-1)], [-1, 0, 5], [-2], "at least -1"),
    (Annotated[int, Range(-1, open_low=True)], [0, 5], [-1], "greater than -1"),
    (Annotated[float, Range()], [-1e300, 1e300], [], ""),
]


@pytest.mark.parametrize(("annotation", "inside", "outside", "words"), RANGES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_ranges(annotation: Any, inside: list[float], outside: list[float], words: str, wrapped: bool) -> None:
    annotation = annotation | None if wrapped else annotation
    if wrapped:
        check_value(annotation, None)
    for value in inside:
        check_value(annotation, value)
        check_value(annotation, np.asarray(value)[()])
    for value in outside:
        with pytest.raises(ValueError) as error:
            check_value(annotation, value)
        assert str(error.value) == f"value must be {words}, got {value!r}"
    for value in (NAN, np.float32("nan"), INF, -INF, True, "1"):
        with pytest.raises(TypeError, match=r"^value must be"):
            check_value(annotation, value)


def test_nan_is_in_no_range() -> None:
    for range_ in (Range(), Range(0.0), Range(high=1.0), Range(-1.0, 1.0)):
        assert math.nan not in range_ and 0.5 in range_


def test_a_value_needs_only_one_of_several_ranges() -> None:
    annotation = Annotated[int, Range(1, 3)] | Annotated[int, Range(10)]
    for value in (1, 3, 10, 99):
        check_value(annotation, value)
    with pytest.raises(ValueError, match=r"^value must be in \[1, 3\] or at least 10, got 5"):
        check_value(annotation, 5)


def test_ranges_hold_for_values_of_their_own_type() -> None:
    annotation = Count | str
    check_value(annotation, "")
    with pytest.raises(ValueError, match="value must be at least 1, got 0"):
        check_value(annotation, 0)
    # A plain float has no range, and 0 is one too.
    check_value(Count | float, 0)
