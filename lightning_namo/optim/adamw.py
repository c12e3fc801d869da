"""AdamW for the parameters that are not matrices: torch's own, on local shards, safe against gradients not finite.

torch's fused kernel reads and writes raw storage: it needs tensors that are dense, with equal strides, and real.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from lightning_namo.sharding.local import local_gradient, local_tensor


def adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state that torch's fused AdamW keeps of a parameter."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


class AdamWStep:
    """One step of all AdamW groups, in two halves: flags that are summed over the ranks, then the update.

    A group with a gradient that is not finite, or is present on some ranks only, is skipped, weights and state, by the
    mechanism that torch's fused AdamW has for gradient scalers. On a device without a fused AdamW, the values from
    before the step are put back.

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
                    real = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
                    by_dtype[real.dtype].append((parameter, real))
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
        """For each group (2, parameters): where this rank holds a part with a gradient, and one without."""
        found = []
        for group, present in zip(self._groups, self._present, strict=True):
            one = torch.ones((), device=group["params"][0].device)
            zero, have = torch.zeros_like(one), {p for p, _ in present}
            holds = [local_tensor(p).numel() > 0 for p in group["params"]]
            came = [p in have for p in group["params"]]
            rows = [[here and has for here, has in zip(holds, came, strict=True)]]
            rows += [[here and not has for here, has in zip(holds, came, strict=True)]]
            # no list becomes a tensor: the device would wait for it
            found.append(torch.stack([torch.stack([one if flag else zero for flag in row]) for row in rows]))
        return found

    def run(self, skipped: Sequence[Tensor]) -> None:
        """Update the groups.

        Args:
            skipped: For each group a number, the same on all ranks; where it is not zero the group is skipped.
        """
        for group, present, flag in zip(self._groups, self._present, skipped, strict=True):
            for fused in (True, False):
                chosen = [(p, grad) for p, grad in present if _can_fuse(p) == fused]
                if chosen:
                    self._run(group, chosen, flag, fused)

    def _run(self, group: dict[str, Any], present: Sequence[tuple[Tensor, Tensor]], flag: Tensor, fused: bool) -> None:
        states = [self._state[p] for p, _ in present]
        kept: list[list[Tensor]] = []  # parameter, gradient, exp_avg, exp_avg_sq of each parameter
        given: list[list[Tensor]] = []  # the same, as the kernel needs them
        for (p, grad), state in zip(present, states, strict=True):
            kept.append([local_tensor(p), grad, local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])])
            given.append(_dense_and_alike(kept[-1]))
        params, grads, exp_avgs, exp_avg_sqs = (
            [torch.view_as_real(t) if t.is_complex() else t for t in tensors] for tensors in zip(*given, strict=True)
        )
        changed = [*params, *exp_avgs, *exp_avg_sqs, *(state["step"] for state in states)]
        before = [] if fused else [t.clone() for t in changed]
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            [state["step"] for state in states],
            fused=fused,
            found_inf=(flag > 0).float() if fused else None,
            amsgrad=False,
            beta1=group["momentum"],
            beta2=group["beta2"],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if not fused:
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(torch.where(flag > 0, value, tensor))
        for originals, copies in zip(kept, given, strict=True):
            for index in (0, 2, 3):
                if copies[index] is not originals[index]:
                    originals[index].copy_(copies[index])


def on_some_ranks_only(presence: Tensor) -> Tensor:
    """How many parameters of a group have a gradient on some ranks and lack it on others.

    Args:
        presence: Of `AdamWStep.presence`, summed over the ranks.
    """
    return (presence > 0).all(dim=0).sum()


def check_memory(name: str, parameter: Tensor) -> None:
    """Raise a ValueError for a parameter that no optimizer can update: a sparse one, or one that overlaps itself."""
    if parameter.layout != torch.strided:
        raise ValueError(f"Expected {name} to be dense but its layout is {parameter.layout}. Pass {name}.to_dense().")
    local = local_tensor(parameter.detach())
    if _overlaps_itself(local.shape, local.stride()):
        raise ValueError(
            f"Expected every element of {name} to have its own place in memory, but elements of it share memory: its "
            f"shape is {tuple(local.shape)} and its strides are {local.stride()} (an expanded tensor, or windows that "
            "overlap). Make the parameter of a copy: nn.Parameter(tensor.clone())."
        )


def _overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    if 0 in shape:
        return False
    reach = 0  # offset of the last element of the dimensions so far
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride == 0:
            return True
        if stride <= reach:  # it may overlap: count
            extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            offsets = torch.arange(extent).as_strided(shape, strides)
            return len(set(offsets.flatten().tolist())) < math.prod(shape)
        reach += (size - 1) * stride
    return False


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a run of memory, in whatever order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _dense_and_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one shape, each itself if it is dense and has the strides of the first, else a copy that is and has.

    If the first is not dense the copies are contiguous.
    """
    first = tensors[0]
    like = first if is_dense(first) else torch.empty_like(first, memory_format=torch.contiguous_format)
    strides = like.stride()
    return [
        t if t.stride() == strides and not t.is_neg() and not t.is_conj() else torch.empty_like(like).copy_(t)
        for t in tensors
    ]


def _can_fuse(parameter: Tensor) -> bool:
    return parameter.is_meta or parameter.device.type in _get_fused_kernels_supported_devices()
