"""Logs what the optimizer reports, and what follows for the batch size."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric
from torchmetrics.wrappers import Running

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.groups import named_parameters
from lightning_namo.telemetry.noise import Averages, SignalFraction, noise_scale

MOST_MATRICES = 64
"""With more, single matrices are logged only if that is asked for."""

_WINDOW = 20  # logged steps of which `at_cap` is the share
_APART = 4.0  # times the median noise scale
_NAMED = 3  # of the layers that stand apart, at either end
_OF_NOISE = {"value": "value", "at_most": "at_least"}  # what a noise scale is, by what its signal fraction is

Number: TypeAlias = tuple[float, str]  # and what it is: "value", or what a tag adds: "at_most", "at_least", "negative"
Numbers: TypeAlias = dict[str, dict[str, Number]]  # by name of a reading and by name of a matrix


class ReadingLog(pl.Callback):
    """Logs what an `OrthogonalizedOptimizer` reports, at the Trainer's log interval; `OptimizerCallback` has one.

    For the step that is logged, and with ``<parameter>[i]`` for the matrices of one that has several (blocks, experts):

    - ``step_scale/<parameter>``: NAMO's adaptive number, a / lr. ``effective_step``: what the orthogonalized direction
      is multiplied by. ``effective_decay``: the share by which the weight is shrunk. Of numbers of columns (NAMO-D) it
      is their mean, and ``step_scale_min`` and ``step_scale_max`` the least and the greatest.
    - ``at_lower_clamp``, ``at_upper_clamp``: the share of NAMO-D's columns there. ``at_cap``: the share of the last 20
      logged steps (and of columns) in which ``max_step`` bounded the step.
    - ``signal_fraction``: rho, the share of the squared norm of a gradient that is not noise, from the averages that
      NAMO and NAMO-D keep (`lightning_namo.optim.formulas.signal_fraction`). Where it is less than three standard
      errors, it is not logged, but ``signal_fraction_at_most``, its upper bound. A signal that turns within
      1 / (1 - momentum) steps counts as noise; where it swings to and fro, ``signal_fraction_negative`` is logged, and
      no noise scale.
    - ``noise_scale``: the gradient noise scale B_simple in samples, and ``noise_scale_tokens`` in tokens where a batch
      has them (its first integer tensor of two dimensions); or ``noise_scale_at_least``.
    - ``skipped_steps``, since the optimizer was made. What a rule of one's own reports, by its name.

    Each also as ``.../median``, ``.../min`` and ``.../max`` over all matrices.

    Args:
        matrices: Whether to log every matrix; None: if there are at most 64.
        aggregates: Whether to log median, minimum and maximum.
        batch_size_fn: From a batch to the samples in it; None: the length of its tensors, if they all have one.

    References:
        Noise scale: "An Empirical Model of Large-Batch Training", arXiv 1812.06162.
    """

    def __init__(
        self,
        matrices: bool | None = None,
        aggregates: bool = True,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        super().__init__()
        self.matrices, self.aggregates, self.batch_size_fn = matrices, aggregates, batch_size_fn
        self.prints_summary = True
        self._start()

    def _start(self) -> None:
        """Know nothing of earlier fits."""
        self._samples = self._tokens = 0  # of this rank, since the last step
        self._sizes: deque[tuple[int, int]] = deque(maxlen=_WINDOW)  # samples and tokens of all ranks in the last steps
        self._unlike: set[int] | None = None  # lengths of the tensors of a batch whose size is not known
        self._is_due = self._has_stepped = self._has_warned = False
        self._signals: dict[str, SignalFraction] = {}
        self._at_cap: dict[str, Running] = {}

    @property
    def _batch(self) -> float:
        """Samples in a step, the median of the last ones: the last one of an epoch may be short."""
        return statistics.median(samples for samples, _ in self._sizes) if self._sizes else 0

    @property
    def _batch_tokens(self) -> float:
        return statistics.median(tokens for _, tokens in self._sizes) if self._sizes else 0

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the summary, unless a table says that it does."""
        self.prints_summary = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier fit."""
        self._start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count samples and tokens."""
        self._is_due |= bool(trainer.loggers) and trainer._logger_connector.should_update_logs
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
        if self.batch_size_fn is not None:
            self._samples += self.batch_size_fn(batch)
        elif len(sizes := {len(tensor) for tensor in tensors}) == 1:
            self._samples += sizes.pop()
        else:
            self._unlike = sizes
        self._tokens += next((t.numel() for t in tensors if t.dim() == 2 and not t.is_floating_point()), 0)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Have the optimizer keep the readings of the step that is logged."""
        if not self._has_stepped:  # the first of several optimizers
            placement = trainer.distributed_sampler_kwargs
            replicas = 1 if placement is None else placement["num_replicas"]
            known = self._unlike is None
            self._sizes.append((self._samples * replicas * known, self._tokens * replicas * known))
            self._samples = self._tokens = 0
            self._has_stepped = True
        for each in orthogonalized_optimizers(trainer):
            each.keeps_readings = self._is_due

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if a step was taken."""
        if self._has_stepped and self._is_due:
            found: Numbers = {}
            optimizers = orthogonalized_optimizers(trainer)
            for number, optimizer in enumerate(optimizers):
                prefix = f"optimizer_{number}/" if len(optimizers) > 1 else ""
                for name, numbers in self._read(optimizer, prefix).items():
                    found.setdefault(name, {}).update(numbers)
            if metrics := self._metrics(found):
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
            self._is_due = False
        self._has_stepped = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what to do, unless a table does."""
        for optimizer in orthogonalized_optimizers(trainer):
            optimizer.keeps_readings = False
        if self.prints_summary and (words := self.summary()):
            rank_zero_info(f"Gradient noise: {words}")

    # ------------------------------------------------------------------ numbers

    def _read(self, optimizer: OrthogonalizedOptimizer, prefix: str) -> Numbers:
        """The readings of an optimizer's last step, in one transfer, and estimates in place of signal fractions."""
        on_device: dict[tuple[str, str], Tensor] = {}
        for name, of_parameters in optimizer.readings().items():
            for parameter, values in of_parameters.items():
                if values.dim() == 1:
                    on_device[name, parameter] = values
                else:
                    absent = values.isnan()
                    on_device[name, parameter] = values.nanmean(dim=1)
                    on_device[f"{name}_min", parameter] = values.masked_fill(absent, math.inf).amin(dim=1)
                    on_device[f"{name}_max", parameter] = values.masked_fill(absent, -math.inf).amax(dim=1)
        optimizer._readings = ()  # a step that is not taken (AMP's, after an overflow) leaves none
        if not on_device:
            return {}
        together = iter(torch.cat([values.float() for values in on_device.values()]).tolist())  # waits for the device
        on_host = {key: list(itertools.islice(together, len(values))) for key, values in on_device.items()}
        averages, found = _averages(optimizer), defaultdict[str, dict[str, Number]](dict)
        for (name, parameter), numbers in on_host.items():
            for i, value in enumerate(numbers):
                matrix = prefix + (f"{parameter}[{i}]" if len(numbers) > 1 else parameter)
                if name == "step" or not math.isfinite(value):
                    continue
                if name == "signal_fraction" and parameter in averages:
                    signal = self._signals.setdefault(matrix, SignalFraction(averages[parameter]))
                    signal.averages = averages[parameter]  # a schedule may change them
                    signal.add(int(on_host["step", parameter][0]), value)
                    if (estimate := signal.estimate()) is not None:
                        found[name][matrix] = estimate.rho, estimate.kind
                elif name == "at_cap":
                    # All ranks have the same numbers: nothing is to be synced.
                    share = self._at_cap.setdefault(matrix, Running(MeanMetric(sync_on_compute=False), _WINDOW))
                    share.update(value)
                    found[name][matrix] = float(share.compute()), "value"
                else:
                    found[{"skipped": "skipped_steps"}.get(name, name)][matrix] = value, "value"
        return found

    def _metrics(self, found: Numbers) -> dict[str, float]:
        """What is logged, by tag."""
        if found.get("signal_fraction") and self._unlike is not None and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                "The noise scale is not logged, since the tensors of a batch are not of one length: "
                f"{sorted(self._unlike) or 'there are none'}. Say how many samples it has, in "
                "ReadingLog(batch_size_fn=...) or OptimizerCallback's readings.batch_size_fn."
            )
        metrics: dict[str, float] = {}
        matrices = {matrix for name in found.keys() - {"skipped_steps"} for matrix in found[name]}
        for name, of_matrices in found.items():
            shown = dict(of_matrices) if self._logs_matrices(len(matrices)) else {}
            if self.aggregates and of_matrices:
                ordered = sorted(of_matrices.values())
                shown |= {"min": ordered[0], "median": median(ordered), "max": ordered[-1]}
            metrics |= _tagged(name, shown)
            if name == "signal_fraction":
                turned = {{"min": "max", "max": "min"}.get(of, of): number for of, number in shown.items()}
                for scale, batch in {"noise_scale": self._batch, "noise_scale_tokens": self._batch_tokens}.items():
                    metrics |= _tagged(scale, _noise_scales(turned, batch))
        return metrics

    def _logs_matrices(self, count: int) -> bool:
        return count <= MOST_MATRICES if self.matrices is None else self.matrices

    def summary(self) -> str | None:
        """What a user can act on: median signal fraction, noise scale beside the batch, and what stands apart.

        None without a signal fraction or a batch size.
        """
        estimates = {matrix: signal.estimate() for matrix, signal in self._signals.items()}
        rhos = {matrix: (e.rho, str(e.kind)) for matrix, e in estimates.items() if e is not None}
        batch, count = self._batch, len(rhos)
        scales = _noise_scales(rhos, batch)
        if not rhos or not batch:
            return None
        swinging = sum(kind == "negative" for _, kind in rhos.values())
        if 2 * swinging > count:
            return (
                f"in {swinging} of {count} matrices the gradients of neighbouring steps oppose each other: the signal "
                f"swings faster than the momentum averages, so that the averages do not show whether the batch of "
                f"{batch:,.0f} is large enough; GradientNoiseScale measures the noise directly"
            )
        rho, kind = median(sorted(rhos.values()))
        is_bound, scale = kind != "value", noise_scale(rho, batch) if rho > 0 else math.inf
        per_sample = self._batch_tokens / batch
        tokens = [f" ({n * per_sample:,.0f} tokens)" if per_sample else "" for n in (scale, batch)]
        if scale < batch / _APART and not is_bound:
            advice = "smaller batches would do"
        elif scale > _APART * batch:
            advice = (
                "a signal that turns counts as noise here; measure it (GradientNoiseScale) before you enlarge the batch"
            )
        elif is_bound:
            advice = "whether it is larger cannot be told yet"
        else:
            advice = "they are of one size"
        words = [
            f"{'at most ' if is_bound else ''}{rho:.1%} of a gradient persists (median of {count} matrices)",
            f"if the rest is noise, its scale is {'at least ' if is_bound else ''}{scale:,.0f} samples{tokens[0]} "
            f"beside a batch of {batch:,.0f}{tokens[1]}: {advice}",
        ]
        by_scale = sorted(scales, key=scales.__getitem__)
        noisy = [matrix for matrix in by_scale[::-1] if scales[matrix][0] > _APART * scale]
        clear = [matrix for matrix in by_scale if scales[matrix][0] < scale / _APART and scales[matrix][1] == "value"]
        for which, names in {"noisier": noisy, "clearer": clear}.items():
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                bound = {"value": "", "at_most": "at most "}
                listed = ", ".join(f"{m} ({bound[rhos[m][1]]}{rhos[m][0]:.1%})" for m in names[:_NAMED])
                words.append(f"{which} by more than {_APART:.0f} times: {listed}{more}")
        return "; ".join(words)


