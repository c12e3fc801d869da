"""Former modules give what moved, with a warning that names its place."""

from __future__ import annotations

import importlib
import inspect

import pytest

from lightning_namo._moved import MOVED, RENAMED, find


@pytest.mark.parametrize(("former", "place"), [(former, place) for former in MOVED for place in MOVED[former]])
def test_a_former_module_gives_what_moved_and_warns(former: str, place: str) -> None:
    module = importlib.import_module(f"lightning_namo.{place}")
    own = [n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    name = next(n for n in own if not n.startswith("_") and n not in {*RENAMED, *RENAMED.values()})
    old = importlib.import_module(f"lightning_namo.{former}")
    with pytest.warns(DeprecationWarning, match=rf"{former}\.{name} is lightning_namo\.\S+\.{name} now"):
        moved = getattr(old, name)
    assert inspect.unwrap(moved) is inspect.unwrap(getattr(module, name))


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(AttributeError, match=r"module 'lightning_namo.base' has no attribute 'Nothing'"):
        _ = importlib.import_module("lightning_namo.base").Nothing
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        find("lightning_namo", "nowhere")
