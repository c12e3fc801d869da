"""Logs spectra of gradients and momentum, and what orthogonalization makes of them."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_namo.arguments import COUNT, check_ranges
from lightning_namo.telemetry.reading_log import MOST_MATRICES, orthogonalized_optimizers
from lightning_namo.telemetry.spectra import Spectra
from lightning_namo.telemetry.spectral_probe import SpectralProbe


class SpectralMonitor(pl.Callback):
    """Logs the spectra of an `OrthogonalizedOptimizer`'s gradients G and momenta M, and how well its O is orthogonal.

    Of every n-th step, once the next step's gradient is there, which is not inside its momentum; with
    ``<parameter>[i]`` for the matrices of one that has several (blocks, experts), and over all of them as
    ``.../median``, ``.../min`` and ``.../max``:

    - ``sigma_gradient_q0``, ``_q25``, ``_q50``, ``_q75``, ``_q100`` and ``sigma_momentum_q...``: quantiles of the
      singular values. Loggers of TensorBoard get histograms, too: common logarithms of the singular values over the
      Frobenius norm, ``spectrum_gradient/<parameter>`` and ``spectrum_momentum/<parameter>``.
    - ``filter_ratio_top``, ``_rank``, ``_middle``: ``sigma_k(M) / sigma_k(G)`` for k = 1, the rank, and half of all.
      Noise is shrunk by ``sqrt((1 - mu) / (1 + mu))``, a constant signal is not.
    - ``spectral_gap_gradient``, ``spectral_gap_momentum``: ``sigma_r - sigma_(r+1)``, r the rank.
    - ``stable_rank_gradient``, ``stable_rank_momentum``: ``||X||_F^2 / ||X||_2^2``.
    - ``unlifted_share_gradient``, ``unlifted_share_momentum``: the share of singular values below 0.003 of the
      Frobenius norm, which Newton-Schulz does not bring near 1.
    - ``subspace_change_left``, ``_right``: the sine of the largest angle by which the momentum's r leading singular
      vectors have turned since the last reading.
    - ``alignment_momentum``, ``alignment_gradient``: ``<X, G'> / ||G'||_*`` of the polar factors X of M and of G with
      the next gradient G'. ``alignment_polar_average``: of M itself, where it averages polar factors
      (``order="post"``); it has no filter ratio.
    - ``orthogonality_error``: ``||O O^T - I||_F / sqrt(r)`` of O as the step takes it (O^T O where O is tall).

    What is not finite or not there is left out. Every rank measures the matrices that it owns. It needs memory for a
    copy of the gradients from one step to the next, and 12 to 24 bytes for each element of a bucket
    (`OrthogonalizedOptimizer.bucket_bytes`) and some 40 for each element of one matrix while it measures. At the end of
    fit it says which share of the time it took. Gradients are those that the step sees, clipped; the next one's
    length does not matter.

    Args:
        every_n_steps: Optimizer steps from one reading to the next.
        parameters: Globs over the names of parameters, all of whose matrices are logged; None: all matrices, of
            which more than 64 are logged as median, minimum and maximum only.
        rank: r, how many singular directions are taken for signal.

    Raises:
        ValueError: If a number is below 1; at the start of fit, if a glob matches no matrix.

    References:
        "Denoise First, Orthogonalize Later", arXiv 2606.03899.

    Example:
        >>> trainer = pl.Trainer(callbacks=[SpectralMonitor(every_n_steps=50)], logger=False)
    """

    def __init__(self, every_n_steps: int = 100, parameters: str | Sequence[str] | None = None, rank: int = 8) -> None:
        super().__init__()
        check_ranges(locals(), "SpectralMonitor", {"every_n_steps": COUNT, "rank": COUNT})
        self.every_n_steps, self.rank = every_n_steps, rank
        self.parameters = [parameters] if isinstance(parameters, str) else parameters
        self._probes: list[SpectralProbe] = []
        self._watched = 0  # the logger's step
        self._began = self._seconds = 0.0
        self._spectra = 0  # read in this fit

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the matrices; start the clock."""
        self._probes = [SpectralProbe(each, self.parameters, self.rank) for each in orthogonalized_optimizers(trainer)]
        if not self._probes:
            rank_zero_warn(
                "SpectralMonitor has nothing to measure: no optimizer of the Trainer is an OrthogonalizedOptimizer."
            )
        self._began, self._seconds, self._spectra = time.perf_counter(), 0.0, 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the step before with this one's gradients; watch this one, if it is due."""
        for number, probe in enumerate(self._probes):
            if probe.optimizer is optimizer:
                self._read(trainer, number)
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                if (step + 1) % self.every_n_steps == 0:
                    self._watched = step
                    probe.watch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the last step, which no gradient follows; say what it took."""
        for number in range(len(self._probes)):
            self._read(trainer, number, with_next=False)
        whole = time.perf_counter() - self._began
        if self._spectra:
            rank_zero_info(
                f"SpectralMonitor: the spectra of {self._spectra} matrices took {self._seconds:.2f} s, "
                f"{self._seconds / whole:.2%} of the run's {whole:,.1f} s."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers alone."""
        for probe in self._probes:
            probe.close()

    def _read(self, trainer: pl.Trainer, number: int, with_next: bool = True) -> None:
        probe = self._probes[number]
        if not probe.has_step:
            probe.close()  # the step was not taken: AMP's, after an overflow
            return
        if trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize(trainer.strategy.root_device)  # what was queued before is not ours
        began = time.perf_counter()
        spectra = probe.read(with_next)
        self._log(trainer, spectra, f"optimizer_{number}/" if len(self._probes) > 1 else "")
        self._seconds += time.perf_counter() - began
        self._spectra += len(spectra)

    def _log(self, trainer: pl.Trainer, spectra: dict[str, Spectra], prefix: str) -> None:
        by_name: dict[str, dict[str, float]] = defaultdict(dict)
        for matrix, of_matrix in spectra.items():
            for name, number in of_matrix.numbers().items():
                by_name[name][matrix] = number
        logs_matrices = self.parameters is not None or len(spectra) <= MOST_MATRICES
        metrics = {}
        for name, of_matrices in by_name.items():
            shown = of_matrices if logs_matrices else {}
            for of, function in {"min": min, "median": statistics.median, "max": max}.items():
                metrics[f"{name}/{prefix}{of}"] = function(of_matrices.values())
            metrics |= {f"{name}/{prefix}{matrix}": number for matrix, number in shown.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._watched)
            if isinstance(logger, TensorBoardLogger) and logs_matrices:
                writer: Any = logger.experiment
                for matrix, of_matrix in spectra.items():
                    for kind in ("gradient", "momentum"):
                        if len(values := of_matrix.relative(kind)):
                            writer.add_histogram(f"spectrum_{kind}/{prefix}{matrix}", values, self._watched)
