"""GPT-2 under Lightning's Trainer: what it logs, and that a resumed run sees the windows of an uninterrupted one."""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from lightning_namo.gpt2.data.encoding import train_tokenizer
from lightning_namo.gpt2.data.loaders import WindowOrder
from lightning_namo.gpt2.data.module import TextDataModule, accumulation
from lightning_namo.gpt2.data.prepare import prepare
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.module import GPT2Module, training_flops
from lightning_namo.gpt2.summary import RunSummary, TokenThroughput
from tests.helpers.launch import run_ranks

BLOCK, WINDOWS, VAL_WINDOWS, BATCH = 8, 23, 7, 2


class Module(GPT2Module):
    """A tiny GPT-2 with AdamW."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**{"vocab_size": 257, "block_size": BLOCK, "n_layer": 1, "n_head": 2, "n_embd": 16, **changes})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class WindowRecorder(lightning.Callback):
    """Writes down which windows the training saw; a window of these token files starts with its index times BLOCK."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch[0][:, 0] // BLOCK).tolist())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by more, on a busy machine by a factor of ten."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, windows in (("train", WINDOWS), ("val", VAL_WINDOWS)):
        np.arange(windows * BLOCK + 1, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    return tmp_path


def _data(folder: Path, num_workers: int = 0) -> TextDataModule:
    return TextDataModule(str(folder), BLOCK, BATCH, num_workers, seed=5, vocab_size=257)


def _trainer(folder: Path, *callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    small = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **small, **options})


def _save(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)


# The global batch


def test_the_global_batch_is_reached_by_accumulation(folder: Path) -> None:
    data = TextDataModule(str(folder), BLOCK, BATCH, seed=5, vocab_size=257, global_batch_size=3 * BATCH)
    recorder = WindowRecorder()
    trainer = _trainer(folder, recorder, max_steps=2)
    trainer.fit(Module(), data)
    assert (trainer.accumulate_grad_batches, trainer.global_step) == (3, 2)
    assert recorder.batches == _expected(6)
    trainer = _trainer(folder, max_steps=2, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match=r"Expected trainer\.accumulate_grad_batches 1 or 3.*Got 2"):
        trainer.fit(Module(), data)


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
    whole, recorder = Module(), WindowRecorder()
    save = _save(folder, every_n_train_steps=8)
    _trainer(folder, recorder, save, max_steps=30, enable_checkpointing=True).fit(whole, _data(folder, num_workers))
    assert recorder.batches == _expected(30)  # 2 passes and a half; an epoch of Lightning's has 11 batches

    for step in (8, 16, 24):
        resumed, recorder = Module(), WindowRecorder()
        trainer = _trainer(folder, recorder, max_steps=30)
        trainer.fit(resumed, _data(folder, num_workers), ckpt_path=str(folder / f"step={step}.ckpt"))
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
    _trainer(folder, _save(folder, **when), **options).fit(Module(), _data(folder))
    recorder = WindowRecorder()
    _trainer(folder, recorder, max_epochs=3).fit(Module(), _data(folder), ckpt_path=str(folder / f"step={step}.ckpt"))
    assert recorder.batches == _expected(33)[step:]


