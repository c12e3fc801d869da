"""Number types with a range, for constructors that a command line calls.

`jsonargparse` refuses a value outside the range with a message that names the option. To a type checker, and
in calls from Python, they are plain `int` and `float`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    PositiveFloat = float
    NonNegativeFloat = float
    ClosedUnitInterval = float
    OpenUnitInterval = float
    HalfOpenUnit = float
else:
    from jsonargparse.typing import (
        ClosedUnitInterval,
        NonNegativeFloat,
        NonNegativeInt,
        OpenUnitInterval,
        PositiveFloat,
        PositiveInt,
        restricted_number_type,
    )

    HalfOpenUnit = restricted_number_type(
        "HalfOpenUnit", float, [(">=", 0), ("<", 1)], docstring="float restricted to be >=0 and <1"
    )

__all__ = [
    "ClosedUnitInterval",
    "HalfOpenUnit",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OpenUnitInterval",
    "PositiveFloat",
    "PositiveInt",
]
