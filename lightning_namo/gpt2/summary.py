"""Callbacks that say how fast a GPT-2 trains and what came of it."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_namo.arguments import POSITIVE, Range, check_ranges, is_whole, or_none
from lightning_namo.gpt2.data.loaders import Batch
from lightning_namo.gpt2.data.module import TextDataModule, data_parallel
from lightning_namo.gpt2.generate import SAMPLE_RANGES
from lightning_namo.gpt2.model import sample
from lightning_namo.gpt2.module import GPT2Module
from lightning_namo.telemetry.reading_log import reading_log

_PROMPT = 6  # tokens


class TokenThroughput(ThroughputMonitor):
    """Lightning's ThroughputMonitor for batches of tokens: an item is a token.

    Logs, among others, `train/device/items_per_sec` (tokens per second and device), `train/items_per_sec` (on
    all devices, if there are several) and `train/device/mfu` (model FLOPs utilization), averaged over the
    last batches and without the time of validation. Without a known peak there is no utilization; a CPU's is
    not known.

    Args:
        window_size: Batches to average over, at least 2; nothing is logged before there are as many.
        peak_flops: FLOPs per second of one device at best, in the precision of the run. None takes
            Lightning's table, which has no CPUs, and for the H200 and the H100 NVL the rate of sparse
            matrices, twice the dense one.

    Raises:
        ValueError: `window_size` below 2, or a peak that is not above 0.
    """

    def __init__(self, window_size: int = 20, peak_flops: float | None = None) -> None:
        several = Range(lambda value: is_whole(value) and value > 1, "a whole number >= 2")
        check_ranges(locals(), "TokenThroughput", {"window_size": several, "peak_flops": or_none(POSITIVE)})
        super().__init__(batch_size_fn=_sequences, window_size=window_size)
        self.peak_flops = peak_flops

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the peak, and count a batch that several ranks share (tensor parallelism) once."""
        super().setup(trainer, pl_module, stage)
        replicas, _ = data_parallel(trainer)
        self.length_fn = lambda batch: batch[0].numel() * replicas // trainer.world_size
        if self.peak_flops is not None:
            for throughput in self._throughputs.values():
                throughput.available_flops = self.peak_flops

    def rates(self) -> tuple[float | None, float | None]:
        """Return tokens per second on all devices and the utilization in training, where known."""
        throughput = self._throughputs.get(RunningStage.TRAINING)
        metrics = throughput.compute() if throughput is not None and throughput._time else {}
        return metrics.get("items_per_sec", metrics.get("device/items_per_sec")), metrics.get("device/mfu")


def _sequences(batch: Batch) -> int:
    return len(batch[0])


class RunSummary(Callback):
    """Prints a table at the end of training: steps, tokens, time, speed, validation, a sample of the text.

    Loss and perplexity are those of the last validation; speed comes from a `TokenThroughput`, and what the noise in
    the gradients says of the batch size from an `OptimizerCallback` or a `ReadingLog`, if there is one. Tokens and time
    go on counting in a resumed run.

    Args:
        prompt: Text to continue; None: of the embedded speeches "My fellow Americans", else the first words of the text
            for validation.
        sample_tokens: Length of the continuation in tokens; 0 for no sample.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw from this many of the likeliest tokens only; None for all.
        seed: Seed of the sample, which leaves the other random numbers alone.

    Raises:
        ValueError: Numbers out of range.
    """

    def __init__(
        self,
        prompt: str | None = None,
        sample_tokens: int = 60,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 0,
    ) -> None:
        check_ranges(locals(), "RunSummary", SAMPLE_RANGES)
        self.prompt = prompt
        self.sample_tokens = sample_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed
        self._tokens = 0
        self._seconds = 0.0
        self._started: float | None = None  # not training

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"tokens": self._tokens, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from an earlier run."""
        self._tokens, self._seconds = state_dict["tokens"], state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; the table says what a reading log would print."""
        if (log := reading_log(trainer)) is not None:
            log.prints_summary = False
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the tokens that all ranks have trained on."""
        self._tokens += batch[0].numel() * data_parallel(trainer)[0]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a sample on all ranks, since a sharded model needs all of them, and print on the first."""
        self._seconds, self._started = self._elapsed(), None
        text = self._write_sample(trainer, pl_module)
        if trainer.is_global_zero:
            Console().print(self._table(trainer, text))

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def _write_sample(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        data = getattr(trainer, "datamodule", None)
        if self.sample_tokens == 0 or not isinstance(data, TextDataModule) or not isinstance(pl_module, GPT2Module):
            return None
        if not (data.folder / "tokenizer.json").is_file():
            return None  # nanoGPT's token files come without
        assert trainer.model is not None
        tokenizer = data.tokenizer
        device = pl_module.device
        prompt = "My fellow Americans" if self.prompt is None and data.embedded else self.prompt
        if prompt is None:
            batch = next(iter(data.val_dataloader()), None)  # a rank may have no share of a small validation set
            begin = [] if batch is None else batch[0][0, :_PROMPT].tolist()
            ids = trainer.strategy.broadcast(begin)  # the first rank's: all need the same
            if not ids:
                return None
        else:
            ids = tokenizer.encode(prompt).ids
        idx = torch.tensor([ids], device=device)
        training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            idx = sample(
                trainer.model,
                idx,
                self.sample_tokens,
                block_size=pl_module.config.block_size,
                temperature=self.temperature,
                top_k=self.top_k,
                generator=torch.Generator(device).manual_seed(self.seed),
            )
        pl_module.train(training)
        return str(tokenizer.decode(idx[0].tolist()))

    def _table(self, trainer: Trainer, text: str | None) -> Table:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        monitor = next((c for c in callbacks if isinstance(c, TokenThroughput)), None)
        speed, utilization = (None, None) if monitor is None else monitor.rates()
        metrics, log = trainer.callback_metrics, reading_log(trainer)
        rows = {
            "Steps": (trainer.global_step, "{:,}"),
            "Tokens": (self._tokens, "{:,}"),
            "Time": (self._seconds, "{:,.1f} s"),
            "Tokens per second": (speed, "{:,.0f}"),
            "Model FLOPs utilization": (utilization, "{:.1%}"),
            "Validation loss": (metrics.get("val/loss"), "{:.4f}"),
            "Validation perplexity": (metrics.get("val/perplexity"), "{:.2f}"),
            "Gradient noise": (log and log.summary(), "{}"),
            "Sample": (text, "{}"),
        }
        table = Table(title="Run", show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column()
        for name, (value, form) in rows.items():
            if value is not None:
                number = value.item() if isinstance(value, torch.Tensor) else value
                table.add_row(name, Text(form.format(number)))
        return table
