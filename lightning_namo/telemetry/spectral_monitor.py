"""Logs spectra of gradients and momentum, and what orthogonalization makes of them."""

from __future__ import annotations

import difflib
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_namo.arguments import COUNT, check, check_ranges
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.routing.names import clean_name
from lightning_namo.sharding.process_group import gather
from lightning_namo.telemetry.reading_log import MOST_MATRICES, orthogonalized_optimizers
from lightning_namo.telemetry.spectra import Spectra
from lightning_namo.telemetry.spectral_probe import SpectralProbe, matrix_names


class SpectralMonitor(pl.Callback):
    """Logs the spectra of an `OrthogonalizedOptimizer`'s gradients G and momenta M, and how well its O is orthogonal.

    Of every n-th step, read when the next one begins, whose gradient is not inside the momentum; with
    ``<parameter>[i]`` for the matrices of one that has several (blocks, experts), and over all of them as
    ``.../median``, ``.../min`` and ``.../max``:

    - ``sigma_gradient_q0``, ``_q25``, ``_q50``, ``_q75``, ``_q100`` and ``sigma_momentum_q...``: quantiles of the
      singular values. Loggers of TensorBoard get histograms, too: common logarithms of the singular values over the
      Frobenius norm, ``spectrum_gradient/<parameter>`` and ``spectrum_momentum/<parameter>``.
    - ``filter_ratio_top``, ``_rank``, ``_middle``: ``sigma_k(M) / sigma_k(G)`` for k = 1, the rank, and half of all,
      where M averages gradients. Noise is shrunk by ``sqrt((1 - mu) / (1 + mu))``, a constant signal is not.
    - ``spectral_gap_gradient``, ``spectral_gap_momentum``: ``sigma_r - sigma_(r+1)``, r the rank.
    - ``stable_rank_gradient``, ``stable_rank_momentum``: ``||X||_F^2 / ||X||_2^2``.
    - ``unlifted_share_gradient``, ``unlifted_share_momentum``: the share of singular values below 0.003 of the
      Frobenius norm, which Newton-Schulz does not bring near 1.
    - ``subspace_change_left``, ``_right``: the sine of the largest angle by which the momentum's r leading singular
      vectors have turned since the last reading.
    - ``alignment_momentum``, ``alignment_gradient``: ``<X, G'> / ||G'||_*`` of the polar factors X of M and of G with
      the next gradient G'. With ``order="post"`` M averages polar factors, and ``alignment_polar_average`` is of M.
    - ``orthogonality_error``: ``||O O^T - I||_F / sqrt(r)`` of O as the step takes it (O^T O where O is tall).

    Gradients are those that the steps see, clipped. What is not finite, zero or not there is left out, and what needs
    more singular values than the shorter side of a matrix has: the gap and the subspaces of min(m, n) <= r.

    Every rank measures the matrices that it owns, and all ranks need the same callback. It needs memory for a copy of
    the gradients from one step to the next, for r singular vectors of each matrix, and while it measures 12 to 24 bytes
    for each element of a bucket (`OrthogonalizedOptimizer.bucket_bytes`) and up to 90 for each element of one matrix.
    At the end of fit it says which share of the time it took.

    Args:
        every_n_steps: Steps from one reading to the next, counted as Lightning's log interval; an optimizer that does
            not step then is read in its next step.
        parameters: Globs over the names of parameters, all of whose matrices are logged; None: all matrices, of
            which more than 64 are logged as median, minimum and maximum only.
        rank: r, how many singular directions are taken for signal.

    Raises:
        ValueError: If a number is below 1, or there is no glob; at the start of fit, if a glob matches no matrix and no
            frozen parameter, or the ranks have other arguments.

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
        check(parameters is None or parameters, "SpectralMonitor", "parameters", "globs, or None", parameters)
        self._start()

    def _start(self) -> None:
        """Know nothing of earlier fits."""
        self._probes: list[SpectralProbe] = []
        self._periods: list[int] = []  # of every_n_steps, of which each optimizer has seen a step
        self._began, self._seconds = time.perf_counter(), 0.0
        self._readings = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the matrices; start the clock."""
        self.teardown(trainer, pl_module, "fit")
        arguments = self.every_n_steps, self.parameters, self.rank
        if (of_ranks := gather(arguments, "compare SpectralMonitor's arguments")) != [arguments] * len(of_ranks):
            raise ValueError(
                f"Expected SpectralMonitor to have the same arguments on all ranks. Got {of_ranks}. Give all ranks "
                "the same."
            )
        optimizers = orthogonalized_optimizers(trainer)
        self._check_globs(optimizers, pl_module)
        if not optimizers or not trainer.loggers:
            why = "the Trainer has no logger" if optimizers else "no optimizer is an OrthogonalizedOptimizer"
            rank_zero_warn(f"SpectralMonitor has nothing to do: {why}.")
            return
        self._probes = [SpectralProbe(each, self.parameters, self.rank) for each in optimizers]
        self._periods = [_stepped(trainer) // self.every_n_steps] * len(optimizers)

    def _check_globs(self, optimizers: Sequence[OrthogonalizedOptimizer], module: pl.LightningModule) -> None:
        """A frozen parameter may become a matrix."""
        names = [name for optimizer in optimizers for name in matrix_names(optimizer).values()]
        names += [clean_name(name) for name, p in module.named_parameters() if not p.requires_grad]
        for glob in self.parameters or () if optimizers else ():
            if not any(fnmatchcase(name, glob) for name in names):
                nearest = ", ".join(difflib.get_close_matches(glob, names, n=3, cutoff=0.0))
                raise ValueError(
                    f"Expected {glob!r} in SpectralMonitor's parameters to match the name of a parameter that holds "
                    f"matrices, but got no match. Nearest: {nearest}."
                )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Have a step watched that is due."""
        for number, probe in enumerate(self._probes):
            period = (_stepped(trainer) + 1) // self.every_n_steps
            if probe.optimizer is optimizer and period > self._periods[number]:
                self._periods[number] = period
                probe.watch(_stepped(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was read."""
        for number, probe in enumerate(self._probes):
            if (taken := probe.take()) is not None:
                began = time.perf_counter()
                self._log(trainer, *taken, f"optimizer_{number}/" if len(self._probes) > 1 else "")
                self._seconds += time.perf_counter() - began
                self._readings += len(taken[1])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the last step, which no gradient follows; say what it took."""
        for probe in self._probes:
            probe.finish()
        self.on_train_batch_end(trainer, pl_module, None, None, 0)
        whole, own = time.perf_counter() - self._began, self._seconds + sum(probe.seconds for probe in self._probes)
        words = f"{self._readings} readings of a matrix took {own:.2f} s, {own / whole:.2%} of the run's {whole:,.1f} s"
        if not self._readings:
            words = f"no step was read, since {_stepped(trainer)} were taken and every {self.every_n_steps} is"
        if self._probes:
            rank_zero_info(f"SpectralMonitor: {words}.")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers alone."""
        for probe in self._probes:
            probe.close()
        self._start()

    def _log(self, trainer: pl.Trainer, step: int, spectra: dict[str, Spectra], prefix: str) -> None:
        by_name: dict[str, dict[str, float]] = defaultdict(dict)
        for matrix, of_matrix in spectra.items():
            for name, number in of_matrix.numbers().items():
                by_name[name][matrix] = number
        logs_matrices = self.parameters is not None or len(spectra) <= MOST_MATRICES
        metrics: dict[str, float] = {}
        for name, of_matrices in by_name.items():
            shown = of_matrices if logs_matrices else {}
            values = sorted(of_matrices.values())
            of_all = {"min": values[0], "median": statistics.median(values), "max": values[-1]}
            metrics |= {f"{name}/{prefix}{of}": number for of, number in {**of_all, **shown}.items()}
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=step)
            if isinstance(logger, TensorBoardLogger) and logs_matrices:
                writer: Any = logger.experiment
                for matrix, of_matrix in spectra.items():
                    for kind in ("gradient", "momentum"):
                        if len(relative := of_matrix.relative(kind)):
                            writer.add_histogram(f"spectrum_{kind}/{prefix}{matrix}", relative, step)


def _stepped(trainer: pl.Trainer) -> int:
    """Steps that were taken, as Lightning's log interval and loggers count them."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
