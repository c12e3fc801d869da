"""Number types with a range."""

from __future__ import annotations

import pytest

from lightning_namo import types

WRONG = {
    "PositiveInt": 0,
    "NonNegativeInt": -1,
    "PositiveFloat": 0.0,
    "NonNegativeFloat": -0.5,
    "ClosedUnitInterval": 1.5,
    "OpenUnitInterval": 1.0,
    "HalfOpenUnit": 1.0,
}


@pytest.mark.parametrize("name", types.__all__)
def test_a_number_out_of_its_range_is_refused(name: str) -> None:
    kind = getattr(types, name)
    inside = 3 if name.endswith("Int") else 0.5
    assert kind(inside) == inside
    with pytest.raises(ValueError, match="does not conform to restriction"):
        kind(WRONG[name])


def test_half_open_takes_zero_and_is_made_once() -> None:
    assert types.HalfOpenUnit(0) == 0
    assert types.HalfOpenUnit is types.HalfOpenUnit
    with pytest.raises(AttributeError, match="no attribute 'NegativeInt'"):
        _ = types.NegativeInt
