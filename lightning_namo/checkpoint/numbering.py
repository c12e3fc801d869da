"""The ids of parameters in a state dict that Lightning saves."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from lightning_namo.sharding.process_group import initialized, rank_and_world_size


def number_by_module(optimizer: Optimizer, module: nn.Module) -> None:
    """Let an optimizer give parameters their positions in ``module.parameters()`` as ids when Lightning saves it.

    torch numbers by groups. When a run is resumed under FSDP or ModelParallelStrategy, Lightning turns the ids of a
    checkpoint of one device or DDP into names by the order of the module: ids by groups would give each parameter the
    state of another. torch.distributed.checkpoint counts by groups. What tells the two apart is that Lightning and
    Fabric call ``consolidate_state_dict`` right before ``state_dict`` if an optimizer has it, on one device and under
    DDP, and nothing else does.
    """
    reference, asked = weakref.ref(module), False

    def consolidate_state_dict(to: int = 0) -> None:
        nonlocal asked
        asked = not initialized() or rank_and_world_size()[0] == to

    def renumber(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal asked
        by_module, asked, root = asked, False, reference()
        positions = {} if root is None else {id(p): position for position, p in enumerate(root.parameters())}
        new = [positions.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
        if not by_module or None in new:
            return None
        return {
            "state": {new[i]: state for i, state in state_dict["state"].items()},
            "param_groups": [{**g, "params": [new[i] for i in g["params"]]} for g in state_dict["param_groups"]],
        }

    optimizer.consolidate_state_dict = consolidate_state_dict  # type: ignore[attr-defined]
    optimizer.register_state_dict_post_hook(renumber)
