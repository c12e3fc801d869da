"""What torch's optimizer state dicts need to survive."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

STATISTICS = ("step", "skipped", "v")  # kept in float32 at least, whatever the parameter's dtype


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
