"""Tokens streamed by litdata, from a folder in place of a bucket. Without litdata only its absence is tested."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_namo.cli import main
from lightning_namo.gpt2.data.streaming import StreamingTextDataModule
from tests.helpers.launch import run_ranks

needs_litdata = pytest.mark.skipif(
    importlib.util.find_spec("litdata") is None,
    reason="needs litdata, which brings PyPI's torchvision for CUDA; beside a torch for CPUs that breaks Lightning",
)

T, B = 15, 4
TOKENS, CHUNK = 3_840, 640  # six chunks of 40 blocks of T + 1 tokens
PASS, SAVED = TOKENS // (T + 1) // B, 10  # steps


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks of tokens that are their positions."""
    folder = tmp_path_factory.mktemp("bucket")
    np.arange(TOKENS, dtype="<u2").tofile(folder / "train.bin")
    np.arange(2_000, dtype="<u2").tofile(folder / "val.bin")
    (folder / "meta.json").write_text('{"vocab_size": 4000}')
    main(["prepare", "chunks", "--data_dir", str(folder), "--out_dir", str(folder / "out"), f"--chunk_tokens={CHUNK}"])
    return folder / "out"


class Reader(pl.LightningModule):
    """Keeps what it is given: the first input of each block; trains one number, so that there are steps to resume."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.blocks: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        assert inputs.shape == (B, T)
        assert torch.equal(targets, inputs + 1)
        self.blocks.append(inputs[:, 0].tolist())
        return self.weight

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated += batch[0][:, 0].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read(bucket: Path, steps: int, folder: Path, workers: int = 0, resume: int | None = None, ranks: int = 1) -> Reader:
    """What this rank is given until ``steps``, from the start or a checkpoint on; checkpoints after SAVED steps."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=steps,
        callbacks=ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    reader = Reader()
    data = StreamingTextDataModule(str(bucket), T, B, num_workers=workers, seed=3)
    trainer.fit(reader, data, ckpt_path=None if resume is None else folder / f"step={resume}.ckpt")
    return reader


def read_as_rank(rank: int, bucket: Path, steps: int, folder: Path, resume: int | None = None) -> list[list[int]]:
    os.environ.update(NODE_RANK="0")
    return read(bucket, steps, folder, resume=resume, ranks=2).blocks


@needs_litdata
def test_a_pass_has_every_block_once_in_an_order_of_its_own(bucket: Path, tmp_path: Path) -> None:
    reader = read(bucket, 2 * PASS, tmp_path)
    first, second = reader.blocks[:PASS], reader.blocks[PASS:]
    for batches in (first, second):
        assert sorted(itertools.chain(*batches)) == list(range(0, TOKENS, T + 1))
    assert first != second
    assert first != sorted(first)
    assert reader.validated[:124] == list(range(0, 124 * (T + 1), T + 1))  # of 125, which make no whole batch


@needs_litdata
@pytest.mark.parametrize(("start", "workers"), [(SAVED, 0), (PASS, 0), (PASS + SAVED, 0), (SAVED, 2)])
def test_a_run_resumed_in_the_middle_or_at_the_end_of_a_pass_goes_on_as_if_nothing_had_been(
    start: int, workers: int, bucket: Path, tmp_path: Path
) -> None:
    whole = read(bucket, start + SAVED, tmp_path, workers).blocks
    assert read(bucket, start + SAVED, tmp_path, workers, resume=start).blocks == whole[start:]


@needs_litdata
def test_two_ranks_share_a_pass_and_resume_exactly_and_one_goes_on_for_them(bucket: Path, tmp_path: Path) -> None:
    whole = run_ranks(read_as_rank, 2, bucket, PASS // 2, tmp_path)
    assert sorted(itertools.chain(*whole[0], *whole[1])) == list(range(0, TOKENS, T + 1))
    resumed = run_ranks(read_as_rank, 2, bucket, PASS // 2, tmp_path, SAVED)
    assert resumed == [batches[SAVED:] for batches in whole]
    alone = read(bucket, PASS - SAVED, tmp_path, resume=SAVED).blocks
    rest = itertools.chain(*whole[0][SAVED:], *whole[1][SAVED:])
    assert sorted(itertools.chain(*alone)) == sorted(rest)


@needs_litdata
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.data_dir=nowhere", "--data.vocab_size=9"], "Expected chunks of tokens in nowhere/"),
        (["--data.batch_size=3000"], "3000 * 1 blocks of 16 tokens in {bucket}/"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    options: list[str],
    message: str,
    bucket: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning leaves config.yaml there
    data = ["--data=lightning_namo.gpt2.streaming.StreamingTextDataModule", f"--data.data_dir={bucket}"]
    small = ["--model.n_layer=1", "--model.n_embd=8", "--model.n_head=1", "--trainer.accelerator=cpu"]
    with pytest.raises(SystemExit):
        main(["fit", *data, f"--data.block_size={T}", *small, "--trainer.logger=false", *options])
    assert message.format(bucket=bucket) in capsys.readouterr().err


def test_without_litdata_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    data = StreamingTextDataModule(str(tmp_path), T, B)
    with pytest.raises(ValueError, match=r"pip install 'lightning-namo\[streaming\]'"):
        data.train_dataloader()
