"""Windows of a token file, in an order that a run can leave and take up again on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]
"""Token ids and the ids that follow them, both `(B, T)` int64."""

IGNORED = -100
"""Target of a token that does not count."""

NO_WINDOW = -1
"""Index of a window that is not there: its targets are all `IGNORED`."""

Indices = np.ndarray[Any, np.dtype[np.int64]]


class TokenWindows(Dataset[Batch]):
    """A `.bin` file of uint16 token ids, cut into windows of `block_size` + 1 tokens.

    A window starts with the last token of the one before, so that each token is predicted once. What does not
    fill a window at the end is left out.

    Args:
        path: The file. It is opened for every batch and never held open, so the object is cheap to send to a
        worker.
        block_size: Tokens that a window predicts, T.

    Raises:
        ValueError: The file is missing, is not a whole number of uint16, or holds less than one window.
    """

    def __init__(self, path: Path, block_size: int) -> None:
        if not path.is_file():
            raise ValueError(
                f"Expected token ids in {path}, which does not exist. Make it with"
                f" `lightning-namo prepare --inputs+ TEXT_FILE --out_dir {path.parent}`; OpenWebText with"
                f" `lightning-namo prepare openwebtext --out_dir {path.parent}`."
            )
        size = path.stat().st_size
        if size % 2 or size // 2 < block_size + 1:
            raise ValueError(
                f"Expected uint16 token ids, at least block_size + 1 = {block_size + 1} of them, in {path}."
                f" Got {size} bytes."
            )
        self.path = path
        self.block_size = block_size
        self.windows = (size // 2 - 1) // block_size

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, indices: Sequence[int] | Indices) -> Batch:
        """Read a batch: inputs and targets `(len(indices), block_size)`."""
        tokens = np.memmap(self.path, dtype="<u2", mode="r")
        index = np.asarray(indices, dtype=np.int64)[:, None]
        rows = tokens[index.clip(min=0) * self.block_size + np.arange(self.block_size + 1)].astype(np.int64)
        targets = np.where(index == NO_WINDOW, IGNORED, rows[:, 1:])
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets)


class WindowOrder:
    """The endless order of windows: pass after pass over all of them, each pass in an order of its own.

    Every window comes once in a pass. The order of a pass depends on the seed and the number of the pass
    only, so the position, one number, is all there is to remember.

    Args:
        windows: Windows in a pass.
        seed: Seed of all passes.
    """

    def __init__(self, windows: int, seed: int) -> None:
        self.windows = windows
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def take(self, position: int, count: int) -> Indices:
        """Return the windows at `position`, `position` + 1, ..., `count` of them."""
        parts = []
        while count > 0:
            epoch, offset = divmod(position, self.windows)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng((self.seed, epoch)).permutation(self.windows)
            part = self._order[offset : offset + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)


class _Loader:
    """What both loaders share. Not a DataLoader, so that Lightning puts no sampler of its own in."""

    def __init__(self, dataset: TokenWindows, batch_size: int, replicas: int, rank: int, num_workers: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.replicas = replicas
        self.rank = rank
        self.num_workers = num_workers

    def _read(self, batches: Iterable[Indices]) -> Iterator[Batch]:
        """Read batches in the order of their indices, ahead of time if there are workers."""
        pin_memory = torch.cuda.is_available()
        return iter(
            DataLoader(
                self.dataset,
                batch_size=None,  # the dataset reads whole batches
                sampler=batches,
                num_workers=self.num_workers,
                pin_memory=pin_memory,
            )
        )


class TrainLoader(_Loader):
    """Batches of one rank, in a `WindowOrder` that all ranks share, global batch by global batch.

    `len` is an epoch as Lightning counts: the whole global batches in a pass. The windows that are left over
    at the end of a pass open the next, so every batch is full and no window is lost or repeated.

    The state is the position of the last batch handed to the training loop, whatever workers have read ahead.
    It is counted in windows over all ranks, hence the same on every rank, and continues exactly with other
    ranks and batches.

    Args:
        dataset: The windows.
        batch_size: Windows in a batch of one rank, B.
        seed: Seed of the order.
        replicas: Ranks that read different batches.
        rank: Which of them this is.
        num_workers: Processes that read ahead; 0 reads in this one.

    Raises:
        ValueError: Fewer windows than a global batch takes.
    """

    def __init__(
        self,
        dataset: TokenWindows,
        batch_size: int,
        *,
        seed: int,
        replicas: int = 1,
        rank: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(dataset, batch_size, replicas, rank, num_workers)
        self.global_batch = batch_size * replicas
        self.order = WindowOrder(len(dataset), seed)
        self.position = 0
        if len(self) == 0:
            raise ValueError(
                f"Expected batch_size * ranks = {batch_size} * {replicas} windows of {dataset.block_size}"
                f" tokens in {dataset.path}. Got {len(dataset)}: make batch_size or block_size smaller."
            )

    def __len__(self) -> int:
        return len(self.dataset) // self.global_batch

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._read(self._indices(self.position)):
            self.position += self.global_batch
            yield batch

    def _indices(self, position: int) -> Iterator[Indices]:
        for start in range(position, position + len(self) * self.global_batch, self.global_batch):
            yield self.order.take(start + self.rank * self.batch_size, self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """Return the pass, the windows of it that all ranks have consumed, and what the order depends on."""
        epoch, consumed = divmod(self.position, self.order.windows)
        return {"epoch": epoch, "consumed": consumed, "windows": self.order.windows, "seed": self.order.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a state was taken.

        Raises:
            ValueError: The state is of other data, another block_size or another seed.
        """
        for key, ours in (("windows", self.order.windows), ("seed", self.order.seed)):
            if state[key] != ours:
                what = "number of windows (data, block_size)" if key == "windows" else "seed"
                raise ValueError(
                    f"Expected the checkpoint's {what}, {state[key]}. Got {ours}. Give the same --data as in that run."
                )
        self.position = state["epoch"] * self.order.windows + state["consumed"]


class ValidationLoader(_Loader):
    """All windows once, in the order of the file, divided over the ranks.

    Every rank gets the same number of batches, since sharded models hang otherwise. What is missing for that
    has all targets `IGNORED`.
    """

    def __len__(self) -> int:
        return -(-len(self.dataset) // (self.batch_size * self.replicas))

    def __iter__(self) -> Iterator[Batch]:
        shape = (len(self), self.replicas, self.batch_size)
        indices = np.arange(np.prod(shape)).reshape(shape)[:, self.rank]
        return self._read(np.where(indices < len(self.dataset), indices, NO_WINDOW))