def test_reloading_the_loaders_repeats_nothing(folder: Path) -> None:
    recorder = WindowRecorder()
    _trainer(folder, recorder, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(Module(), _data(folder))
    assert recorder.batches == _expected(33)


def test_a_second_run_with_the_same_data_module_starts_anew(folder: Path) -> None:
    data, recorders = _data(folder), (WindowRecorder(), WindowRecorder())
    for recorder in recorders:
        _trainer(folder, recorder, max_steps=3).fit(Module(), data)
    assert recorders[0].batches == recorders[1].batches == _expected(3)


def test_a_run_resumed_after_its_last_step_trains_on(folder: Path) -> None:
    trainer = _trainer(folder, max_epochs=1)
    trainer.fit(Module(), _data(folder))
    trainer.save_checkpoint(folder / "end.ckpt")
    recorder = WindowRecorder()
    _trainer(folder, recorder, max_epochs=2).fit(Module(), _data(folder), ckpt_path=str(folder / "end.ckpt"))
    assert recorder.batches == _expected(22)[11:]


def test_a_run_resumed_after_a_validation_in_mid_epoch_continues_with_the_next_window(folder: Path) -> None:
    options = {"max_steps": 9, "val_check_interval": 3}
    save = _save(folder, monitor="val/loss")
    _trainer(folder, save, enable_checkpointing=True, **options).fit(Module(), _data(folder))
    recorder = WindowRecorder()
    _trainer(folder, recorder, **options).fit(Module(), _data(folder), ckpt_path=str(folder / "step=6.ckpt"))
    assert recorder.batches == _expected(9)[6:]


def test_other_data_than_the_checkpoints_are_refused(folder: Path) -> None:
    save = _save(folder, every_n_train_steps=2)
    _trainer(folder, save, max_steps=2, enable_checkpointing=True).fit(Module(), _data(folder))
    np.arange(20 * BLOCK + 1, dtype="<u2").tofile(folder / "train.bin")
    with pytest.raises(ValueError, match=r"windows is 23 there. Got 20"):
        _trainer(folder, max_steps=4).fit(Module(), _data(folder), ckpt_path=str(folder / "step=2.ckpt"))


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
    recorder, save = WindowRecorder(), _save(folder, every_n_train_steps=3)
    options = {"max_steps": 5, "val_check_interval": 5, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    trainer = _trainer(folder, recorder, RunSummary(sample_tokens=3), save, devices=2, strategy="ddp", **options)
    trainer.fit(Module(), _data(folder))
    trainer.save_checkpoint(folder / "end.ckpt")
    return recorder.batches, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.slow
def test_two_processes_share_the_windows_and_one_takes_over(folder: Path) -> None:
    ranks = _on_two_ranks(_ddp, folder)
    together = [first + second for first, second in zip(*(batches for batches, _ in ranks), strict=True)]
    assert together == WindowOrder(WINDOWS, 5).take(0, 5 * 2 * BATCH).reshape(5, -1).tolist()

    # 7 validation windows in batches of 2 on 2 ranks: one window is missing, and may not count
    module = Module()
    trainer = _trainer(folder)
    module.configure_model()
    module.load_state_dict(torch.load(folder / "end.ckpt", weights_only=True)["state_dict"])
    (alone,) = trainer.validate(module, _data(folder), verbose=False)
    for _, metrics in ranks:
        assert metrics["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-5)
        assert metrics["val/perplexity"] == pytest.approx(alone["val/perplexity"], rel=1e-5)

    recorder = WindowRecorder()
    trainer = _trainer(folder, recorder, max_steps=10, limit_val_batches=0)
    trainer.fit(Module(), _data(folder), ckpt_path=str(folder / "step=3.ckpt"))
    assert np.concatenate(recorder.batches).tolist() == WindowOrder(WINDOWS, 5).take(3 * 2 * BATCH, 7 * BATCH).tolist()


# Sharded


class Sharded(Module):
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
    trainer = _trainer(folder, summary, max_steps=3, val_check_interval=3, devices=2, strategy=strategy)
    module = Sharded()
    trainer.fit(module, _data(folder))
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
    module, data = Module(), _data(folder)  # 7 windows in batches of 2: the last batch is half missing
    module.configure_model()
    torch.nn.init.normal_(module.model.lm_head.weight, std=3.0)  # losses that differ from batch to batch
    (logged,) = _trainer(folder).validate(module, data, verbose=False)
    inputs, targets = data.val_windows[range(VAL_WINDOWS)]
    with torch.no_grad():
        loss = functional.cross_entropy(module(inputs).flatten(0, 1), targets.flatten()).item()
    assert logged["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_perplexity_is_finite_where_single_tokens_are_hopeless(folder: Path) -> None:
    torch.manual_seed(0)
    module = Module()
    module.configure_model()
    torch.nn.init.normal_(module.model.lm_head.weight, std=5.0)
    (logged,) = _trainer(folder).validate(module, _data(folder), verbose=False)
    assert 30 < logged["val/loss"] < 88
    assert math.isfinite(logged["val/perplexity"])


def test_training_lowers_the_loss(folder: Path) -> None:
    torch.manual_seed(0)
    trainer = _trainer(folder, max_epochs=8, gradient_clip_val=1.0)
    module = Module(n_embd=64, n_head=4)
    trainer.fit(module, _data(folder))
    assert trainer.callback_metrics["train/loss"] < math.log(257) - 1


def test_the_network_is_built_once(folder: Path) -> None:
    module = Module()
    assert not list(module.parameters())  # on a meta device or under FSDP2 it is built later
    module.configure_model()
    network = module.model
    module.configure_model()
    assert module.model is network


def test_a_checkpoint_gives_the_module_back_with_its_shape(folder: Path) -> None:
    module, trainer = GPT2Module(256, BLOCK, 1, 2, 16, bias=True), _trainer(folder)
    trainer.validate(module, _data(folder), verbose=False)
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


@pytest.mark.parametrize("peak", [None, 1e12])
def test_utilization_is_logged_only_where_the_peak_is_known(folder: Path, peak: float | None) -> None:
    logger = CSVLogger(folder)
    monitor = TokenThroughput(window_size=3, peak_flops=peak)
    _trainer(folder, monitor, max_steps=8, logger=logger, log_every_n_steps=1, val_check_interval=4).fit(
        Module(), _data(folder)
    )
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "train/device/items_per_sec" in header
    assert ("train/device/mfu" in header) == (peak is not None)
    speed, utilization = monitor.rates()
    assert speed is not None
    if peak is None:
        assert utilization is None
    else:
        flops_per_token = training_flops(GPT2Config(257, BLOCK, 1, 2, 16)) / BLOCK
        assert utilization == pytest.approx(speed * flops_per_token / peak)


def test_a_window_of_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window_size of at least 2. Got 1"):
        TokenThroughput(window_size=1)


# The summary


def test_the_summary_shows_the_run_and_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    meta = prepare([str(tmp_path / "text.txt")], str(tmp_path), vocab_size=270)
    data = TextDataModule(str(tmp_path), BLOCK, BATCH)
    callbacks = (TokenThroughput(window_size=2), RunSummary(prompt="the cat", sample_tokens=5))
    trainer = _trainer(tmp_path, *callbacks, max_steps=4, val_check_interval=4)
    trainer.fit(Module(vocab_size=meta["vocab_size"]), data)
    printed = capsys.readouterr().out
    for row in ("Steps", "Tokens", "Time", "Tokens per second", "Validation loss", "Validation perplexity", "the cat"):
        assert row in printed
    assert "utilization" not in printed  # a CPU's peak is not known
    assert f"{4 * BATCH * BLOCK}" in printed
    assert f"{trainer.callback_metrics['val/loss'].item():.4f}" in printed


def test_the_summary_does_without_a_tokenizer_or_a_validation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _trainer(folder, RunSummary(), max_steps=2, limit_val_batches=0).fit(Module(), _data(folder))
    printed = capsys.readouterr().out
    assert "Steps" in printed
    assert "Validation" not in printed
    assert "Sample" not in printed


def test_the_summary_goes_on_counting_in_a_resumed_run(folder: Path) -> None:
    save = _save(folder, every_n_train_steps=3)
    _trainer(folder, RunSummary(), save, max_steps=4, enable_checkpointing=True).fit(Module(), _data(folder))
    summary = RunSummary()
    _trainer(folder, summary, max_steps=5).fit(Module(), _data(folder), ckpt_path=str(folder / "step=3.ckpt"))
    assert summary.state_dict()["tokens"] == 5 * BATCH * BLOCK
