"""What differs between two trainings of the same matrices, in words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Results = list[dict[str, Tensor]]  # of each matrix: weight and state
_NAMES = {"weight": "the weight", "momentum_buffer": "x.momentum"}
_NOISE = 1e-12  # of numbers near 1: a state may be what rounding leaves
_COUNTS = "skipped"  # which a matrix that is beside others may have, and not alone


def differences(actual: Results, expected: Results, start: Sequence[Tensor], tolerance: float) -> str:
    """What differs of the first matrix that does; "" if nothing does.

    Args:
        actual: Weights and states.
        expected: The same of another way to train.
        start: The weights before: how far weights are off is relative to their update.
        tolerance: Relative to the norm.
    """
    for ours, theirs, before in zip(actual, expected, start, strict=True):
        words = []
        for key, wanted in theirs.items():
            if key == _COUNTS:
                continue
            wanted = wanted.double()
            off = float((ours[key].double().reshape(wanted.shape) - wanted).norm())
            size = max(float((wanted - before.double() if key == "weight" else wanted).norm()), 1e-12)
            if not off <= tolerance * size + _NOISE * bool(tolerance):
                words.append(f"{_NAMES.get(key, f'x.{key}')} differs by {off / size:.1e} (relative)")
        if words:
            return ", ".join(words)
    return ""
