"""The dtypes in which Newton-Schulz iterates: tests run both on every machine, whatever its CPU takes by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

ITERATIONS = ("bfloat16", "float32")


@contextmanager
def iterating_in(dtype: str | None) -> Iterator[None]:
    """Set the iteration's dtype by name, for this process and those that it starts; None: leave it to the device."""
    from lightning_namo.polar.iteration_dtype import ITERATION_DTYPE

    with mock.patch.dict(os.environ):
        os.environ.pop(ITERATION_DTYPE, None)
        if dtype is not None:
            os.environ[ITERATION_DTYPE] = dtype
        yield
