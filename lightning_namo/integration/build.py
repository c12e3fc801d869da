"""From a module to its optimizer, for Fabric and plain PyTorch: imports no Lightning."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import nn
from torch.optim import Optimizer

from lightning_namo.checkpoint.numbering import number_by_module
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.routing.candidates import Side
from lightning_namo.routing.globs import Blocks
from lightning_namo.routing.split import ROUTING, ParameterGroups, split_parameters

Globs: TypeAlias = str | Sequence[str]
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def build_optimizer(
    module: nn.Module,
    cls: Callable[..., AnyOptimizer],
    *,
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
) -> AnyOptimizer:
    """Split a module's parameters and build an optimizer over them.

    With Fabric and FSDP2 build it after the model is sharded: ``model = fabric.setup_module(model)``, then
    ``optimizer = build_optimizer(model, NAMO)``, then ``fabric.setup_optimizers(optimizer)``.

    Args:
        module: Whose parameters to train, as the strategy left it (wrapped or sharded).
        cls: `NAMO` or another `OrthogonalizedOptimizer`, or any callable from parameter groups to an optimizer.
        adamw: Globs over parameter names that take AdamW whatever the routing says.
        orthogonalize: Globs over parameter names that are matrices whatever the routing says.
        blocks: From globs to row blocks of fused matrices: ``{"*.c_attn.weight": 3}``; or "auto": of those whose parts
            are known, or "heads": q, k and v by attention heads, too.
        batched: Globs of batches of matrices along the first dimension (experts); bare parameters of three dimensions
            are taken for such.
        transposed: Globs of parameters that are stored with input features as rows.
        matrix: Globs of parameters that are one matrix, and no batch.
        heads: "matrix": output heads that are not tied to an embedding are matrices, too, and do not take AdamW.
        first_layers: "matrix": patch embeddings and stems of convolutions are matrices, too, and do not take AdamW.
        adopt_state: Whether to go on from a checkpoint of another optimizer (AdamW, Muon, ...): the momentum and the
            state of AdamW's parameters are taken over, all else starts anew, and a warning says what. Not for runs
            that resume their own checkpoint.
        **hyper: Hyper-parameters of ``cls``.

    Returns:
        One optimizer over all trainable parameters.

    Raises:
        ValueError: For globs that match nothing or contradict each other, no matrix, hyper-parameters out of range, and
            under DeepSpeed.
    """
    given = locals()
    check_callable("build_optimizer", cls, hyper)
    check_strategy(module)
    groups = split_parameters(module, **{key: given[key] for key in ROUTING})
    return make_optimizer(groups, functools.partial(cls, **hyper), adopt_state)


def check_callable(function: str, cls: object, hyper: Collection[str] = ()) -> None:
    """Raise a TypeError for what cannot make an optimizer, or takes no such arguments."""
    if not callable(cls):
        raise TypeError(f"{function}: expected an optimizer class, as NAMOD, but got {cls!r}.")
    try:
        takes = inspect.signature(cls).parameters if hyper else {}
    except ValueError:  # a callable without a signature
        return
    names = [name for name, parameter in takes.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    for key in hyper if len(names) == len(takes) else ():
        if key not in names:
            name = getattr(getattr(cls, "func", cls), "__name__", cls)
            close = difflib.get_close_matches(key, [*names, *ROUTING], n=1)
            advice = f"Nearest: {close[0]}" if close else f"It takes {', '.join(names[1:])}"
            raise TypeError(f"{function}: expected arguments of {name} but got {key}. {advice}.")


def check_strategy(module: nn.Module) -> None:
    """Raise under DeepSpeed, for a LightningModule in a Trainer or a module that Fabric has set up.

    Raises:
        ValueError: With the strategies to use.
    """
    trainer = getattr(module, "_trainer", None)
    strategy = getattr(module, "_strategy", None) if trainer is None else trainer.strategy
    if any(cls.__name__ == "DeepSpeedStrategy" for cls in strategy.__class__.__mro__):  # Fabric's or the Trainer's
        raise ValueError(
            "Expected a strategy that gives the optimizer matrices or shards of them, but got DeepSpeedStrategy: "
            "DeepSpeed flattens parameters, and no matrix in them can be orthogonalized. Use FSDPStrategy or "
            "ModelParallelStrategy (FSDP2), which shard as much."
        )


def make_optimizer(
    groups: ParameterGroups, make: Callable[[ParameterGroups], AnyOptimizer], adopt_state: bool = False
) -> AnyOptimizer:
    """Build the optimizer; groups of an optimizer of another package (torch.optim.AdamW) lose the keys about matrices.

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
            "Expected adopt_state=True with a subclass of OrthogonalizedOptimizer, as NAMO. Got "
            f"{type(optimizer).__name__}."
        )
    if (module := groups.module()) is not None:
        number_by_module(optimizer, module)
    for group in optimizer.param_groups:
        for key in ("orthogonalize", "transposed", "blocks", "batched"):
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
