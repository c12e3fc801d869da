"""From a module to its optimizer, for Lightning's ``configure_optimizers``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_namo.arguments import is_number
from lightning_namo.integration.build import Globs, check_callable, check_strategy, make_optimizer
from lightning_namo.optim.groups import GroupedOptimizer
from lightning_namo.optim.schedules import WarmupStableDecay
from lightning_namo.routing.candidates import Side
from lightning_namo.routing.globs import Blocks
from lightning_namo.routing.split import ROUTING, ParameterGroups, check_routing, split_parameters

Schedule: TypeAlias = WarmupStableDecay | Callable[[Optimizer], LRScheduler]


# In a module's __dict__, so that copies have it: the attribute for a learning rate, the optimizer's, and the value that
# the attribute had when first configured.
_RATE = "_lightning_namo_rate"


def optimize_with(
    cls: Callable[..., Optimizer],
    *,
    schedule: Schedule | None = None,
    adamw: Globs = (),
    orthogonalize: Globs = (),
    blocks: Blocks | None = None,
    batched: Globs = (),
    transposed: Globs = (),
    matrix: Globs = (),
    heads: Side = "adamw",
    first_layers: Side = "adamw",
    adopt_state: bool = False,
    **hyper: Any,
) -> Callable[[pl.LightningModule], OptimizerLRScheduler]:
    """Make a ``configure_optimizers`` for a LightningModule.

    Where the module has an attribute (or hyper-parameter) ``lr`` or ``learning_rate`` that equals the optimizer's, that
    is the learning rate: a later fit takes its new value, such as the suggestion of ``Tuner.lr_find``. AdamW groups
    follow, too, unless ``adamw_lr`` is given.

    Args:
        cls: `NAMO` or another `OrthogonalizedOptimizer`, or any callable from parameter groups to an optimizer.
        schedule: A `WarmupStableDecay`, or a callable from the optimizer to a scheduler; stepped every step.
        adamw: As `build_optimizer`'s.
        orthogonalize: As `build_optimizer`'s.
        blocks: As `build_optimizer`'s.
        batched: As `build_optimizer`'s.
        transposed: As `build_optimizer`'s.
        matrix: As `build_optimizer`'s.
        heads: As `build_optimizer`'s.
        first_layers: As `build_optimizer`'s.
        adopt_state: As `build_optimizer`'s.
        **hyper: Hyper-parameters of ``cls``.

    Returns:
        A function of the module, for the class body or to be called inside the hook.

    Example:
        >>> from lightning_namo import NAMOD
        >>> class LitModel(pl.LightningModule):
        ...     configure_optimizers = optimize_with(NAMOD, lr=0.009, clamp=0.1)
    """
    given = locals()
    check_callable("optimize_with", cls, hyper)
    check_schedule("optimize_with", schedule)
    check_routing(given)

    def configure_optimizers(self: pl.LightningModule) -> OptimizerLRScheduler:
        check_strategy(self)
        groups = split_parameters(wrapped(self), **{key: given[key] for key in ROUTING})
        return configured(self, groups, make_optimizer(groups, functools.partial(cls, **hyper), adopt_state), schedule)

    return configure_optimizers


def check_schedule(function: str, schedule: object) -> None:
    """Raise a TypeError for what makes no schedule."""
    if schedule is not None and not callable(schedule):
        raise TypeError(
            f"{function}: expected schedule to be a WarmupStableDecay, or a function from the optimizer to a "
            f"scheduler, but got {schedule!r}."
        )


def configured(
    module: pl.LightningModule, groups: ParameterGroups, optimizer: Optimizer, schedule: Schedule | None
) -> OptimizerLRScheduler:
    """What Lightning wants from ``configure_optimizers``; logs the routing table on rank zero.

    Raises:
        ValueError: If the schedule needs the run's length and the trainer has no limit.
    """
    rank_zero_info(f"{type(optimizer).__name__} trains the parameters of {type(module).__name__} so:\n{groups}")
    _follow_attribute(module, optimizer)
    _check_finder(module, optimizer, schedule)
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


def _follow_attribute(module: pl.LightningModule, optimizer: Optimizer) -> None:
    """Let the optimizer follow the module's attribute for the learning rate, where it is one.

    ``Tuner.lr_find`` writes its suggestion there, and the next fit configures the optimizer anew.
    """
    name = _rate_attribute(module)
    lr: Any = optimizer.defaults.get("lr")
    if name is None or not is_number(lr):
        return
    value: Any = lightning_getattr(module, name)
    if vars(module).get(_RATE, (None, None))[:2] != (name, lr):
        vars(module)[_RATE] = name, lr, value
    original = vars(module)[_RATE][2]
    if not is_number(value) or not is_number(original) or value == original:
        return
    where, cls = f"{type(module).__name__}.{name}", type(optimizer).__name__
    if original == lr:
        _set_rate(optimizer, value)
        rank_zero_info(f"{cls} follows {where}: its learning rate is {value}, and was {lr}.")
    else:
        rank_zero_warn(
            f"{where} is {value} now and was {original} when the optimizer was first configured, but nothing follows "
            f"it: the learning rate of {cls} is {lr}. If {name} is to be the learning rate, as for Tuner.lr_find, give "
            "both the same value from the start; else rename it."
        )


def _rate_attribute(module: pl.LightningModule) -> str | None:
    """The attribute or hyper-parameter that Lightning's learning rate finder takes for the learning rate."""
    names = [finder._attr_name for finder in _finders(module)]
    if _RATE in vars(module):
        names.append(vars(module)[_RATE][0])  # that a finder was told in an earlier fit
    return next((n for n in (*names, "lr", "learning_rate") if n and lightning_hasattr(module, n)), None)


def _finders(module: pl.LightningModule) -> list[LearningRateFinder]:
    trainer = getattr(module, "_trainer", None)
    return [c for c in getattr(trainer, "callbacks", ()) if isinstance(c, LearningRateFinder)]


def _set_rate(optimizer: Optimizer, lr: float) -> None:
    if isinstance(optimizer, GroupedOptimizer):
        optimizer.set_lr(lr)
        return
    for group in optimizer.param_groups:
        if group["lr"] == optimizer.defaults["lr"]:
            group["lr"] = lr


def _check_finder(module: pl.LightningModule, optimizer: Optimizer, schedule: Schedule | None) -> None:
    """Warn where the callback LearningRateFinder finds a rate that this fit will not have, or for other groups."""
    if not any(finder._update_attr and not finder._early_exit for finder in _finders(module)):
        return  # Tuner.lr_find ends its own fit early; the next one configures the optimizer anew
    own_rate = isinstance(optimizer, GroupedOptimizer) and not optimizer.adamw_follows
    if schedule is None and not own_rate:
        return
    problem = "the schedule sets the one it began with again" if schedule else "it sets that of the AdamW groups, too"
    rank_zero_warn(
        "LearningRateFinder changes the learning rate of all groups after the optimizer was configured, and in this "
        f"fit {problem}. Find it before: Tuner(trainer).lr_find(module), then trainer.fit(module)."
    )


def wrapped(module: pl.LightningModule) -> nn.Module:
    """The module as the trainer's strategy wrapped it: FSDP1's outermost unit, which knows the shapes, is around it."""
    trainer = getattr(module, "_trainer", None)
    root = None if trainer is None else trainer.strategy.model
    return root if isinstance(root, nn.Module) and any(m is module for m in root.modules()) else module
