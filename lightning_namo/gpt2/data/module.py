"""The data module: token files of the embedded corpus or of the user's own, as batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, Trainer
from tokenizers import Tokenizer

from lightning_namo.arguments import COUNT, COUNT_OR_ZERO, check_ranges, or_none
from lightning_namo.gpt2.data.loaders import TokenWindows, TrainLoader, ValidationLoader
from lightning_namo.gpt2.data.prepare import SPEECHES_VOCAB_SIZE, prepare_speeches

_RANGES = {
    **dict.fromkeys(("block_size", "batch_size"), COUNT),
    **dict.fromkeys(("num_workers", "seed"), COUNT_OR_ZERO),
    **dict.fromkeys(("vocab_size", "global_batch_size"), or_none(COUNT)),
}


class TextDataModule(LightningDataModule):
    """Batches `(inputs, targets)`, each `(B, T)`, from a folder with `train.bin` and `val.bin`.

    `Trainer(use_distributed_sampler=...)` makes no difference: the loaders divide the windows over the ranks
    themselves, and the ranks of a tensor-parallel group get the same batches.

    Args:
        data_dir: Folder that `lightning-namo prepare` made, or nanoGPT's. None takes the embedded corpus, US
            State of the Union addresses, with its token files in data/sotu under the working directory.
        block_size: Tokens in a sequence, T.
        batch_size: Sequences in a micro-batch of one rank, B.
        num_workers: Processes that read ahead; 0 reads in the training process, which is enough as a rule.
        seed: Seed of the order of the training windows.
        vocab_size: Tokens in the vocabulary of token files that come without a meta.json, such as nanoGPT's.
        global_batch_size: Sequences in an optimizer step over all ranks. It sets the Trainer's
            accumulate_grad_batches to what is missing beside `batch_size` and the ranks; None leaves that alone.

    Raises:
        ValueError: For numbers out of range. On first use, files that are missing or too short; the message says how
            to make them. At the start of fit, a global batch that is no multiple of `batch_size` times the
            data-parallel ranks.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        block_size: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        vocab_size: int | None = None,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_ranges(locals(), type(self).__name__, _RANGES)
        self.embedded = data_dir is None
        self.folder = Path("data/sotu" if data_dir is None else data_dir)
        self.block_size = block_size
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._vocab_size = vocab_size
        self._train_loader: TrainLoader | None = None
        self._state: dict[str, Any] = {}

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary; known before the token files of the embedded corpus are made."""
        if self.embedded:
            return SPEECHES_VOCAB_SIZE
        if self._vocab_size is not None:
            return self._vocab_size
        meta = self.folder / "meta.json"
        if not meta.is_file():
            raise ValueError(
                f"Expected {meta}, which has the size of the vocabulary. Make it with `lightning-namo prepare"
                f" --inputs+ TEXT_FILE --out_dir {self.folder}`, or set vocab_size for files from elsewhere."
            )
        return int(json.loads(meta.read_text(encoding="utf-8"))["vocab_size"])

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the token files, with `encode(text).ids` and `decode(ids)`."""
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"Expected {path}, with which the token files were made. Got none: copy it there.")
        return Tokenizer.from_file(str(path))

    def prepare_data(self) -> None:
        """Make the token files of the embedded corpus, if they are not there or are stale."""
        if self.embedded:
            prepare_speeches(self.folder)

    def setup(self, stage: str) -> None:
        """Open the token files, for a run from the first window on unless a state is loaded next."""
        if stage == "fit" and self.trainer is not None and self.global_batch_size is not None:
            replicas, _ = data_parallel(self.trainer)
            self.trainer.accumulate_grad_batches = accumulation(
                self.global_batch_size, self.batch_size, replicas, self.trainer.accumulate_grad_batches
            )
        self._train_loader, self._state = None, {}
        self._open()

    def _open(self) -> None:
        """Open what the loaders read."""
        self.train_windows = TokenWindows(self.folder / "train.bin", self.block_size)
        self.val_windows = TokenWindows(self.folder / "val.bin", self.block_size)

    def train_dataloader(self) -> TrainLoader:
        """Return this rank's training batches, from where a checkpoint or the last such loader left off."""
        loader = self._make_train_loader()
        if state := self.state_dict():
            loader.load_state_dict(state)
        self._train_loader = loader
        return loader

    def _make_train_loader(self) -> TrainLoader:
        """Return a loader of this rank's training batches, with a state, at the first of them."""
        replicas, rank = data_parallel(self.trainer)
        return TrainLoader(
            self.train_windows,
            self.batch_size,
            seed=self.seed,
            replicas=replicas,
            rank=rank,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> ValidationLoader:
        """Return this rank's share of the validation set."""
        replicas, rank = data_parallel(self.trainer)
        return ValidationLoader(self.val_windows, self.batch_size, replicas, rank, self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data.

        Lightning saves that of the loader too, but leaves it out again when it resumes from the end of an epoch.
        """
        return self._state if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from this position, with a loader that is there already and with the next.

        Strategies that shard restore a checkpoint after a schedule has asked for the length of the loader.
        """
        self._state = state_dict
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state_dict)


def accumulation(global_batch_size: int, batch_size: int, replicas: int, asked: int) -> int:
    """Micro-batches to accumulate for a global batch.

    Args:
        global_batch_size: Sequences in an optimizer step.
        batch_size: Sequences in a micro-batch of one rank.
        replicas: Ranks that read different batches.
        asked: What the Trainer was told; 1 stands for nothing.

    Raises:
        ValueError: There is no such number, or the Trainer was told another.
    """
    together = batch_size * replicas
    steps, rest = divmod(global_batch_size, together)
    if rest:
        fitting = [
            size for size in range(1, global_batch_size // replicas + 1) if global_batch_size % (size * replicas) == 0
        ]
        nearest = sorted(fitting, key=lambda size: abs(size - batch_size))[:3]
        advice = f"data.batch_size {' or '.join(map(str, nearest))} fits" if nearest else "use fewer devices"
        raise ValueError(
            f"Expected data.global_batch_size {global_batch_size} to be a multiple of data.batch_size {batch_size} x "
            f"{replicas} data-parallel ranks. Got {together} sequences at a time: {advice}."
        )
    if asked not in (1, steps):
        raise ValueError(
            f"Expected trainer.accumulate_grad_batches 1 or {steps}, which makes data.global_batch_size "
            f"{global_batch_size} of {batch_size} sequences on {replicas} data-parallel ranks. Got {asked}."
        )
    return steps


def data_parallel(trainer: Trainer | None) -> tuple[int, int]:
    """Return how many ranks read different batches, and which of them this is: 1 and 0 without a Trainer."""
    placement = None if trainer is None else trainer.distributed_sampler_kwargs
    return (1, 0) if placement is None else (placement["num_replicas"], placement["rank"])