def reading_log(trainer: pl.Trainer) -> ReadingLog | None:
    """The log among a Trainer's callbacks, or that of its `OptimizerCallback`."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    logs = (each if isinstance(each, ReadingLog) else getattr(each, "readings", None) for each in callbacks)
    return next((log for log in logs if isinstance(log, ReadingLog)), None)


def median(ordered: Sequence[Number]) -> Number:
    """The median of numbers that are in order; the mean of two of other kinds is a bound."""
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    kinds = sorted({kind for _, kind in middle})  # "at_least" or "at_most" come first
    if len(kinds) == 2 and "negative" in kinds:
        return sum(max(value, 0.0) for value, _ in middle) / 2, "at_most"
    return sum(value for value, _ in middle) / len(middle), kinds[0]


def _tagged(name: str, numbers: dict[str, Number]) -> dict[str, float]:
    """Numbers by tag, which says what they are."""
    return {f"{name}{'' if kind == 'value' else f'_{kind}'}/{of}": value for of, (value, kind) in numbers.items()}


def _noise_scales(rhos: dict[str, Number], batch: float) -> dict[str, Number]:
    """In units of the batch's, of the matrices whose signal fraction says one."""
    return {
        matrix: (noise_scale(rho, batch), _OF_NOISE[kind])
        for matrix, (rho, kind) in rhos.items()
        if kind in _OF_NOISE and rho and batch
    }


def _averages(optimizer: OrthogonalizedOptimizer) -> dict[str, Averages]:
    """How the signal fraction is averaged, of the parameters whose groups say so."""
    keys = ("momentum", "nesterov", "beta2")
    return {
        name: Averages(*(group[key] for key in keys))
        for group in optimizer.param_groups
        if group["orthogonalize"] and all(key in group for key in keys)
        for _, name in named_parameters(group)
    }


def orthogonalized_optimizers(trainer: pl.Trainer) -> list[OrthogonalizedOptimizer]:
    """Those among a Trainer's optimizers."""
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, OrthogonalizedOptimizer)]
