"""Token files in object storage: cut into chunks once, and streamed from there in training, both by litdata."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_namo.arguments import COUNT, check_ranges
from lightning_namo.gpt2.data.loaders import Batch, TokenWindows
from lightning_namo.gpt2.data.module import TextDataModule, data_parallel

PIECE = 2**20  # tokens to copy at a time


def chunks(data_dir: str, out_dir: str, chunk_tokens: int = 2**25) -> dict[str, int]:
    """Cut token files into chunks for `StreamingTextDataModule`. Copy the folder to the bucket with the bucket's tools.

    Args:
        data_dir: Folder with train.bin and val.bin, as `lightning-namo prepare` makes it.
        out_dir: Folder for the chunks, in train and val, with meta.json and tokenizer.json beside them.
        chunk_tokens: Tokens in a chunk, of 2 bytes each: what a process downloads at a time.

    Returns:
        The chunks of each part.

    Raises:
        ValueError: Without litdata, if a token file is missing, or for `chunk_tokens` below 1.
    """
    check_ranges(locals(), "chunks", {"chunk_tokens": COUNT})
    litdata = _litdata()
    source, target = Path(data_dir), Path(out_dir)
    for part in ("train", "val"):
        file = TokenWindows(source / f"{part}.bin", 1).path
        piece = min(PIECE, chunk_tokens)
        with contextlib.redirect_stdout(io.StringIO()):  # what litdata says beside its bar
            litdata.optimize(
                partial(_read, file, piece),
                list(range(0, file.stat().st_size // 2, piece)),
                output_dir=str(target / part),
                chunk_size=chunk_tokens,
                item_loader=litdata.TokensLoader(),
                num_workers=1,
                keep_data_ordered=True,
                mode="overwrite",
                verbose=sys.stderr.isatty(),
            )
    for name in ("meta.json", "tokenizer.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return {part: len(list((target / part).glob("chunk-*.bin"))) for part in ("train", "val")}


class StreamingTextDataModule(TextDataModule):
    """Batches `(inputs, targets)`, each `(B, T)`, streamed from the chunks that `lightning-namo prepare chunks` made.

    Each process downloads the chunks that it reads when it needs them. A block of T + 1 tokens is a sequence; what does
    not fill one at the end of a chunk is left out, as are, in each pass, blocks that not all ranks can have.

    A resumed run with the same ranks, `batch_size` and `num_workers` goes on exactly. With others it goes on in the
    same pass, at whose end some blocks, fewer than a batch of each worker, may come twice or not at all.

    Args:
        data_dir: Where the chunks are: an address such as s3://bucket/openwebtext, or a folder.
        block_size: Tokens in a sequence, T.
        batch_size: Sequences in a micro-batch of one rank, B.
        num_workers: Processes that read ahead.
        seed: Seed of the order of the training blocks.
        vocab_size: Tokens in the vocabulary; needed unless `data_dir` is a folder with a meta.json.
        global_batch_size: Sequences in an optimizer step over all ranks: see `TextDataModule`.

    Raises:
        ValueError: For numbers out of range. On first use: without litdata, without chunks, with fewer blocks than a
            batch of each rank takes, or under tensor parallelism, whose ranks would have to share batches.
    """

    def __init__(
        self,
        data_dir: str,
        block_size: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        vocab_size: int | None = None,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__(data_dir, block_size, batch_size, num_workers, seed, vocab_size, global_batch_size)
        self.address = data_dir.rstrip("/")

    def _open(self) -> None:
        """Nothing: the loaders open their chunks themselves."""

    def _make_train_loader(self) -> Any:
        """Return a StreamingDataLoader of litdata that shuffles chunks, and blocks within a chunk."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        """Return this rank's share of the validation set."""
        return self._loader("val", shuffle=False)

    def _loader(self, part: str, shuffle: bool) -> Any:
        litdata = _litdata()
        address = f"{self.address}/{part}"
        ranks = 1 if self.trainer is None else self.trainer.world_size
        if data_parallel(self.trainer)[0] != ranks:
            raise ValueError(
                "Expected every rank to read batches of its own, as litdata does. Got tensor parallelism, whose ranks "
                "read the same: take TextDataModule."
            )
        try:
            blocks = litdata.StreamingDataset(
                address,
                item_loader=litdata.TokensLoader(block_size=self.block_size + 1),
                shuffle=shuffle,
                drop_last=True,
                seed=self.seed,
            )
            loader = litdata.StreamingDataLoader(
                blocks,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                collate_fn=_batch,
                pin_memory=torch.cuda.is_available(),
            )
            length = len(loader)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Expected chunks of tokens in {address}. Make them with `lightning-namo prepare chunks --data_dir "
                f"FOLDER_WITH_TOKEN_FILES --out_dir FOLDER`. Got: {error}"
            ) from error
        if length == 0:
            raise ValueError(
                f"Expected batch_size * ranks = {self.batch_size} * {ranks} blocks of {self.block_size + 1} tokens in "
                f"{address}. Got fewer: make batch_size or block_size smaller."
            )
        return loader


def _batch(blocks: list[Tensor]) -> Batch:
    """From blocks `(T + 1,)` to inputs and targets."""
    tokens = torch.stack(blocks).long()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _read(file: Path, count: int, start: int) -> Tensor:
    """`count` tokens from `start` on, or what there is."""
    return torch.from_numpy(np.memmap(file, dtype="<u2", mode="r")[start : start + count].copy())


def _litdata() -> Any:
    try:
        import litdata
    except ImportError as error:
        raise ValueError("Expected litdata, to stream: pip install 'lightning-namo[streaming]'.") from error
    return litdata
