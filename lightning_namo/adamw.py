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

    A group with a gradient that is not finite, or has come on some ranks only, is left alone, weights and state, by the
    mechanism that torch's fused AdamW has for gradient scalers; parameters that it cannot fuse (complex ones) step
    unguarded.

    Args:
        groups: Parameter groups of the optimizer; those with ``orthogonalize=False`` are AdamW's.
        state: The optimizer's state.
        refused: Whether this rank cannot use its gradients, and takes part as if it had none.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]], refused: bool = False
    ) -> None:
        self._state = state
        self._largest: dict[Tensor, Tensor] = {}
        self._groups = [group for group in groups if not group["orthogonalize"] and group["params"]]
        self._present = [
            [
                (p, g.to(p.dtype))
                for p in group["params"]
                if not refused and (g := local_gradient("an AdamW parameter", p)) is not None
            ]
            for group in self._groups
        ]

    def not_finite_flags(self) -> list[Tensor]:
        """For each group a number, above zero if some local gradient is not finite."""
        flags = []
        for group, present in zip(self._groups, self._present, strict=True):
            flag = torch.zeros((), device=group["params"][0].device)
            by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter, grad in present:
                if grad.numel():  # the norm of an empty shard is not defined
                    by_dtype[grad.dtype].append((parameter, grad))
            for pairs in by_dtype.values():
                norms = torch._foreach_norm([grad for _, grad in pairs], ord=float("inf"))
                self._largest |= zip([parameter for parameter, _ in pairs], norms, strict=True)
                flag = flag + (~torch.stack(norms).isfinite()).sum()
            flags.append(flag)
        return flags

    def largest(self, parameter: Tensor) -> Tensor:
        """The largest element, in magnitude, of a local gradient, (); zero where there is none. After the flags."""
        return self._largest.get(parameter, torch.zeros((), device=parameter.device)).float()

    def presence(self) -> list[Tensor]:
        """For each group (2, parameters): ones where a gradient of what lies here has come, and where it has not."""
        found = []
        for group, present in zip(self._groups, self._present, strict=True):
            one = torch.ones((), device=group["params"][0].device)
            zero, have = torch.zeros_like(one), {p for p, _ in present}
            here = [local_tensor(p).numel() > 0 for p in group["params"]]
            came = [p in have for p in group["params"]]
            rows = [[held and has for held, has in zip(here, came, strict=True)]]
            rows += [[held and not has for held, has in zip(here, came, strict=True)]]
            # no list becomes a tensor: the device would wait for it
            found.append(torch.stack([torch.stack([one if flag else zero for flag in row]) for row in rows]))
        return found

    def run(self, left_alone: Sequence[Tensor]) -> None:
        """Update the groups.

        Args:
            left_alone: For each group a number, the same on all ranks; where it is not zero the group stays as it is.
        """
        for group, present, flag in zip(self._groups, self._present, left_alone, strict=True):
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


def on_some_ranks_only(presence: Tensor) -> Tensor:
    """How many parameters of a group have a gradient on some ranks and lack it on others.

    Args:
        presence: Of `AdamWStep.presence`, summed over the ranks.
    """
    return (presence > 0).all(dim=0).sum()


def _can_fuse(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in _get_fused_kernels_supported_devices()
