"""What an argument may be, and the error in words for one that is not."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Range(NamedTuple):
    """What an argument may be.

    Attributes:
        accepts: Whether a value is right.
        expected: The same in words, after "to be".
    """

    accepts: Callable[[Any], bool]
    expected: str

    def has(self, value: Any) -> bool:
        """Whether a value is right; one that cannot be compared is not."""
        try:
            return self.accepts(value)
        except TypeError:
            return False


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number; True and False are none."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def choice(*options: str) -> Range:
    """One of some words."""
    return Range(lambda value: isinstance(value, str) and value in options, f"one of {options}")


def or_none(of: Range) -> Range:
    """A range, or None."""
    return Range(lambda value: value is None or of.accepts(value), f"{of.expected}, or None")


NOT_NEGATIVE = Range(lambda value: is_number(value) and value >= 0, "a finite number >= 0")
POSITIVE = Range(lambda value: is_number(value) and value > 0, "a finite number > 0")
UNIT = Range(lambda value: is_number(value) and 0 <= value < 1, "in [0, 1)")
OPEN_UNIT = Range(lambda value: is_number(value) and 0 < value < 1, "in (0, 1)")
COUNT = Range(lambda value: is_whole(value) and value >= 1, "a whole number >= 1")
COUNT_OR_ZERO = Range(lambda value: is_whole(value) and value >= 0, "a whole number >= 0")
BOOL = Range(lambda value: isinstance(value, bool), "True or False")


def check(condition: object, where: str, key: str, expected: str, value: object) -> None:
    """Raise a ValueError that names the argument, what was expected and what came."""
    if not condition:
        raise ValueError(f"{where}: expected {key} to be {expected} but got {value}.")


def check_ranges(arguments: Mapping[str, Any], where: str, ranges: Mapping[str, Range]) -> None:
    """Raise for an argument that is out of its range; those without a range are let pass.

    Args:
        arguments: By name.
        where: Whose they are.
        ranges: By name.

    Raises:
        ValueError: With the argument, its range and the value.
    """
    for key, value in arguments.items():
        if key in ranges:
            check(ranges[key].has(value), where, key, ranges[key].expected, repr(value))
