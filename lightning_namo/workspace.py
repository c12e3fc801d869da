"""Scratch memory that is used again, where taking new memory is slow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes


class Workspace:
    """An arena on the CPU: what is taken within a frame is free again when the frame ends.

    New memory costs a page fault for every 4 KiB there, and torch gives large blocks back to the system. An
    accelerator's allocator keeps its blocks, and takes its own way here.
    """

    def __init__(self) -> None:
        self._arena = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = self._most = 0
        self._open: list[object] = []  # a mark for each frame

    @property
    def nbytes(self) -> int:
        """Bytes that are kept: the most that was in use at a time."""
        return self._arena.numel()

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any values, valid until the frame ends."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        begin = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        self._used = begin + math.prod(shape) * dtype.itemsize
        self._most = max(self._most, self._used)
        if self._used > self._arena.numel():  # of the first step, or of more matrices than in the last
            return torch.empty(shape, dtype=dtype, device=device)
        return self._arena[begin : self._used].view(dtype).view(*shape)

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of any values with the shape of another, contiguous, valid until the frame ends."""
        return self.take(tensor.shape, dtype or tensor.dtype, tensor.device)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Within it memory is taken; frames nest. After the outermost the arena has the size that was needed."""
        mark, used = object(), self._used
        self._open.append(mark)
        try:
            yield
        finally:
            if mark in self._open:  # not of a generator that is closed after an error, when the outer frame has ended
                del self._open[self._open.index(mark) :]
                self._used = used
            if not self._open and self._most > self._arena.numel():
                self._arena = torch.empty(0, dtype=torch.uint8, device="cpu")  # before the larger one is allocated
                self._arena = torch.empty(self._most, dtype=torch.uint8, device="cpu")
