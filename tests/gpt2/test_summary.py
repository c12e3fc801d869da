"""What a run of GPT-2 says of itself: its speed, and the table at its end."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.data.prepare import prepare
from lightning_namo.gpt2.model import GPT2Config
from lightning_namo.gpt2.module import training_flops
from lightning_namo.gpt2.summary import RunSummary, TokenThroughput
from tests.helpers.gpt2 import BATCH, BLOCK, TinyGPT2, tiny_data, tiny_trainer
from tests.helpers.toy import checkpoints


@pytest.mark.parametrize("peak", [None, 1e12])
def test_utilization_is_logged_only_where_the_peak_is_known(folder: Path, peak: float | None) -> None:
    logger = CSVLogger(folder)
    monitor = TokenThroughput(window_size=3, peak_flops=peak)
    tiny_trainer(folder, monitor, max_steps=8, logger=logger, log_every_n_steps=1, val_check_interval=4).fit(
        TinyGPT2(), tiny_data(folder)
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
    with pytest.raises(ValueError, match=r"window_size to be a whole number >= 2 but got 1"):
        TokenThroughput(window_size=1)


def test_the_summary_shows_the_run_and_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    meta = prepare([str(tmp_path / "text.txt")], str(tmp_path), vocab_size=270)
    data = TextDataModule(str(tmp_path), BLOCK, BATCH)
    callbacks = (TokenThroughput(window_size=2), RunSummary(prompt="the cat", sample_tokens=5))
    trainer = tiny_trainer(tmp_path, *callbacks, max_steps=4, val_check_interval=4)
    trainer.fit(TinyGPT2(vocab_size=meta["vocab_size"]), data)
    printed = capsys.readouterr().out
    for row in ("Steps", "Tokens", "Time", "Tokens per second", "Validation loss", "Validation perplexity", "the cat"):
        assert row in printed
    assert "utilization" not in printed  # a CPU's peak is not known
    assert f"{4 * BATCH * BLOCK}" in printed
    assert f"{trainer.callback_metrics['val/loss'].item():.4f}" in printed


def test_the_summary_does_without_a_tokenizer_or_a_validation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(folder, RunSummary(), max_steps=2, limit_val_batches=0).fit(TinyGPT2(), tiny_data(folder))
    printed = capsys.readouterr().out
    assert "Steps" in printed
    assert "Validation" not in printed
    assert "Sample" not in printed


def test_the_summary_goes_on_counting_in_a_resumed_run(folder: Path) -> None:
    save = checkpoints(folder, every_n_train_steps=3)
    tiny_trainer(folder, RunSummary(), save, max_steps=4, enable_checkpointing=True).fit(TinyGPT2(), tiny_data(folder))
    summary = RunSummary()
    tiny_trainer(folder, summary, max_steps=5).fit(TinyGPT2(), tiny_data(folder), ckpt_path=str(folder / "step=3.ckpt"))
    assert summary.state_dict()["tokens"] == 5 * BATCH * BLOCK


def test_the_sample_begins_as_the_text_of_one_s_own_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    meta = prepare([str(tmp_path / "text.txt")], str(tmp_path), vocab_size=257)
    data = TextDataModule(str(tmp_path), BLOCK, BATCH)
    tiny_trainer(tmp_path, RunSummary(sample_tokens=1), max_steps=1).fit(TinyGPT2(vocab_size=meta["vocab_size"]), data)
    begin = data.tokenizer.decode(data.val_windows[[0]][0][0, :6].tolist())
    assert begin.strip() in "the cat sat on the mat. " * 2
    assert begin.strip() in capsys.readouterr().out


def test_a_rank_without_a_share_of_the_validation_writes_no_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader is made empty by hand: a rank alone always has a share."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    meta = prepare([str(tmp_path / "text.txt")], str(tmp_path), vocab_size=257)
    data = TextDataModule(str(tmp_path), BLOCK, BATCH)
    monkeypatch.setattr(data, "val_dataloader", lambda: [])
    trainer = tiny_trainer(tmp_path, RunSummary(sample_tokens=1), max_steps=1, limit_val_batches=0)
    trainer.fit(TinyGPT2(vocab_size=meta["vocab_size"]), data)
    printed = capsys.readouterr().out
    assert "Steps" in printed
    assert "Sample" not in printed
