"""AdamW for the parameters that are no matrices: torch's own, on local shards, safe against gradients not finite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from lightning_namo.regions import local_gradient, local_tensor


def adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state that torch's fused AdamW keeps of a parameter."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


class AdamWStep:
    """One step of all AdamW groups, in two halves: flags that all ranks must agree on, then the update.

    A group with a gradient that is not finite is left alone, weights and state, by the mechanism that torch's fused
    AdamW has for gradient scalers; parameters that it cannot fuse (complex ones) step unguarded.

    Args:
        groups: Parameter groups of the optimizer; those with ``orthogonalize=False`` are AdamW's.
        state: The optimizer's state.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> None:
        self._state = state
        self._groups = [group for group in groups if not group["orthogonalize"] and group["params"]]
        self._present = [
            [(p, g.to(p.dtype)) for p in group["params"] if (g := local_gradient("an AdamW parameter", p)) is not None]
            for group in self._groups
        ]

    def not_finite_flags(self) -> list[Tensor]:
        """For each group a number, above zero if some local gradient is not finite."""
        flags = []
        for group, present in zip(self._groups, self._present, strict=True):
            flag = torch.zeros((), device=group["params"][0].device)
            by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
            for _, grad in present:
                if grad.numel():  # the norm of an empty shard is not defined
                    by_dtype[grad.dtype].append(grad)
            for grads in by_dtype.values():
                norms = torch.stack(torch._foreach_norm(grads, ord=float("inf")))
                flag = flag + (~norms.isfinite()).sum()
            flags.append(flag)
        return flags

    def run(self, not_finite: Sequence[Tensor]) -> None:
        """Update the groups.

        Args:
            not_finite: The flags, summed over the ranks; a group whose flag is not zero stays as it is.
        """
        for group, present, flag in zip(self._groups, self._present, not_finite, strict=True):
            for fused in (True, False):
                chosen = [(p, grad) for p, grad in present if _can_fuse(p) == fused]
                if not chosen:
                    continue
                states = [self._state[p] for p, _ in chosen]
                adamw(
                    [local_tensor(p) for p, _ in chosen],
                    [grad for _, grad in chosen],
                    [local_tensor(state["exp_avg"]) for state in states],
                    [local_tensor(state["exp_avg_sq"]) for state in states],
                    [],
                    [state["step"] for state in states],
                    fused=fused,
                    found_inf=(flag > 0).float() if fused else None,
                    has_complex=not fused,
                    amsgrad=False,
                    beta1=group["momentum"],
                    beta2=group["beta2"],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )


def _can_fuse(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in _get_fused_kernels_supported_devices()
