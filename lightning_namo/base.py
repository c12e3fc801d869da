"""The only `step`: momentum, one sum of statistics over the ranks, orthogonalization shared out, scaled update.

Nothing here asks which parallel strategy runs: a parameter's `Layout` says how its local shard lies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lightning_namo import rules
from lightning_namo.adamw import AdamWStep
from lightning_namo.exchange import DEFAULT_BUCKET_BYTES, Exchange
from lightning_namo.grouped import GroupedOptimizer, parameter_names, statistics_dtype
from lightning_namo.orthogonalize import newton_schulz_flops, orthogonalize
from lightning_namo.plan import Matrix
from lightning_namo.regions import Layout, local_gradient, local_tensor, sum_of_squares


@dataclass(eq=False)
class Entry:
    """One parameter of a matrix group, and how it lies."""

    name: str
    parameter: Tensor
    group: dict[str, Any]
    layout: Layout


@dataclass(eq=False)
class _Family:
    """Parameters of one group whose statistics have one shape: their step sizes are computed together."""

    group: dict[str, Any]
    indices: list[int]  # of entries
    shape: tuple[int, ...]  # of one parameter's statistic
    factors: Tensor  # shape factors, broadcasting against (len(indices), *shape)
    holders: Tensor  # how many ranks hold a part of each, (len(indices),)


@dataclass(eq=False)
class Update:
    """What the weight of one parameter is multiplied by (factor), and its direction (size); ok: neither is idle."""

    ok: Tensor
    size: Tensor
    factor: Tensor


class OrthogonalizedOptimizer(GroupedOptimizer):
    """Base of the optimizers that orthogonalize momentum; holds the only `step`.

    A subclass is a signature, a docstring with its formula, its extra state and its step size.

    Attributes:
        bucket_bytes: Bound on the bytes of the matrices that a rank assembles at a time; a larger matrix goes alone.
            With three buckets in flight and the iteration's workspace a step needs up to 16 times that above
            parameters, gradients and state (measured: 10 on one rank, 15 on two). Set it before the first step.
    """

    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    _planned: tuple[list[Entry], list[_Family], Exchange] | None = None
    _planned_for: Sequence[tuple[Any, ...]] = ()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, without reading the device.

        Args:
            closure: Re-evaluates the model and returns the loss; run with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: If a gradient is sparse, or the ranks hold different parameters.
            RuntimeError: If the parameters are no longer the module's (an optimizer built before FSDP2 sharding).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries, families, exchange = self._plan()
        grads = [local_gradient(entry.name, entry.parameter) for entry in entries]
        present = [i for i, grad in enumerate(grads) if grad is not None]
        indices = list(range(len(entries))) if exchange.shared else present
        adamw = AdamWStep(self.param_groups, self.state)

        updates, not_finite = self._updates(entries, families, exchange, grads, indices, adamw)
        for bucket in exchange.map(
            indices, lambda i: self._direction(entries[i], grads[i], updates[i].ok), self._work(entries)
        ):
            self._finish(entries, exchange, bucket, updates)
        adamw.run(not_finite)
        self._count_adamw(not_finite)
        self._warn_of_strays()
        return loss

    def sharing(self) -> str:
        """Which rank orthogonalizes how much, a line each. Before the first step this is collective."""
        entries, _, exchange = self._plan()
        costs = [_cost(entry) for entry in entries]
        owned = [[i for i, owner in enumerate(exchange.plan.owners) if owner == r] for r in range(exchange.world_size)]
        loads = [sum(costs[i] for i in matrices) for matrices in owned]
        mean = sum(loads) / len(loads)
        lines = [
            f"rank {rank}: {len(matrices)} matrices, {load / 1e9:.3g} GFLOP, {load / mean:.3f} of the mean"
            for rank, (matrices, load) in enumerate(zip(owned, loads, strict=True))
        ]
        return "\n".join([*lines, f"rank {exchange.rank} sends {exchange.bytes_sent:,} bytes of matrices a step"])

    def _plan(self) -> tuple[list[Entry], list[_Family], Exchange]:
        """Layouts, families and exchange: built at the first step, and again when the groups have changed."""
        planned_for = [
            (id(g), len(g["params"]), g.get("orthogonalizer"), g.get("shape_scale")) for g in self.param_groups
        ]
        if self._planned is None or planned_for != self._planned_for:
            self._check_module()
            entries = [
                Entry(name, parameter, group, self._layout(name, parameter, group))
                for group in self.param_groups
                if group["orthogonalize"]
                for name, parameter in zip(parameter_names(group), group["params"], strict=True)
            ]
            for parameter, state in self.state.items():
                for key, value in state.items():
                    state[key] = value.to(parameter.device)
            device = entries[0].parameter.device
            matrices = [
                Matrix(e.name, e.layout.stored, str(_wire_dtype(e)), _cost(e), e.layout.region) for e in entries
            ]
            others = [
                (name, self._regions[p][0] if p in self._regions else tuple(p.shape), str(p.dtype))
                for group in self.param_groups
                if not group["orthogonalize"]
                for name, p in zip(parameter_names(group), group["params"], strict=True)
            ]
            exchange = Exchange(matrices, device, self.bucket_bytes, others, lambda: _checksums(entries))
            self._planned = entries, self._families(entries, exchange.holder_counts), exchange
            self._planned_for = planned_for
        return self._planned

    def _check_module(self) -> None:
        module = self._module()
        theirs = None if module is None else {id(p) for p in module.parameters()}
        for group in self.param_groups:
            for name, parameter in zip(parameter_names(group), group["params"], strict=True):
                if theirs is not None and id(parameter) not in theirs:
                    raise RuntimeError(
                        f"Expected the optimizer's parameters to be the module's, but {name} no longer is: the module "
                        "was sharded or replaced after the optimizer was built, and training would change nothing. "
                        "Shard first (Fabric: setup_module), then build the optimizer (build_optimizer), then "
                        "setup_optimizers."
                    )

    def _families(self, entries: list[Entry], holder_counts: list[int]) -> list[_Family]:
        members: dict[Any, list[int]] = defaultdict(list)
        for index, entry in enumerate(entries):
            shape = entry.layout.statistic_shape(self.per_column)
            members[id(entry.group), shape, statistics_dtype(entry.parameter)].append(index)
        families = []
        for (_, shape, dtype), indices in members.items():
            group = entries[indices[0]].group
            per_block = [
                [self._shape_factor(matrix, group["shape_scale"]) for matrix in entries[i].layout.matrix_shapes]
                for i in indices
            ]
            factors = torch.tensor(per_block, dtype=dtype, device=entries[indices[0]].parameter.device)
            blocks = len(entries[indices[0]].layout.blocks)
            leading = (blocks,) if blocks > 1 else ()
            columns = (1,) if self.per_column else ()
            holders = torch.tensor([holder_counts[i] for i in indices], dtype=dtype, device=factors.device)
            factors = factors.view(len(indices), *leading, *columns)
            families.append(_Family(group, indices, shape, factors, holders))
        return families

    def _updates(
        self,
        entries: list[Entry],
        families: list[_Family],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        indices: list[int],
        adamw: AdamWStep,
    ) -> tuple[dict[int, Update], list[Tensor]]:
        """Sum the statistics over the ranks; from them decide which matrices move, and by how much."""
        taking = set(indices)
        chosen = [(family, [i for i in family.indices if i in taking]) for family in families]
        chosen = [(family, members) for family, members in chosen if members]
        partials = [self._partials(entries, exchange, grads, members) for _, members in chosen]
        flat = [part for parts in partials for part in parts] + adamw.not_finite_flags()
        if not flat:
            return {}, []
        dtype = max((part.dtype for part in flat), key=lambda d: d.itemsize)
        sizes = [part.numel() for part in flat]
        summed = exchange.sum(torch.cat([part.flatten().to(dtype) for part in flat]))
        totals = [
            total.view_as(part).to(part.dtype) for total, part in zip(torch.split(summed, sizes), flat, strict=True)
        ]
        updates: dict[int, Update] = {}
        for (family, members), parts in zip(chosen, partials, strict=True):
            own, totals = totals[: len(parts)], totals[len(parts) :]
            updates |= self._family_updates(entries, family, members, *own)
        return updates, totals

    def _partials(
        self, entries: list[Entry], exchange: Exchange, grads: Sequence[Tensor | None], members: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's part of ``||G||^2`` and ``||N||^2`` (K, *statistic) and of the count of gradients (K,)."""
        grad_sq, direction_sq, present = [], [], []
        one = torch.ones((), dtype=statistics_dtype(entries[members[0]].parameter), device=exchange.device)
        for i in members:
            entry, grad = entries[i], grads[i]
            layout, dtype = entry.layout, statistics_dtype(entry.parameter)
            zeros = torch.zeros(layout.statistic_shape(self.per_column), dtype=dtype, device=exchange.device)
            counts = grad is not None and exchange.contributes(i)
            if grad is None or not layout.region.numel:
                present.append(torch.zeros_like(one))
            else:  # a replica's gradient enters no sum, but its own momentum
                present.append(one if counts else one * sum_of_squares(grad, dtype).isfinite())
            grad_sq.append(
                layout.sums_of_squares(grad, self.per_column, dtype) if counts and grad is not None else zeros
            )
            if not (self.adaptive and counts and grad is not None):
                direction_sq.append(zeros)
                continue
            momentum = local_tensor(self.state[entry.parameter]["momentum_buffer"])
            _, direction = rules.nesterov_momentum(
                grad.to(momentum.dtype),
                momentum,
                momentum=entry.group["momentum"],
                nesterov=entry.group["nesterov"],
            )
            direction_sq.append(layout.sums_of_squares(direction, self.per_column, dtype))
        return torch.stack(grad_sq), torch.stack(direction_sq), torch.stack(present)

    def _family_updates(
        self,
        entries: list[Entry],
        family: _Family,
        members: list[int],
        grad_sq: Tensor,
        direction_sq: Tensor,
        present: Tensor,
    ) -> dict[int, Update]:
        """Advance step, skipped and v where gradients are whole and finite; give each parameter its update."""
        states = [self.state[entries[i].parameter] for i in members]
        factors, holders = family.factors, family.holders
        if members != family.indices:  # one process, and some parameters had no gradient
            chosen = [family.indices.index(i) for i in members]
            factors, holders = (torch.stack([values[k] for k in chosen]) for values in (factors, holders))
        finite = (grad_sq.isfinite() & direction_sq.isfinite()).reshape(len(members), -1).all(dim=1)
        ok = (present == holders) & finite
        per_member = (-1,) + (1,) * len(family.shape)

        step = torch.stack([state["step"] for state in states])
        v = torch.stack([state["v"] for state in states]) if self.adaptive else None
        sizes, new_v = self._step_size(family.group, grad_sq, direction_sq, v, (step + 1).view(per_member))
        if v is not None and new_v is not None:
            torch._foreach_copy_(
                [state["v"] for state in states], list(torch.where(ok.view(per_member), new_v, v).unbind())
            )
        torch._foreach_add_([state["step"] for state in states], list(ok.to(step.dtype).unbind()))
        skipped = ((present > 0) & ~ok).to(step.dtype)
        torch._foreach_add_([state["skipped"] for state in states], list(skipped.unbind()))

        group = family.group
        size = rules.update_size(sizes, factors, max_step=group.get("max_step"))
        decay = rules.decay_factor(
            sizes,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            max_step=group.get("max_step"),
            decay=group.get("decay", "lr"),
            floor=self.per_column,
        )
        size = torch.where(ok.view(per_member), size, 0)
        decay = torch.where(ok.view(per_member), decay, 1)
        return {
            i: Update(*parts) for i, *parts in zip(members, ok.unbind(), size.unbind(), decay.unbind(), strict=True)
        }

    def _step_size(
        self, group: dict[str, Any], grad_sq: Tensor, direction_sq: Tensor, v: Tensor | None, step: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Step sizes and new v, both (K, *statistic), from the statistics of K parameters; step is (K, 1...)."""
        return torch.zeros_like(grad_sq) + group["lr"], None

    def _shape_factor(self, shape: tuple[int, int], shape_scale: float | None) -> float:
        """What the step size of a matrix (m, n) is multiplied by, from its shape alone."""
        return rules.shape_factor(shape, shape_scale)

    def _direction(self, entry: Entry, grad: Tensor | None, ok: Tensor) -> Tensor:
        """Update the momentum where ok, and give the direction N to orthogonalize, in its wire dtype."""
        momentum = local_tensor(self.state[entry.parameter]["momentum_buffer"])
        # The average of M with M is M: where not ok nothing moves, and the direction stays finite.
        grad = momentum if grad is None else torch.where(ok, grad.to(momentum.dtype), momentum)
        _, direction = rules.nesterov_momentum(
            grad, momentum, momentum=entry.group["momentum"], nesterov=entry.group["nesterov"], out=momentum
        )
        return self._input(direction).to(_wire_dtype(entry))

    def _input(self, direction: Tensor) -> Tensor:
        """What is orthogonalized, from N."""
        return direction

    def _work(self, entries: list[Entry]) -> Callable[[list[int], list[Tensor]], list[Tensor]]:
        """What the exchange does with whole stored matrices: the polar factors of the true ones, stored alike."""

        def polar(indices: list[int], stored: list[Tensor]) -> list[Tensor]:
            results: dict[int, Tensor] = {}
            by_group: dict[int, list[int]] = defaultdict(list)
            for position, index in enumerate(indices):
                by_group[id(entries[index].group)].append(position)
            for positions in by_group.values():
                group = entries[indices[positions[0]]].group
                layouts = [entries[indices[position]].layout for position in positions]
                factors = iter(
                    orthogonalize(
                        [m for p, layout in zip(positions, layouts, strict=True) for m in layout.matrices(stored[p])],
                        method=group["orthogonalizer"],
                        ns_steps=group["ns_steps"],
                        ns_coefficients=group["ns_coefficients"],
                    )
                )
                for position, layout in zip(positions, layouts, strict=True):
                    results[position] = layout.store([next(factors) for _ in layout.blocks])
            return [results[position] for position in range(len(indices))]

        return polar

    def _finish(
        self,
        entries: list[Entry],
        exchange: Exchange,
        bucket: list[tuple[int, Tensor]],
        updates: dict[int, Update],
    ) -> None:
        """Apply a bucket's polar factors (flat local shards) to the weights."""
        for i, ortho in bucket:
            weight, layout, update = local_tensor(entries[i].parameter), entries[i].layout, updates[i]
            rules.apply_update(
                weight,
                ortho.view(weight.shape),
                layout.spread(update.size, update.size.dim() > 0 and self.per_column, weight.shape),
                layout.spread(update.factor, update.factor.dim() > 0 and self.per_column, weight.shape),
            )


def _checksums(entries: list[Entry]) -> list[float]:
    """Sum of the local weights of each matrix."""
    return cast("list[float]", torch.stack([local_tensor(e.parameter).double().sum() for e in entries]).tolist())


def _wire_dtype(entry: Entry) -> torch.dtype:
    """The iteration's dtype where it iterates, else the parameter's."""
    return torch.bfloat16 if entry.group["orthogonalizer"] == "newton_schulz" else entry.parameter.dtype


def _cost(entry: Entry) -> int:
    return sum(newton_schulz_flops(shape, entry.group["ns_steps"]) for shape in entry.layout.matrix_shapes)
