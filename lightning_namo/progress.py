"""Progress bars of commands, on standard error: none before two seconds, and none where that is no terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

DEFAULTS: dict[str, Any] = {"delay": 2, "disable": None, "miniters": 0}
"""Arguments of tqdm, unless its environment variables have others, such as TQDM_DISABLE=1."""


def progress_bar(desc: str, unit: str, total: float, initial: float = 0) -> Any:
    """Return a bar of tqdm, to be updated with what is done.

    Args:
        desc: What is being done.
        unit: Of what; "B" for bytes.
        total: How much there is to do.
        initial: How much was done before.
    """
    options = {name: value for name, value in DEFAULTS.items() if f"TQDM_{name.upper()}" not in os.environ}
    return tqdm(desc=desc, unit=unit, unit_scale=unit == "B", total=total, initial=initial, **options)


def counted(
    items: Iterable[T], size: Callable[[T], float], desc: str, unit: str, total: float, initial: float = 0
) -> Iterator[T]:
    """Yield items, with a bar that adds the size of each when the next one is asked for; see `progress_bar`."""
    with progress_bar(desc, unit, total, initial) as bar:
        for item in items:
            yield item
            bar.update(size(item))
