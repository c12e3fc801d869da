"""The optimizer as a callback: for modules that cannot be edited, and from YAML."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_namo.integration.build import check_callable, check_strategy, make_optimizer
from lightning_namo.integration.configure import check_schedule, configured, wrapped
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.namo import NAMO
from lightning_namo.optim.schedules import WarmupStableDecay
from lightning_namo.routing.candidates import Side
from lightning_namo.routing.globs import Blocks
from lightning_namo.routing.split import ROUTING, check_routing, split_parameters
from lightning_namo.sharding.agreement import check_same
from lightning_namo.telemetry.reading_log import ReadingLog


class OptimizerCallback(pl.Callback):
    """Trains the module with `NAMO` or another optimizer, in place of the module's own ``configure_optimizers``.

    The module need not have one. Lightning raises an error for such a module before it calls any hook of a callback.
    Before that it sets ``log`` of every callback to the module's: then this callback gives the module its
    ``configure_optimizers``, until the fit ends. To do so explicitly, call `attach` before ``fit``. The learning rate
    follows the module's ``lr`` or ``learning_rate`` as with `optimize_with`.

    Args:
        optimizer: From parameter groups to an optimizer: a class such as `NAMOD` or ``torch.optim.AdamW``, or a
            partial of one.
        schedule: A `WarmupStableDecay`, or a callable from the optimizer to a scheduler; stepped every step.
        adamw: Globs over parameter names that take AdamW whatever the routing says.
        orthogonalize: Globs over parameter names that are matrices whatever the routing says.
        blocks: From globs to row blocks of fused matrices: ``{"*.c_attn.weight": 3}``; or "auto": of those whose parts
            are known, or "heads": q, k and v by attention heads, too.
        batched: Globs of batches of matrices along the first dimension (experts); bare parameters of three dimensions
            are taken for such.
        transposed: Globs of parameters that are stored with input features as rows.
        matrix: Globs of parameters that are one matrix, and no batch.
        adopt_state: Whether to go on from a checkpoint of another optimizer: see `build_optimizer`.
        log_matrices: Whether to log what the optimizer reports of every matrix: see `ReadingLog`.
        log_aggregates: Whether to log median, minimum and maximum of that over all matrices.
        heads: "matrix": output heads that are not tied to an embedding are matrices, too, and do not take AdamW.
        first_layers: "matrix": patch embeddings and stems of convolutions are matrices, too, and do not take AdamW.

    Raises:
        RuntimeError: At the start of fit, if an optimizer's parameters are not the module's.
        ValueError: At the start of fit, if the Trainer has two of these callbacks or DeepSpeedStrategy; on all ranks,
            if their parameters differ.

    Example:
        >>> from functools import partial
        >>> from lightning_namo import NAMOD
        >>> trainer = pl.Trainer(callbacks=[OptimizerCallback(partial(NAMOD, lr=0.009))], logger=False)
    """

    def __init__(
        self,
        optimizer: Callable[[Any], Optimizer] = NAMO,
        schedule: WarmupStableDecay | LRSchedulerCallable | None = None,
        adamw: str | Sequence[str] = (),
        orthogonalize: str | Sequence[str] = (),
        blocks: Blocks | None = None,
        adopt_state: bool = False,
        batched: str | Sequence[str] = (),
        transposed: str | Sequence[str] = (),
        matrix: str | Sequence[str] = (),
        log_matrices: bool | None = None,
        log_aggregates: bool = True,
        heads: Side = "adamw",
        first_layers: Side = "adamw",
    ) -> None:
        super().__init__()
        check_callable("OptimizerCallback", optimizer)
        check_schedule("OptimizerCallback", schedule)
        self.optimizer = optimizer
        self.schedule = schedule
        self.adamw = adamw
        self.orthogonalize = orthogonalize
        self.blocks = blocks
        self.batched, self.transposed, self.matrix = batched, transposed, matrix
        self.heads, self.first_layers = heads, first_layers
        check_routing(self.routing)
        self.adopt_state = adopt_state
        self.log_matrices, self.log_aggregates = log_matrices, log_aggregates
        self.readings = ReadingLog(log_matrices, log_aggregates)
        self._own: Any = None
        self._skipped = self._checked = 0

    @property
    def routing(self) -> dict[str, Any]:
        """The arguments of `split_parameters`."""
        return {key: getattr(self, key) for key in ROUTING}

    def attach(self, module: pl.LightningModule) -> None:
        """Give a module this callback's ``configure_optimizers``, until the fit ends.

        It warns if it replaces the module's own, or another callback's, which is not restored.
        """
        if self._attached(module):
            return
        current = vars(module).get("configure_optimizers")
        other = getattr(getattr(current, "func", None), "__self__", None)
        if isinstance(other, OptimizerCallback):
            other._detach(module)
            rank_zero_warn(
                f"OptimizerCallback replaces another OptimizerCallback that was attached to {type(module).__name__}. "
                "Attach one to silence this."
            )
        elif is_overridden("configure_optimizers", module):
            rank_zero_warn(
                f"OptimizerCallback replaces the configure_optimizers of {type(module).__name__}. Remove one of the "
                "two to silence this."
            )
        self._own = vars(module).get("configure_optimizers")
        module.configure_optimizers = functools.partial(self._configure, module)  # type: ignore[method-assign]

    def _attached(self, module: pl.LightningModule) -> bool:
        current = vars(module).get("configure_optimizers")
        return isinstance(current, functools.partial) and current.func == self._configure

    def _detach(self, module: pl.LightningModule) -> None:
        if self._attached(module):
            del module.configure_optimizers
            if self._own is not None:
                module.configure_optimizers = self._own  # type: ignore[method-assign]

    def _configure(self, module: pl.LightningModule) -> OptimizerLRScheduler:
        check_strategy(module)
        groups = split_parameters(wrapped(module), **self.routing)
        parameters = zip(groups.names, groups.routes, strict=True)
        check_same([(route.name, route.shape, p.dtype) for p, route in parameters])
        return configured(module, groups, make_optimizer(groups, self.optimizer, self.adopt_state), self.schedule)

    # Lightning assigns `callback.log = module.log` before it looks for the module's configure_optimizers.
    @property
    def log(self) -> Callable[..., None]:
        """The module's ``log``, as in every callback."""
        return self._log

    @log.setter
    def log(self, log: Callable[..., None]) -> None:
        self._log = log
        module = getattr(log, "__self__", None)
        if isinstance(module, pl.LightningModule) and module.trainer.state.fn == TrainerFn.FITTING:
            count = sum(isinstance(callback, OptimizerCallback) for callback in module.trainer.callbacks)  # type: ignore[attr-defined]
            if count > 1:
                raise ValueError(
                    f"Expected one OptimizerCallback in the Trainer but got {count}, and each would configure the only "
                    "optimizer. Remove all but one."
                )
            self.attach(module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse DeepSpeed; compare the ranks' parameters, those that are there before `configure_model`.

        With other parameters on one rank, DDP refuses to wrap the module without a name, and FSDP2 hangs in its first
        forward pass.
        """
        self.readings.setup(trainer, pl_module, stage)
        if stage == "fit":
            check_strategy(pl_module)
            named = [(name, p) for name, p in pl_module.named_parameters() if not is_lazy(p)]
            check_same([(name, tuple(p.shape), p.dtype) for name, p in named])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse optimizers that would train nothing."""
        theirs = {id(parameter) for parameter in pl_module.parameters()}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if any(id(parameter) not in theirs for parameter in group["params"]):
                    raise RuntimeError(
                        f"Expected the parameters of {type(optimizer).__name__} to be the module's, but its group "
                        f"{group.get('name', '')!r} holds others, and training would change nothing in the module. "
                        "Build the optimizer from the module after it is sharded."
                    )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here: a checkpoint brings its own count."""
        self.readings.on_train_start(trainer, pl_module)
        self._skipped, self._checked = _skipped_steps(trainer), trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count samples, for the noise scale."""
        self.readings.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Have the readings kept of a step that is logged."""
        self.readings.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the readings; warn of skipped updates."""
        self.readings.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        every = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        if trainer.global_step % every == 0:
            self._report_skipped(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of those since the last report, too; say what the gradients' noise means for the batch."""
        self.readings.on_train_end(trainer, pl_module)
        self._report_skipped(trainer)

    def _report_skipped(self, trainer: pl.Trainer) -> None:
        skipped = _skipped_steps(trainer)
        if skipped > self._skipped:
            rank_zero_warn(
                f"{skipped - self._skipped} updates of matrices or AdamW groups were skipped since step "
                f"{self._checked}: their gradients were not finite (or too large to square), or missing on a rank."
            )
        self._skipped, self._checked = skipped, trainer.global_step

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the module its own ``configure_optimizers`` back: no teardown follows."""
        self._detach(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module its own ``configure_optimizers`` back."""
        if stage == "fit":
            self._detach(pl_module)


def _skipped_steps(trainer: pl.Trainer) -> int:
    return sum(o.skipped_steps() for o in trainer.optimizers if isinstance(o, OrthogonalizedOptimizer))
