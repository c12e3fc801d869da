"""The only `step`: momentum, one sum of statistics over the ranks, orthogonalization shared out, scaled update.

Nothing here asks which parallel strategy runs: a parameter's `Layout` says how its local shard lies.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_namo.checkpoint.reading import some
from lightning_namo.optim import formulas
from lightning_namo.optim.adamw import AdamWStep, on_some_ranks_only
from lightning_namo.optim.groups import GroupedOptimizer, parameter_names, statistics_dtype
from lightning_namo.optim.trained_module import TrainedModule
from lightning_namo.polar.cost import newton_schulz_flops
from lightning_namo.polar.iteration_dtype import iteration_dtype
from lightning_namo.polar.orthogonalize import orthogonalize
from lightning_namo.routing.names import parameter_label
from lightning_namo.sharding.agreement import (
    CLOSE,
    Alarm,
    Holding,
    Hyper,
    check_hyper,
    check_order,
    checksums,
    fingerprint,
    plain,
    tolerance,
)
from lightning_namo.sharding.assignment import Matrix
from lightning_namo.sharding.discovery import part_of
from lightning_namo.sharding.exchange import Exchange, Published, Stacks
from lightning_namo.sharding.layout import Layout, Region
from lightning_namo.sharding.local import local_gradient, local_tensor, refuse_sparse, stack, sum_of_squares, unstack
from lightning_namo.sharding.process_group import current_group
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
    tolerance: Tensor  # relative, of the difference of replicas' squared norms, (parameters,)

    def only(self, chosen: Collection[int]) -> _Family:
        """The family without the parameters that are not chosen."""
        kept = [k for k, i in enumerate(i for parcel in self.parcels for i in parcel) if i in chosen]
        if len(kept) == len(self.holders):
            return self
        parcels = [members for parcel in self.parcels if (members := tuple(i for i in parcel if i in chosen))]
        numbers = (
            torch.stack([whole[k] for k in kept]) if kept else whole[:0]
            for whole in (self.factors, self.holders, self.tolerance)
        )
        return _Family(self.group, parcels, self.dtype, *numbers)


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
    _trained: TrainedModule | None = None
    _alarm: Alarm | None = None
    _compared_in: Callable[[], Any] = staticmethod(lambda: None)  # the process group in which weights were compared
    _hyper: Hyper  # of the step that the alarm is of
    _watched_names: list[str]

    @torch.compiler.disable(reason="lightning_namo's step runs eagerly")  # type: ignore[untyped-decorator, no-untyped-call]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, without reading the device.

        It runs eagerly, closure included, where torch.compile meets it; what the closure calls may be compiled itself.

        Args:
            closure: Re-evaluates the model and returns the loss; run with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: If a gradient is sparse, or the ranks have different parameters, weights of replicas or
                hyper-parameters.
            RuntimeError: If the parameters are no longer the module's (an optimizer built before FSDP2 sharding, a
                parameter replaced since), if the replicas' gradients differ, or if not all ranks take the step. On
                accelerators what a step finds to differ is raised in the next, so that the host does not wait.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._planned is not None and self._planned[2].is_current:
            self._raise_what_parted(self._planned[2], None)
        entries, families, exchange = self._plan()
        refusal = self._refusal(exchange)
        grads = [None if refusal else local_gradient(entry.name, entry.parameter) for entry in entries]
        chosen = {i for i, grad in enumerate(grads) if grad is not None or exchange.shared}
        adamw = AdamWStep(self.param_groups, self.state, refused=refusal is not None)

        families = [family for family in (family.only(chosen) for family in families) if family.parcels]
        updates: dict[tuple[int, ...], Update] = {}
        left_alone = adamw.not_finite_flags()
        with exchange.workspace.frame():
            if exchange.shared:
                watched = self._watched(exchange, adamw, refusal)
                flags = left_alone + adamw.presence() + watched
                judge = functools.partial(self._judge, families, exchange, refusal, len(left_alone))
                updates, flags = self._updates(entries, families, exchange, grads, flags, judge)
                not_finite, presence = flags[: len(left_alone)], flags[len(left_alone) : 2 * len(left_alone)]
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
        if refusal is not None:
            raise refusal  # the others read of it in their next step
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
        """Layouts, families and exchange: built at the first step, and again when groups or dtypes have changed."""
        self._fill_state()
        planned_for = [
            (id(g), [(id(p), p.dtype) for p in g["params"]], g.get("orthogonalizer"), g.get("shape_scale"))
            for g in self.param_groups
        ]
        if self._planned is None or planned_for != self._planned_for or not self._planned[2].is_current:
            self._planned = None
            named = {p: name for group in self.param_groups for p, name in _named(group)}
            module = self._module()
            self._trained = None if module is None else TrainedModule(module, named)
            entries = [
                Entry(name, parameter, group, self._layout(name, parameter, group))
                for group in self.param_groups
                if group["orthogonalize"]
                for parameter, name in _named(group)
            ]
            self._follow_parameters()
            device = entries[0].parameter.device
            iteration_dtype(device.type)  # a wrong environment variable is refused before ranks wait for one another
            numbers = {id(group): number for number, group in enumerate(self.param_groups)}
            matrices = [
                Matrix(
                    e.name,
                    e.layout.stored,
                    wire_dtype(e),
                    _cost(e),
                    e.layout.region,
                    (numbers[id(e.group)], e.parameter.dtype, *e.layout.shape),
                )
                for e in entries
            ]
            exchange = Exchange(matrices, device, self.bucket_bytes, lambda: self._published(entries), Workspace())
            self._alarm, self._compared_in = Alarm(device), exchange.group
            families = self._families(entries, exchange)
            watched = [entries[i].name for family in families for parcel in family.parcels for i in parcel]
            self._watched_names = watched + [name for _, name in self._adamw_parameters()]
            self._planned = entries, families, exchange
            self._planned_for = planned_for
        return self._planned

    def _published(self, entries: Sequence[Entry]) -> Published:
        """What the other ranks must have alike."""
        others = [pair for group in self.param_groups if not group["orthogonalize"] for pair in _named(group)]
        described: list[tuple[Tensor, str, tuple[int, ...], Region | None]]
        described = [(e.parameter, e.name, e.layout.shape, e.layout.region) for e in entries]
        for parameter, name in others:
            shape, region = self._regions.get(parameter, (tuple(parameter.shape), None))
            described.append((parameter, name, shape, region))
        sums = checksums([local_tensor(parameter) for parameter, *_ in described])
        holdings = [
            Holding(self._label(name), shape, parameter.dtype, part_of(parameter, region), checksum)
            for (parameter, name, shape, region), checksum in zip(described, sums, strict=True)
        ]
        # Only once: AdamW's replicas may part by what a reduction rounds, which a step takes for no difference.
        compare, hyper = self._compared_in() is not current_group(), plain(self._hyper_now())
        return Published(holdings[: len(entries)], holdings[len(entries) :], hyper, self._number, compare)

    def _label(self, name: str) -> str:
        return parameter_label(name, self._module())

    def _hyper_now(self) -> Hyper:
        keys = {True: sorted(self._matrix_defaults), False: sorted(self._adamw_defaults)}
        return [(g["name"], {key: g[key] for key in keys[g["orthogonalize"]] if key in g}) for g in self.param_groups]

    # ------------------------------------------------------------------ what the ranks must agree on in a step

    def _refusal(self, exchange: Exchange) -> Exception | None:
        """Why this rank cannot use its gradients; alone it raises, else it takes part without them and raises then."""
        if self._trained is not None:
            self._trained.refuse_join()
        missing = set()
        try:
            for group in self.param_groups:
                for parameter, name in _named(group):
                    if parameter.grad is None:
                        missing.add(parameter)
                    elif parameter.grad.layout != torch.strided:
                        refuse_sparse(self._label(name), parameter.grad)
            if self._trained is not None:
                self._trained.check(missing)
        except (ValueError, RuntimeError) as error:
            if not exchange.shared:
                raise
            return error
        return None

    def _watched(self, exchange: Exchange, adamw: AdamWStep, refusal: Exception | None) -> list[Tensor]:
        """Numbers whose sums over the ranks tell what parted them: see `_judge`."""
        self._hyper = [
            (name, {key: value.clone() if isinstance(value, Tensor) else value for key, value in of_group.items()})
            for name, of_group in self._hyper_now()
        ]
        tensors = [v for _, of_group in self._hyper for v in of_group.values() if isinstance(v, Tensor)]
        columns = torch.zeros(2 + len(tensors), exchange.world_size, device=exchange.device)  # each rank fills its own
        own = columns.unbind(dim=1)[exchange.rank]
        own[0].fill_(fingerprint(exchange.number, self._hyper))
        own[1].fill_(refusal is not None)
        for place, value in enumerate(tensors, start=2):
            own[place].copy_(value)
        if not exchange.has_replicas:
            return [columns]
        norms = [adamw.largest(p) for p, _ in self._adamw_parameters()]
        stacked = torch.stack(norms).double() if norms else exchange.weights_of_adamw
        return [columns, stacked, stacked * exchange.weights_of_adamw]

    def _adamw_parameters(self) -> list[tuple[Tensor, str]]:
        return [pair for group in self.param_groups if not group["orthogonalize"] for pair in _named(group)]

    def _judge(
        self,
        families: Sequence[_Family],
        exchange: Exchange,
        refusal: Exception | None,
        adamw_groups: int,
        statistics: list[list[Tensor]],
        flags: list[Tensor],
    ) -> None:
        """Tell from the sums of a step what parted the ranks: refusals, hyper-parameters, gradients of replicas."""
        presence, (columns, *norms) = flags[adamw_groups : 2 * adamw_groups], flags[2 * adamw_groups :]
        spread, largest = columns.amax(dim=1) - columns.amin(dim=1), columns.abs().amax(dim=1)
        hyper = (spread[0] > 0) | (spread[2:] > CLOSE * largest[2:]).any()
        parted = [hyper, columns[1] > 0]
        if norms:
            for family, (grad_sq, direction_sq, present, apart) in zip(families, statistics, strict=True):
                norm_sq = grad_sq.view(len(present), -1).sum(dim=1)
                valid = _valid(family, grad_sq, direction_sq, present)
                parted.append(valid & (apart.abs() > family.tolerance * norm_sq))
            total, apart = norms
            if presence:
                everywhere = ~torch.cat([(found > 0).all(dim=0) for found in presence])
                parted.append(everywhere & (apart.abs() > exchange.tolerance_of_adamw * total))
        assert self._alarm is not None
        self._alarm.set(torch.cat([flag.flatten().float() for flag in parted]))
        if self._alarm.at_once:
            self._raise_what_parted(exchange, refusal)

    def _raise_what_parted(self, exchange: Exchange, refusal: Exception | None) -> None:
        """Raise, on all ranks, if the last sums that were judged have parted them."""
        flags = self._alarm.read() if self._alarm is not None else []
        if not any(flags):
            return
        assert self._alarm is not None
        different, refused, apart = flags[0], flags[1:][: exchange.world_size], flags[1 + exchange.world_size :]
        if any(refused):
            rank, reason = refused.index(1.0), "Its own message says why."
            if self._alarm.at_once:
                reason = exchange.gather(str(refusal or ""), "tell what they cannot use")[rank]
            raise refusal or RuntimeError(
                f"Expected all ranks to have gradients, but rank {rank} refused its own. {reason}"
            )
        if different:
            told = exchange.gather((exchange.number, plain(self._hyper)), "compare their hyper-parameters")
            check_order([number == told[0][0] for number, _ in told])
            check_hyper([hyper for _, hyper in told])
        if any(apart):
            pairs = zip(self._watched_names, apart, strict=True)
            names = [self._label(name) for name, flag in pairs if flag]
            raise RuntimeError(
                f"Expected the replicas of {some(names)} to have the same gradient, but their norms differ by more "
                "than a reduction rounds: one rank's gradient would count, the others' would be lost. Average the "
                "gradients over the ranks before the step (DistributedDataParallel and FSDP do). Local SGD, model "
                "averaging and communication hooks that do not average are not supported."
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
            rounding = [tolerance(exchange.replicas[i].count, entries[i].parameter.dtype) for i in indices]
            bounds = torch.tensor(rounding, dtype=torch.float64 if exchange.shared else dtype, device=exchange.device)
            families.append(_Family(first.group, parcels, dtype, factors.view(-1, *leading, *columns), holders, bounds))
        return families

    def _updates(
        self,
        entries: list[Entry],
        families: Sequence[_Family],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        flags: list[Tensor],
        judge: Callable[[list[list[Tensor]], list[Tensor]], None] | None = None,
    ) -> tuple[dict[tuple[int, ...], Update], list[Tensor]]:
        """Sum the statistics, and flags, over the ranks; from them decide which matrices move, and by how much.

        Args:
            entries: The matrix parameters.
            families: Those whose updates are wanted.
            exchange: Sums.
            grads: Local gradients of the matrix parameters.
            flags: To be summed beside the statistics.
            judge: Called with the sums of the statistics (of each family) and of the flags, before anything moves.
        """
        partials = [self._family_partials(entries, exchange, grads, family) for family in families]
        flat = [part for parts in partials for part in parts] + flags
        if not flat:
            return {}, []
        dtype = max((part.dtype for part in flat), key=lambda d: d.itemsize)
        sizes = [part.numel() for part in flat]
        summed = exchange.sum(torch.cat([part.flatten().to(dtype) for part in flat]))
        totals = iter(
            total.view_as(part).to(part.dtype) for total, part in zip(torch.split(summed, sizes), flat, strict=True)
        )
        statistics = [list(itertools.islice(totals, len(parts))) for parts in partials]
        flags = list(totals)
        if judge is not None:
            judge(statistics, flags)
        updates: dict[tuple[int, ...], Update] = {}
        for family, own in zip(families, statistics, strict=True):
            updates |= self._family_updates(entries, family, *own[:3])
        return updates, flags

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
    ) -> tuple[Tensor, ...]:
        """This rank's part of ``||G||^2`` and ``||N||^2`` (K, *statistic), and of the count of gradients (K,).

        Where there are replicas also its part of a number (K,) that is zero if they have the same ``||G||^2``.
        """
        grad_sq, direction_sq, present, norm_sq = self._local_statistics(entries, exchange, grads, parcel)
        if not (exchange.shared and exchange.has_replicas):
            return grad_sq, direction_sq, present
        return grad_sq, direction_sq, present, norm_sq.double() * exchange.replicas[parcel[0]].weight

    def _local_statistics(
        self, entries: list[Entry], exchange: Exchange, grads: Sequence[Tensor | None], parcel: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What counts of ``||G||^2``, ``||N||^2`` and of present gradients; and this rank's own ``||G||^2`` (K,)."""
        entry, device = entries[parcel[0]], exchange.device
        layout, dtype, counts = entry.layout, statistics_dtype(entry.parameter), exchange.contributes(parcel[0])
        zeros = torch.zeros(len(parcel), *layout.statistic_shape(self.per_column), dtype=dtype, device=device)
        found = [grads[i] is not None for i in parcel]
        if not layout.region.numel or not any(found):
            none = torch.zeros(len(parcel), dtype=dtype, device=device)
            return zeros, zeros, none, none
        _, buffer, grad = self._momenta(entries, exchange.workspace, grads, parcel)
        present = torch.ones(len(parcel), dtype=dtype, device=device)
        if not all(found):  # no list becomes a tensor: the device would wait for it
            present = torch.stack(
                [one if has else torch.zeros_like(one) for one, has in zip(present, found, strict=True)]
            )
        if not counts:  # a replica's gradient enters no sum, but its own momentum
            norm_sq = sum_of_squares(grad, dtype)
            return zeros, zeros, torch.where(norm_sq.isfinite(), present, present / 2), norm_sq  # there, and no good
        grad_sq = layout.sums_of_squares(grad, self.per_column, dtype, exchange.workspace)
        norm_sq = grad_sq
        if exchange.replicas[parcel[0]].weight and grad_sq.dim() > 1:  # summed as on the other replicas
            norm_sq = sum_of_squares(grad, dtype)
        norm_sq = norm_sq.view(len(parcel), -1).sum(dim=1)
        if not self.adaptive:
            return grad_sq, zeros, present, norm_sq
        keys = {key: entry.group[key] for key in ("momentum", "nesterov")}
        direction = formulas.direction(grad, buffer, **keys, out=exchange.workspace.like(grad))
        direction_sq = layout.sums_of_squares(direction, self.per_column, dtype, exchange.workspace)
        return grad_sq, direction_sq, present, norm_sq

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
        ok = _valid(family, grad_sq, direction_sq, present)
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
        size = formulas.update_size(sizes, family.factors, max_step=group.get("max_step"))
        decay = formulas.decay_factor(
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
        return formulas.shape_factor(shape, shape_scale)

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
            formulas.update_momentum(grad, buffer, momentum=entry.group["momentum"])
            if entry.group["nesterov"]:
                direction = formulas.look_ahead(grad, buffer, momentum=entry.group["momentum"], out=grad)
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
            formulas.apply_update(
                weight,
                exchange.workspace.like(weight, update.size.dtype).copy_(ortho.view(weight.shape)),
                layout.spread(update.size, self.per_column, shape),
                layout.spread(update.factor, self.per_column, shape),
            )
            unstack(weight, weights)


def _named(group: dict[str, Any]) -> Iterator[tuple[Tensor, str]]:
    """The parameters of a group with their names."""
    return zip(group["params"], parameter_names(group), strict=True)


def _valid(family: _Family, grad_sq: Tensor, direction_sq: Tensor, present: Tensor) -> Tensor:
    """Which of K gradients, (K,), are there on all ranks, finite, and small enough for the iteration.

    The iteration takes ``||N||^2`` in float32: a larger one would be infinite there, and N a zero matrix.
    """
    norm_sq = grad_sq.view(len(present), -1).sum(dim=1)
    if family.group["orthogonalizer"] == "newton_schulz":
        norm_sq = (2 * norm_sq).float()  # N is rounded to bfloat16 first
    finite = direction_sq.isfinite().view(len(present), -1).all(dim=1)
    return (present == family.holders) & norm_sq.isfinite() & finite


def wire_dtype(entry: Entry) -> torch.dtype:
    """In which matrices are communicated: bfloat16 for Newton-Schulz, whatever it iterates in; else the parameter's."""
    return torch.bfloat16 if entry.group["orthogonalizer"] == "newton_schulz" else entry.parameter.dtype


def _cost(entry: Entry) -> int:
    keys = {key: entry.group[key] for key in ("ns_steps", "ns_coefficients")}
    return sum(newton_schulz_flops(shape, **keys) for shape in entry.layout.matrix_shapes)
