"""SIGTERM on one process; whole jobs are in tests/distributed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_namo import OptimizerCallback
from lightning_namo.integration.preemption import SaveOnSigterm
from tests.helpers.toy import Net, fit


class Interrupted(pl.Callback):
    """Signals before the first of two micro-batches."""

    def __init__(self, *signals: int) -> None:
        self.signals = signals

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> None:
        for each in self.signals if number == 2 else ():
            os.kill(os.getpid(), each)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ctrl-C interrupts, which Lightning leaves ignored after one, and shells for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(folder: Path, *signals: int) -> int | str | None:
    callbacks = [OptimizerCallback(), SaveOnSigterm(), Interrupted(*signals)]
    options = {"accumulate_grad_batches": 2, "default_root_dir": folder, "enable_checkpointing": True}
    with pytest.raises(SystemExit) as ended:
        fit(Net(), *callbacks, max_steps=4, **options)
    return ended.value.code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 1)])
def test_a_signal_waits_for_the_end_of_an_accumulated_step(tmp_path: Path, number: int, code: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert interrupted(tmp_path, number) == code
    saved = torch.load(tmp_path / "checkpoints" / "last-sigterm-step=2.ckpt", weights_only=True)
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 4
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    assert interrupted(tmp_path, signal.SIGINT, signal.SIGINT) == 1
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_fit_leaves_ctrl_c_as_it_was(tmp_path: Path, before: Any) -> None:
    signal.signal(signal.SIGINT, before)
    during: list[Any] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            during.append(signal.getsignal(signal.SIGINT))

    fit(Net(), OptimizerCallback(), SaveOnSigterm(), Looks(), max_steps=2, default_root_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(during) == 2
    assert all((each is before) == (before is signal.SIG_IGN) for each in during)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ["/bin/lightning-namo", "fit", "--ckpt_path", "last", "--config", "a b.yaml"],
            "\nlightning-namo fit --config 'a b.yaml' --ckpt_path {}",
        ),
        (["/x/lightning_namo/__main__.py", "fit", "--ckpt_path=last"], "\nlightning-namo fit --ckpt_path {}"),
        (["train.py", "--fast"], "ckpt_path={}"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_goes_on_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    argv: list[str],
    told: str,
    number: int,
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    with caplog.at_level("INFO"):
        interrupted(tmp_path, number)
    path = str(tmp_path / "checkpoints" / "last-sigterm-step=2.ckpt")
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"Got {name}: saved {path} after step 2. Go on with {told.format(path)}" in caplog.text
