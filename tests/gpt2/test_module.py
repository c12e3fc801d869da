"""GPT-2 under Lightning's Trainer: what it logs, and that a resumed run sees the windows of an uninterrupted one."""

import contextlib
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from lightning_namo.gpt2.data.encoding import train_tokenizer
from lightning_namo.gpt2.data.loaders import WindowOrder
from lightning_namo.gpt2.data.module import TextDataModule, accumulation
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.module import GPT2Module, training_flops
from lightning_namo.gpt2.summary import RunSummary
from tests.helpers.gpt2 import BATCH, BLOCK, VAL_WINDOWS, WINDOWS, TinyGPT2, tiny_data, tiny_trainer
from tests.helpers.launch import run_ranks
from tests.helpers.toy import checkpoints


class WindowRecorder(lightning.Callback):
    """Writes down which windows the training saw; a window of these token files starts with its index times BLOCK."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch[0][:, 0] // BLOCK).tolist())


# The global batch


def test_the_global_batch_is_reached_by_accumulation(folder: Path) -> None:
    data = TextDataModule(str(folder), BLOCK, BATCH, seed=5, vocab_size=257, global_batch_size=3 * BATCH)
    recorder = WindowRecorder()
    trainer = tiny_trainer(folder, recorder, max_steps=2)
    trainer.fit(TinyGPT2(), data)
    assert (trainer.accumulate_grad_batches, trainer.global_step) == (3, 2)
    assert recorder.batches == _expected(6)
    trainer = tiny_trainer(folder, max_steps=2, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match=r"Expected trainer\.accumulate_grad_batches 1 or 3.*Got 2"):
        trainer.fit(TinyGPT2(), data)


@pytest.mark.parametrize(
    ("batch_size", "replicas", "message"),
    [
        (
            7,
            8,
            r"480 to be a multiple of data\.batch_size 7 x 8 .* Got 56 .*: data\.batch_size 6 or 5 or",
        ),
        (1, 7, r"x 7 data-parallel ranks\. Got 7 sequences at a time: use fewer devices"),
        (1, 960, r"Got 960 sequences at a time: use fewer devices"),
    ],
)
def test_a_global_batch_that_cannot_be_made_is_refused_with_what_can(
    batch_size: int, replicas: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        accumulation(480, batch_size, replicas, 1)


# Resuming


def _expected(batches: int) -> list[list[int]]:
    return WindowOrder(WINDOWS, 5).take(0, batches * BATCH).reshape(-1, BATCH).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_in_mid_epoch_sees_the_windows_and_weights_of_an_uninterrupted_one(
    folder: Path, num_workers: int
) -> None:
    torch.manual_seed(0)
    whole, recorder = TinyGPT2(), WindowRecorder()
    save = checkpoints(folder, every_n_train_steps=8)
    tiny_trainer(folder, recorder, save, max_steps=30, enable_checkpointing=True).fit(
        whole, tiny_data(folder, num_workers)
    )
    assert recorder.batches == _expected(30)  # 2 passes and a half; an epoch of Lightning's has 11 batches

    for step in (8, 16, 24):
        resumed, recorder = TinyGPT2(), WindowRecorder()
        trainer = tiny_trainer(folder, recorder, max_steps=30)
        trainer.fit(resumed, tiny_data(folder, num_workers), ckpt_path=str(folder / f"step={step}.ckpt"))
        assert recorder.batches == _expected(30)[step:]
        for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("when", "step"),
    [
        ({"every_n_train_steps": 11}, 11),  # in the last batch of an epoch
        ({"every_n_train_steps": 11}, 22),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 11),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, 22),  # after validation
    ],
)
def test_a_run_resumed_at_the_end_of_an_epoch_continues_with_the_next_window(
    folder: Path, when: dict[str, Any], step: int
) -> None:
    options = {"max_epochs": 3, "enable_checkpointing": True}
    tiny_trainer(folder, checkpoints(folder, **when), **options).fit(TinyGPT2(), tiny_data(folder))
    recorder = WindowRecorder()
    tiny_trainer(folder, recorder, max_epochs=3).fit(
        TinyGPT2(), tiny_data(folder), ckpt_path=str(folder / f"step={step}.ckpt")
    )
    assert recorder.batches == _expected(33)[step:]


def test_reloading_the_loaders_repeats_nothing(folder: Path) -> None:
    recorder = WindowRecorder()
    tiny_trainer(folder, recorder, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(TinyGPT2(), tiny_data(folder))
    assert recorder.batches == _expected(33)


def test_a_second_run_with_the_same_data_module_starts_anew(folder: Path) -> None:
    data, recorders = tiny_data(folder), (WindowRecorder(), WindowRecorder())
    for recorder in recorders:
        tiny_trainer(folder, recorder, max_steps=3).fit(TinyGPT2(), data)
    assert recorders[0].batches == recorders[1].batches == _expected(3)


def test_a_run_resumed_after_its_last_step_trains_on(folder: Path) -> None:
    trainer = tiny_trainer(folder, max_epochs=1)
    trainer.fit(TinyGPT2(), tiny_data(folder))
    trainer.save_checkpoint(folder / "end.ckpt")
    recorder = WindowRecorder()
    tiny_trainer(folder, recorder, max_epochs=2).fit(TinyGPT2(), tiny_data(folder), ckpt_path=str(folder / "end.ckpt"))
    assert recorder.batches == _expected(22)[11:]


def test_a_run_resumed_after_a_validation_in_mid_epoch_continues_with_the_next_window(folder: Path) -> None:
    options = {"max_steps": 9, "val_check_interval": 3}
    save = checkpoints(folder, monitor="val/loss")
    tiny_trainer(folder, save, enable_checkpointing=True, **options).fit(TinyGPT2(), tiny_data(folder))
    recorder = WindowRecorder()
    tiny_trainer(folder, recorder, **options).fit(TinyGPT2(), tiny_data(folder), ckpt_path=str(folder / "step=6.ckpt"))
    assert recorder.batches == _expected(9)[6:]


def test_other_data_than_the_checkpoints_are_refused(folder: Path) -> None:
    save = checkpoints(folder, every_n_train_steps=2)
    tiny_trainer(folder, save, max_steps=2, enable_checkpointing=True).fit(TinyGPT2(), tiny_data(folder))
    np.arange(20 * BLOCK + 1, dtype="<u2").tofile(folder / "train.bin")
    with pytest.raises(ValueError, match=r"windows \(data, block_size\), 23. Got 20"):
        tiny_trainer(folder, max_steps=4).fit(TinyGPT2(), tiny_data(folder), ckpt_path=str(folder / "step=2.ckpt"))


# Two processes


def _on_two_ranks(worker: Callable[..., Any], folder: Path) -> list[Any]:
    """The ranks' answers; they have a tokenizer for the summary's sample, which all write and the first prints."""
    train_tokenizer([], 257).save(str(folder / "tokenizer.json"))
    answers = run_ranks(_as_rank, 2, worker, folder)
    assert [printed.count("Sample") for printed, _ in answers] == [1, 0]
    return [answer for _, answer in answers]


def _as_rank(rank: int, worker: Callable[..., Any], folder: Path) -> tuple[str, Any]:
    os.environ["NODE_RANK"] = "0"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        answer = worker(folder)
    return printed.getvalue(), answer


def _ddp(folder: Path) -> tuple[list[list[int]], dict[str, float]]:
    """The windows of a rank and what it logged."""
    recorder, save = WindowRecorder(), checkpoints(folder, every_n_train_steps=3)
    options = {"max_steps": 5, "val_check_interval": 5, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    trainer = tiny_trainer(folder, recorder, RunSummary(sample_tokens=3), save, devices=2, strategy="ddp", **options)
    trainer.fit(TinyGPT2(), tiny_data(folder))
    trainer.save_checkpoint(folder / "end.ckpt")
    return recorder.batches, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.slow
def test_two_processes_share_the_windows_and_one_takes_over(folder: Path) -> None:
    ranks = _on_two_ranks(_ddp, folder)
    together = [first + second for first, second in zip(*(batches for batches, _ in ranks), strict=True)]
    assert together == WindowOrder(WINDOWS, 5).take(0, 5 * 2 * BATCH).reshape(5, -1).tolist()

    # 7 validation windows in batches of 2 on 2 ranks: one window is missing, and may not count
    module = TinyGPT2()
    trainer = tiny_trainer(folder)
    module.configure_model()
    module.load_state_dict(torch.load(folder / "end.ckpt", weights_only=True)["state_dict"])
    (alone,) = trainer.validate(module, tiny_data(folder), verbose=False)
    for _, metrics in ranks:
        assert metrics["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-5)
        assert metrics["val/perplexity"] == pytest.approx(alone["val/perplexity"], rel=1e-5)

    recorder = WindowRecorder()
    trainer = tiny_trainer(folder, recorder, max_steps=10, limit_val_batches=0)
    trainer.fit(TinyGPT2(), tiny_data(folder), ckpt_path=str(folder / "step=3.ckpt"))
    assert np.concatenate(recorder.batches).tolist() == WindowOrder(WINDOWS, 5).take(3 * 2 * BATCH, 7 * BATCH).tolist()


# Sharded


class Sharded(TinyGPT2):
    """Made on the meta device, in shards."""

    def configure_model(self) -> None:
        if "model" not in self._modules:
            with torch.device("meta"):
                self.model = GPT2(self.config)
            for module in (*self.model.transformer["h"], self.model):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])


def _fsdp2(folder: Path) -> tuple[bool, float]:
    """Whether a weight is still tied, and the loss."""
    strategy = ModelParallelStrategy(2, 1)
    summary = RunSummary(sample_tokens=3)
    trainer = tiny_trainer(folder, summary, max_steps=3, val_check_interval=3, devices=2, strategy=strategy)
    module = Sharded()
    trainer.fit(module, tiny_data(folder))
    tied = module.model.lm_head.weight is module.model.transformer["wte"].weight
    return tied, trainer.callback_metrics["val/loss"].item()


@pytest.mark.slow
def test_a_model_sharded_on_the_meta_device_is_initialized_tied_and_validated(folder: Path) -> None:
    for tied, loss in _on_two_ranks(_fsdp2, folder):
        assert tied
        assert 5.0 < loss < 6.0  # log 257 is 5.5


# What is logged


def test_validation_is_the_mean_over_all_tokens_and_perplexity_its_exponential(folder: Path) -> None:
    torch.manual_seed(0)
    module, data = TinyGPT2(), tiny_data(folder)  # 7 windows in batches of 2: the last batch is half missing
    module.configure_model()
    torch.nn.init.normal_(module.model.lm_head.weight, std=3.0)  # losses that differ from batch to batch
    (logged,) = tiny_trainer(folder).validate(module, data, verbose=False)
    inputs, targets = data.val_windows[range(VAL_WINDOWS)]
    with torch.no_grad():
        loss = functional.cross_entropy(module(inputs).flatten(0, 1), targets.flatten()).item()
    assert logged["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_perplexity_is_finite_where_single_tokens_are_hopeless(folder: Path) -> None:
    torch.manual_seed(0)
    module = TinyGPT2()
    module.configure_model()
    torch.nn.init.normal_(module.model.lm_head.weight, std=5.0)
    (logged,) = tiny_trainer(folder).validate(module, tiny_data(folder), verbose=False)
    assert 30 < logged["val/loss"] < 88
    assert math.isfinite(logged["val/perplexity"])


def test_training_lowers_the_loss(folder: Path) -> None:
    torch.manual_seed(0)
    trainer = tiny_trainer(folder, max_epochs=8, gradient_clip_val=1.0)
    module = TinyGPT2(n_embd=64, n_head=4)
    trainer.fit(module, tiny_data(folder))
    assert trainer.callback_metrics["train/loss"] < math.log(257) - 1


def test_the_network_is_built_once(folder: Path) -> None:
    module = TinyGPT2()
    assert not list(module.parameters())  # on a meta device or under FSDP2 it is built later
    module.configure_model()
    network = module.model
    module.configure_model()
    assert module.model is network


def test_a_checkpoint_gives_the_module_back_with_its_shape(folder: Path) -> None:
    module, trainer = GPT2Module(256, BLOCK, 1, 2, 16, bias=True), tiny_trainer(folder)
    trainer.validate(module, tiny_data(folder), verbose=False)
    trainer.save_checkpoint(folder / "saved.ckpt")
    loaded = GPT2Module.load_from_checkpoint(folder / "saved.ckpt")
    assert loaded.config == GPT2Config(256, BLOCK, 1, 2, 16, bias=True)
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


# Speed


def test_flops_are_those_of_the_published_estimate() -> None:
    config = GPT2Config()
    parameters, T = 124_373_760 - 1024 * 768, 1024  # without position embeddings, which are not multiplied
    estimate = (6 * parameters + 12 * 12 * 768 * T) * T  # Chowdhery et al. 2022, appendix B
    with torch.inference_mode():  # as ThroughputMonitor asks
        assert training_flops(config) == pytest.approx(estimate, rel=1e-3)


# The summary
