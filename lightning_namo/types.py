"""Number types with a range, for constructors that a command line calls.

`jsonargparse` refuses a value outside the range with a message that names the option. To a type checker, and
in calls from Python, they are plain `int` and `float`. Annotations write ``types.PositiveInt``, so that jsonargparse is
imported only when a command line asks what that is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    PositiveFloat = float
    NonNegativeFloat = float
    ClosedUnitInterval = float
    OpenUnitInterval = float
    HalfOpenUnit = float

__all__ = [
    "ClosedUnitInterval",
    "HalfOpenUnit",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "PositiveFloat",
    "PositiveInt",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from jsonargparse import typing

        if name == "HalfOpenUnit":
            unit = [(">=", 0), ("<", 1)]
            made = typing.restricted_number_type(name, float, unit, docstring="float restricted to be >=0 and <1")
        else:
            made = getattr(typing, name)
        return globals().setdefault(name, made)
