"""From a module to its optimizer: for Lightning's ``configure_optimizers``, for Fabric and for plain PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_namo.base import OrthogonalizedOptimizer
from lightning_namo.checkpoint import number_by_module
from lightning_namo.param_groups import ParameterGroups, split_parameters
from lightning_namo.schedules import WarmupStableDecay

Schedule: TypeAlias = WarmupStableDecay | Callable[[Optimizer], LRScheduler]
Globs: TypeAlias = str | Sequence[str]
Blocks: TypeAlias = Mapping[str, int | Sequence[int]]
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def build_optimizer(
    module: nn.Module,
    cls: Callable[..., AnyOptimizer],
    *,
    adamw: Globs = (),
    orthogonalize: Globs = (),
    blocks: Blocks | None = None,
    adopt_state: bool = False,
    **hyper: Any,
) -> AnyOptimizer:
    """Split a module's parameters and build an optimizer over them.

    With Fabric and FSDP2 build it after the model is sharded: ``model = fabric.setup_module(model)``, then
    ``optimizer = build_optimizer(model, NAMO)``, then ``fabric.setup_optimizers(optimizer)``.

    Args:
        module: Whose parameters to train, as the strategy left it (wrapped or sharded).
        cls: `NAMO`, `NAMOD`, `Muon`, `AdaMuon`, or any callable from parameter groups to an optimizer.
        adamw: Globs over parameter names that take AdamW whatever the routing says.
        orthogonalize: Globs over parameter names that are matrices whatever the routing says.
        blocks: From globs to row blocks of fused matrices: ``{"*.c_attn.weight": 3}``.
        adopt_state: Whether to go on from a checkpoint of another optimizer (AdamW, Muon, ...): the momentum and the
            state of AdamW's parameters are taken over, all else starts anew, and a warning says what. Not for runs
            that resume their own checkpoint.
        **hyper: Hyper-parameters of ``cls``.

    Returns:
        One optimizer over all trainable parameters.

    Raises:
        ValueError: For globs that match nothing or contradict each other, no matrix, hyper-parameters out of range.
    """
    _check_callable("build_optimizer", cls)
    groups = split_parameters(module, adamw=adamw, orthogonalize=orthogonalize, blocks=blocks)
    return make_optimizer(groups, functools.partial(cls, **hyper), adopt_state)


def _check_callable(function: str, cls: object) -> None:
    if not callable(cls):
        raise TypeError(f"{function}: expected an optimizer class, as NAMOD, but got {cls!r}.")


def optimize_with(
    cls: Callable[..., Optimizer],
    *,
    schedule: Schedule | None = None,
    adamw: Globs = (),
    orthogonalize: Globs = (),
    blocks: Blocks | None = None,
    adopt_state: bool = False,
    **hyper: Any,
) -> Callable[[pl.LightningModule], OptimizerLRScheduler]:
    """Make a ``configure_optimizers`` for a LightningModule.

    Args:
        cls: `NAMO`, `NAMOD`, `Muon`, `AdaMuon`, or any callable from parameter groups to an optimizer.
        schedule: A `WarmupStableDecay`, or a callable from the optimizer to a scheduler; stepped every step.
        adamw: As `build_optimizer`'s.
        orthogonalize: As `build_optimizer`'s.
        blocks: As `build_optimizer`'s.
        adopt_state: As `build_optimizer`'s.
        **hyper: Hyper-parameters of ``cls``.

    Returns:
        A function of the module, for the class body or to be called inside the hook.

    Example:
        >>> from lightning_namo import NAMOD
        >>> class LitModel(pl.LightningModule):
        ...     configure_optimizers = optimize_with(NAMOD, lr=0.009, clamp=0.1)
    """
    _check_callable("optimize_with", cls)

    def configure_optimizers(self: pl.LightningModule) -> OptimizerLRScheduler:
        groups = split_parameters(wrapped(self), adamw=adamw, orthogonalize=orthogonalize, blocks=blocks)
        return configured(self, groups, make_optimizer(groups, functools.partial(cls, **hyper), adopt_state), schedule)

    return configure_optimizers


def configured(
    module: pl.LightningModule, groups: ParameterGroups, optimizer: Optimizer, schedule: Schedule | None
) -> OptimizerLRScheduler:
    """What Lightning wants from ``configure_optimizers``; logs the routing table on rank zero.

    Raises:
        ValueError: If the schedule needs the run's length and the trainer has no limit.
    """
    rank_zero_info(f"{type(optimizer).__name__} trains the parameters of {type(module).__name__} so:\n{groups}")
    if schedule is None:
        return optimizer
    if not module.automatic_optimization:
        rank_zero_warn(
            f"{type(module).__name__} optimizes manually, so Lightning does not step the schedule. Call "
            "self.lr_schedulers().step() after each optimizer step."
        )
    if not isinstance(schedule, WarmupStableDecay):
        scheduler = schedule(optimizer)
    else:
        total: float | None = None
        if schedule.needs_total_steps:
            trainer = module.trainer
            unloaded = trainer.train_dataloader is None
            total = trainer.estimated_stepping_batches
            if unloaded and trainer.ckpt_path:
                # Lightning #20550: a loader loaded this early would not get its state from the checkpoint
                trainer.fit_loop._combined_loader = None
            if math.isinf(total):
                raise ValueError(
                    "Expected the schedule or the trainer to limit the run, but both are open-ended. Set "
                    "Trainer(max_steps=...) or WarmupStableDecay(total_steps=...)."
                )
        scheduler = schedule(optimizer, None if total is None else int(total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def wrapped(module: pl.LightningModule) -> nn.Module:
    """The module as the trainer's strategy wrapped it: FSDP1's outermost unit knows the shapes, and lies outside."""
    trainer = getattr(module, "_trainer", None)
    root = None if trainer is None else trainer.strategy.model
    return root if isinstance(root, nn.Module) and any(m is module for m in root.modules()) else module


def make_optimizer(
    groups: ParameterGroups, make: Callable[[ParameterGroups], AnyOptimizer], adopt_state: bool = False
) -> AnyOptimizer:
    """Build the optimizer; groups of one that knows no matrices (torch.optim.AdamW) lose the keys about them.

    Raises:
        ValueError: If it is to take over another optimizer's state and is none of this package.
    """
    optimizer = make(groups)
    optimizer.routing = str(groups)  # type: ignore[attr-defined]  # for the run card
    if isinstance(optimizer, OrthogonalizedOptimizer):
        optimizer.adopt_state = adopt_state
        return optimizer
    if adopt_state:
        raise ValueError(
            f"Expected adopt_state=True with NAMO, NAMOD, Muon or AdaMuon. Got {type(optimizer).__name__}."
        )
    if (module := groups.module()) is not None:
        number_by_module(optimizer, module)
    for group in optimizer.param_groups:
        for key in ("orthogonalize", "transposed", "blocks"):
            group.pop(key, None)
    optimizer.register_load_state_dict_pre_hook(_refuse_ours)
    return optimizer


def _refuse_ours(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse what torch would load, to miss its own keys in the next step."""
    theirs = {group["algorithm"] for group in state_dict["param_groups"] if "algorithm" in group}
    if theirs:
        raise ValueError(
            f"Expected a checkpoint of {type(optimizer).__name__}, but it is of {', '.join(sorted(theirs))}. Train on "
            "with what it was trained with. Nothing was loaded."
        )
