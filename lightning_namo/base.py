"""The only `step`: momentum, one sum of statistics over the ranks, orthogonalization shared out, scaled update.

Nothing here asks which parallel strategy runs: a parameter's `Layout` says how its local shard lies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lightning_namo import rules
from lightning_namo.adamw import AdamWStep, on_some_ranks_only
from lightning_namo.exchange import Exchange, Stacks
from lightning_namo.grouped import GroupedOptimizer, parameter_names, statistics_dtype
from lightning_namo.orthogonalize import iteration_dtype, newton_schulz_flops, orthogonalize
from lightning_namo.plan import Matrix
from lightning_namo.regions import Layout, local_gradient, local_tensor, stack, sum_of_squares, unstack
from lightning_namo.workspace import Workspace


@dataclass(eq=False)
class Entry:
    """One parameter of a matrix group, and how it lies."""

    name: str
    parameter: Tensor
    group: dict[str, Any]
    layout: Layout


@dataclass(eq=False)
class _Family:
    """Parameters of one group whose statistics have one shape: their step sizes are computed together.

    With several ranks all that can be, for there is one sum over the ranks; else the parcels one by one.
    """

    group: dict[str, Any]
    parcels: list[tuple[int, ...]]  # indices of entries that are stacked
    dtype: torch.dtype  # of the statistics
    factors: Tensor  # shape factors, broadcasting against (parameters, *statistic)
    holders: Tensor  # how many ranks hold a part of each, (parameters,)

    def only(self, chosen: Collection[int]) -> _Family:
        """The family without the parameters that are not chosen."""
        kept = [k for k, i in enumerate(i for parcel in self.parcels for i in parcel) if i in chosen]
        if len(kept) == len(self.holders):
            return self
        parcels = [members for parcel in self.parcels if (members := tuple(i for i in parcel if i in chosen))]
        factors, holders = (
            torch.stack([whole[k] for k in kept]) if kept else whole[:0] for whole in (self.factors, self.holders)
        )
        return _Family(self.group, parcels, self.dtype, factors, holders)


@dataclass(eq=False)
class Update:
    """What K weights are multiplied by (factor), and their directions (size); ok (K,): which are not left alone."""

    ok: Tensor
    size: Tensor
    factor: Tensor


class OrthogonalizedOptimizer(GroupedOptimizer):
    """Base of the optimizers that orthogonalize momentum; holds the only `step`.

    A subclass is a signature, a docstring with its formula, its extra state and its step size.

    Attributes:
        bucket_bytes: Bound on the bytes of the matrices that a rank assembles at a time; a larger matrix goes alone.
            None: 8 MiB on CPUs, 32 MiB elsewhere. Set it before the first step. Above parameters, gradients and state
            a step on shards needs about 11 times that, and about 17 times where the iteration runs in float32
            (`iteration_dtype`), with three buckets in flight. Measured on square matrices, which need most, in
            bfloat16: 7.4 on one rank, 10.9 on two, 12 on two replicas, which receive what all owners computed; in
            float32: 13.0, 16.5 and 17.0.
    """

    bucket_bytes: int | None = None
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
        chosen = {i for i, grad in enumerate(grads) if grad is not None or exchange.shared}
        adamw = AdamWStep(self.param_groups, self.state)

        families = [family for family in (family.only(chosen) for family in families) if family.parcels]
        updates: dict[tuple[int, ...], Update] = {}
        left_alone = adamw.not_finite_flags()
        with exchange.workspace.frame():
            if exchange.shared:
                flags = left_alone + adamw.presence()
                updates, flags = self._updates(entries, families, exchange, grads, flags)
                not_finite, presence = flags[: len(left_alone)], flags[len(left_alone) :]
                left_alone = [a + on_some_ranks_only(b) for a, b in zip(not_finite, presence, strict=True)]
            alone = {family.parcels[0]: family for family in families}

            def directions(parcel: tuple[int, ...]) -> Tensor:
                if not exchange.shared:  # nothing to sum: each parcel when its turn comes, while it is in the cache
                    updates.update(self._updates(entries, [alone[parcel]], exchange, grads, [])[0])
                return self._directions(entries, exchange, grads, parcel, updates[parcel].ok)

            for bucket in exchange.map(chosen, directions, self._work(entries, exchange.workspace)):
                with exchange.workspace.frame():
                    self._finish(entries, exchange, bucket, updates)
                del bucket
        adamw.run(left_alone)
        self._count_adamw(left_alone)
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
            for parameter, state in self.state.items():  # they may have been moved, or cast, since
                for key, value in state.items():
                    dtype = parameter.dtype if key in ("exp_avg", "exp_avg_sq") else value.dtype
                    state[key] = value.to(parameter.device, dtype)
            device = entries[0].parameter.device
            iteration_dtype(device.type)  # a wrong environment variable is refused before ranks wait for one another
            numbers = {id(group): number for number, group in enumerate(self.param_groups)}
            matrices = [
                Matrix(
                    e.name,
                    e.layout.stored,
                    str(wire_dtype(e)),
                    _cost(e),
                    e.layout.region,
                    (numbers[id(e.group)], str(e.parameter.dtype), *e.layout.shape),
                )
                for e in entries
            ]
            others = [
                (name, self._regions[p][0] if p in self._regions else tuple(p.shape), str(p.dtype))
                for group in self.param_groups
                if not group["orthogonalize"]
                for name, p in zip(parameter_names(group), group["params"], strict=True)
            ]
            exchange = Exchange(matrices, device, self.bucket_bytes, others, lambda: _checksums(entries), Workspace())
            self._planned = entries, self._families(entries, exchange), exchange
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

    def _families(self, entries: list[Entry], exchange: Exchange) -> list[_Family]:
        members: dict[Any, list[tuple[int, ...]]] = defaultdict(list)
        for parcel in (parcel.indices for bucket in exchange.buckets for parcel in bucket):
            entry = entries[parcel[0]]
            shape = entry.layout.statistic_shape(self.per_column)
            of_its_own = None if exchange.shared else parcel
            members[id(entry.group), shape, statistics_dtype(entry.parameter), of_its_own].append(parcel)
        families = []
        for (_, _, dtype, _), parcels in members.items():
            indices = [i for parcel in parcels for i in parcel]
            first = entries[indices[0]]
            per_block = [
                [self._shape_factor(matrix, first.group["shape_scale"]) for matrix in entries[i].layout.matrix_shapes]
                for i in indices
            ]
            factors = torch.tensor(per_block, dtype=dtype, device=exchange.device)
            leading = (len(first.layout.blocks),) if len(first.layout.blocks) > 1 else ()
            columns = (1,) if self.per_column else ()
            counts = [exchange.holder_counts[i] for i in indices]
            holders = torch.tensor(counts, dtype=dtype, device=exchange.device)
            families.append(_Family(first.group, parcels, dtype, factors.view(-1, *leading, *columns), holders))
        return families

    def _updates(
        self,
        entries: list[Entry],
        families: Sequence[_Family],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        flags: list[Tensor],
    ) -> tuple[dict[tuple[int, ...], Update], list[Tensor]]:
        """Sum the statistics, and flags, over the ranks; from them decide which matrices move, and by how much."""
        partials = [self._family_partials(entries, exchange, grads, family) for family in families]
        flat = [part for parts in partials for part in parts] + flags
        if not flat:
            return {}, []
        dtype = max((part.dtype for part in flat), key=lambda d: d.itemsize)
        sizes = [part.numel() for part in flat]
        summed = exchange.sum(torch.cat([part.flatten().to(dtype) for part in flat]))
        totals = [
            total.view_as(part).to(part.dtype) for total, part in zip(torch.split(summed, sizes), flat, strict=True)
        ]
        updates: dict[tuple[int, ...], Update] = {}
        for family, parts in zip(families, partials, strict=True):
            own, totals = totals[: len(parts)], totals[len(parts) :]
            updates |= self._family_updates(entries, family, *own)
        return updates, totals

    def _family_partials(
        self, entries: list[Entry], exchange: Exchange, grads: Sequence[Tensor | None], family: _Family
    ) -> list[Tensor]:
        of_parcels = []
        for parcel in family.parcels:
            with exchange.workspace.frame():
                of_parcels.append(self._partials(entries, exchange, grads, parcel))
        return [torch.cat(parts) for parts in zip(*of_parcels, strict=True)]

    def _partials(
        self, entries: list[Entry], exchange: Exchange, grads: Sequence[Tensor | None], parcel: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's part of ``||G||^2`` and ``||N||^2`` (K, *statistic) and of the count of gradients (K,)."""
        entry, device = entries[parcel[0]], exchange.device
        layout, dtype, counts = entry.layout, statistics_dtype(entry.parameter), exchange.contributes(parcel[0])
        zeros = torch.zeros(len(parcel), *layout.statistic_shape(self.per_column), dtype=dtype, device=device)
        found = [grads[i] is not None for i in parcel]
        if not layout.region.numel or not any(found):
            return zeros, zeros, torch.zeros(len(parcel), dtype=dtype, device=device)
        _, buffer, grad = self._momenta(entries, exchange.workspace, grads, parcel)
        present = torch.ones(len(parcel), dtype=dtype, device=device)
        if not all(found):  # no list becomes a tensor: the device would wait for it
            present = torch.stack(
                [one if has else torch.zeros_like(one) for one, has in zip(present, found, strict=True)]
            )
        if not counts:  # a replica's gradient enters no sum, but its own momentum
            return zeros, zeros, present * sum_of_squares(grad, dtype).isfinite()
        grad_sq = layout.sums_of_squares(grad, self.per_column, dtype, exchange.workspace)
        if not self.adaptive:
            return grad_sq, zeros, present
        keys = {key: entry.group[key] for key in ("momentum", "nesterov")}
        direction = rules.direction(grad, buffer, **keys, out=exchange.workspace.like(grad))
        return grad_sq, layout.sums_of_squares(direction, self.per_column, dtype, exchange.workspace), present

    def _momenta(
        self, entries: list[Entry], workspace: Workspace, grads: Sequence[Tensor | None], parcel: tuple[int, ...]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The local momenta of a parcel; and stacked (K, ...), in one dtype, they and the gradients.

        Where there is no gradient the momentum stands in for it: the average of M with M is M.
        """
        parameters = [entries[i].parameter for i in parcel]
        momenta = [local_tensor(self.state[p]["momentum_buffer"]) for p in parameters]
        dtype = torch.promote_types(parameters[0].dtype, momenta[0].dtype)
        found = [m if (g := grads[i]) is None else g for i, m in zip(parcel, momenta, strict=True)]
        gradients = stack([tensor.to(dtype) for tensor in found], workspace)
        return momenta, stack(momenta, workspace).to(dtype), gradients

    def _family_updates(
        self, entries: list[Entry], family: _Family, grad_sq: Tensor, direction_sq: Tensor, present: Tensor
    ) -> dict[tuple[int, ...], Update]:
        """Advance step, skipped and v where gradients are whole and finite; give each parcel its update."""
        states = [self.state[entries[i].parameter] for parcel in family.parcels for i in parcel]
        finite = (grad_sq.isfinite() & direction_sq.isfinite()).view(len(states), -1).all(dim=1)
        ok = (present == family.holders) & finite
        per_member = (-1,) + (1,) * (grad_sq.dim() - 1)

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
        size = rules.update_size(sizes, family.factors, max_step=group.get("max_step"))
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
        counts = [len(parcel) for parcel in family.parcels]
        parts = zip(*(torch.split(whole, counts) for whole in (ok, size, decay)), strict=True)
        return {parcel: Update(*part) for parcel, part in zip(family.parcels, parts, strict=True)}

    def _step_size(
        self, group: dict[str, Any], grad_sq: Tensor, direction_sq: Tensor, v: Tensor | None, step: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Step sizes and new v, both (K, *statistic), from the statistics of K parameters; step is (K, 1...)."""
        return torch.zeros_like(grad_sq) + group["lr"], None

    def _shape_factor(self, shape: tuple[int, int], shape_scale: float | None) -> float:
        """What the step size of a matrix (m, n) is multiplied by, from its shape alone."""
        return rules.shape_factor(shape, shape_scale)

    def _directions(
        self,
        entries: list[Entry],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        parcel: tuple[int, ...],
        ok: Tensor,
    ) -> Tensor:
        """Update the momenta where ok, and give the directions N (K, ...) to orthogonalize, in their wire dtype."""
        entry, workspace = entries[parcel[0]], exchange.workspace
        shape = local_tensor(entry.parameter).shape
        sent = workspace.take((len(parcel), *shape), wire_dtype(entry), exchange.device)
        with workspace.frame():
            momenta, buffer, grad = self._momenta(entries, workspace, grads, parcel)
            # Where not ok M stands in for G: nothing moves, and the direction stays finite.
            grad = torch.where(ok.view(-1, *(1 for _ in shape)), grad, buffer, out=workspace.like(grad))
            rules.update_momentum(grad, buffer, momentum=entry.group["momentum"])
            if entry.group["nesterov"]:
                direction = rules.look_ahead(grad, buffer, momentum=entry.group["momentum"], out=grad)
            else:
                direction = grad.copy_(buffer)
            sent.copy_(self._input(direction))
            unstack(buffer, momenta)
        return sent

    def _input(self, direction: Tensor) -> Tensor:
        """What is orthogonalized, from N, which may be overwritten."""
        return direction

    def _work(self, entries: list[Entry], workspace: Workspace) -> Callable[[Stacks], list[Tensor]]:
        """What the exchange does with whole stored matrices: the polar factors of the true ones, stored alike."""

        def polar(stacks: Stacks) -> list[Tensor]:
            results: dict[int, Tensor] = {}
            by_group: dict[int, list[int]] = defaultdict(list)
            for position, (indices, _) in enumerate(stacks):
                by_group[id(entries[indices[0]].group)].append(position)
            for positions in by_group.values():
                group = entries[stacks[positions[0]][0][0]].group
                layouts = [entries[stacks[position][0][0]].layout for position in positions]
                factors = iter(
                    orthogonalize(
                        [
                            m
                            for p, layout in zip(positions, layouts, strict=True)
                            for m in layout.matrices(stacks[p][1])
                        ],
                        method=group["orthogonalizer"],
                        ns_steps=group["ns_steps"],
                        ns_coefficients=group["ns_coefficients"],
                        workspace=workspace,
                    )
                )
                for position, layout in zip(positions, layouts, strict=True):
                    results[position] = layout.store([next(factors) for _ in layout.blocks])
            return [results[position] for position in range(len(stacks))]

        return polar

    def _finish(
        self,
        entries: list[Entry],
        exchange: Exchange,
        bucket: Stacks,
        updates: dict[tuple[int, ...], Update],
    ) -> None:
        """Apply a bucket's polar factors (flat local shards) to the weights."""
        for parcel, ortho in bucket:
            layout, update = entries[parcel[0]].layout, updates[parcel]
            weights = [local_tensor(entries[i].parameter) for i in parcel]
            shape, weight = weights[0].shape, stack(weights, exchange.workspace)
            rules.apply_update(
                weight,
                exchange.workspace.like(weight, update.size.dtype).copy_(ortho.view(weight.shape)),
                layout.spread(update.size, self.per_column, shape),
                layout.spread(update.factor, self.per_column, shape),
            )
            unstack(weight, weights)


def _checksums(entries: list[Entry]) -> list[float]:
    """Sum of the local weights of each matrix."""
    return cast("list[float]", torch.stack([local_tensor(e.parameter).double().sum() for e in entries]).tolist())


def wire_dtype(entry: Entry) -> torch.dtype:
    """In which matrices are communicated: bfloat16 for Newton-Schulz, whatever it iterates in; else the parameter's."""
    return torch.bfloat16 if entry.group["orthogonalizer"] == "newton_schulz" else entry.parameter.dtype


def _cost(entry: Entry) -> int:
    keys = {key: entry.group[key] for key in ("ns_steps", "ns_coefficients")}
    return sum(newton_schulz_flops(shape, **keys) for shape in entry.layout.matrix_shapes)
