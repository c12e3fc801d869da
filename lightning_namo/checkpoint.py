"""What torch's optimizer state dicts need to survive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

STATISTICS = ("step", "skipped", "v")  # kept in float32 at least, whatever the parameter's dtype


def check_state(optimizer: Optimizer, state_dict: dict[str, Any], names: Sequence[str]) -> None:
    """Raise if a state dict holds, for some parameter, another state than the optimizer keeps of it.

    Catches checkpoints of another algorithm, and states that were assigned to the wrong parameters by position:
    Lightning does that to a checkpoint of one device or DDP that is resumed under ModelParallelStrategy.

    Args:
        optimizer: Whose state was made when it was built; parameters without any are not checked.
        state_dict: To be loaded into it.
        names: Of the optimizer's parameters, in its order.

    Raises:
        ValueError: Naming the parameter, what was expected and what came.
    """
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for saved_id, parameter, name in zip(saved_ids, parameters, names, strict=False):  # torch counts them
        saved, own = state_dict["state"].get(saved_id), optimizer.state.get(parameter)
        if saved and own and {key: _shape(saved[key]) for key in saved} != {key: _shape(own[key]) for key in own}:
            raise ValueError(
                f"Expected the state of {name} to be {_words(own)} but the checkpoint has {_words(saved)}. It is "
                f"of another optimizer than {type(optimizer).__name__}, of another model or routing, or was saved "
                "on one device or under DDP and is loaded under ModelParallelStrategy. Nothing was loaded."
            )


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _words(state: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_shape(state[key])}" for key in sorted(state))


def restore_statistics(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put back the statistics that ``Optimizer.load_state_dict`` cast to the parameter's dtype.

    Args:
        optimizer: That has just loaded ``state_dict``.
        state_dict: As it was given, uncast.
    """
    saved_ids = (i for group in state_dict["param_groups"] for i in group["params"])
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for saved_id, parameter in zip(saved_ids, parameters, strict=True):
        saved = state_dict["state"].get(saved_id, {})
        for key in STATISTICS:
            if isinstance(saved.get(key), Tensor):
                optimizer.state[parameter][key] = saved[key].detach().clone().to(parameter.device)
