"""The only `step`: momentum, one sum of statistics over the ranks, shared-out orthogonalization, scaled update.

Nothing here asks which parallel strategy runs: a parameter's `Layout` says where its local shard is in its matrix.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_namo.optim import formulas
from lightning_namo.optim.adamw import AdamWStep, on_some_ranks_only
from lightning_namo.optim.groups import named_parameters
from lightning_namo.optim.state import StatefulOptimizer, statistics_dtype
from lightning_namo.optim.step_agreement import StepAgreement
from lightning_namo.optim.trained_module import TrainedModule
from lightning_namo.polar.cost import newton_schulz_flops
from lightning_namo.polar.iteration_dtype import iteration_dtype
from lightning_namo.polar.orthogonalize import orthogonalize
from lightning_namo.routing.names import parameter_label
from lightning_namo.sharding.agreement import HyperParameters, ParameterDescription, checksums, plain, tolerance
from lightning_namo.sharding.assignment import Matrix
from lightning_namo.sharding.discovery import part_of
from lightning_namo.sharding.exchange import Exchange, StackedTensors
from lightning_namo.sharding.layout import Layout, ShardRegion
from lightning_namo.sharding.local import local_gradient, local_tensor, refuse_sparse, stack, sum_of_squares, unstack
from lightning_namo.sharding.process_group import current_group
from lightning_namo.sharding.publication import Published
from lightning_namo.workspace import Workspace


@dataclass(eq=False)
class MatrixParameter:
    """A parameter of a matrix group, and the layout of its local shard."""

    name: str
    tensor: Tensor
    group: dict[str, Any]
    layout: Layout


@dataclass(eq=False)
class StatisticsBatch:
    """Parameters of one group whose statistics have one shape: their step sizes are computed together.

    On several ranks there is one batch per group and statistic shape (one all-reduce sums them all); on one rank, one
    batch per stack.
    """

    group: dict[str, Any]
    stacks: list[tuple[int, ...]]  # for each stack, the indices of its parameters
    dtype: torch.dtype  # of the statistics
    factors: Tensor  # shape factors, broadcasting against (parameters, *statistic)
    holders: Tensor  # how many ranks hold a part of each parameter, (parameters,)
    tolerance: Tensor  # relative, of the difference of replicas' squared norms, (parameters,)

    def only(self, active: Collection[int]) -> StatisticsBatch:
        """The batch without the parameters that are not active."""
        kept = [k for k, i in enumerate(i for indices in self.stacks for i in indices) if i in active]
        if len(kept) == len(self.holders):
            return self
        stacks = [members for indices in self.stacks if (members := tuple(i for i in indices if i in active))]
        numbers = (
            torch.stack([whole[k] for k in kept]) if kept else whole[:0]
            for whole in (self.factors, self.holders, self.tolerance)
        )
        return StatisticsBatch(self.group, stacks, self.dtype, *numbers)

    def valid(self, grad_sq: Tensor, direction_sq: Tensor, present: Tensor) -> Tensor:
        """Which of K gradients, (K,), are there on all ranks, finite, and small enough for the iteration.

        The iteration takes ``||N||^2`` in float32: a larger one would be infinite there, and N a zero matrix.
        """
        norm_sq = grad_sq.view(len(present), -1).sum(dim=1)
        if self.group["orthogonalizer"] == "newton_schulz":
            norm_sq = (2 * norm_sq).float()  # N is rounded to bfloat16 first
        finite = direction_sq.isfinite().view(len(present), -1).all(dim=1)
        return (present == self.holders) & norm_sq.isfinite() & finite


@dataclass(eq=False)
class Update:
    """What K weights are multiplied by (factor), and their directions (size); which of them are valid, (K,)."""

    valid: Tensor
    size: Tensor
    factor: Tensor


class OrthogonalizedOptimizer(StatefulOptimizer):
    """Base of the optimizers that orthogonalize momentum; holds the only `step`.

    A subclass is a signature, a docstring with its formula, its extra state and its step size.

    Attributes:
        bucket_bytes: Bound on the bytes of the matrices that a rank assembles at a time; a larger matrix is in a bucket
            of its own. None: 8 MiB on CPUs, 32 MiB elsewhere. Set it before the first step. Above parameters, gradients
            and state a step on shards needs about 11 times that, and about 17 times where the iteration runs in float32
            (`iteration_dtype`), with three buckets in flight. Measured on square matrices, which need most, in
            bfloat16: 7.4 on one rank, 10.9 on two, 12 on two replicas, which receive what all owners computed; in
            float32: 13.0, 16.5 and 17.0.
    """

    bucket_bytes: int | None = None
    _prepared: tuple[list[MatrixParameter], list[StatisticsBatch], Exchange] | None = None
    _prepared_for: Sequence[tuple[Any, ...]] = ()
    _agreement: StepAgreement  # of what is prepared
    _trained: TrainedModule | None = None
    _compared_in: Callable[[], Any] = staticmethod(lambda: None)  # the process group in which weights were compared

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
        if self._prepared is not None and self._prepared[2].is_current:
            self._agreement.raise_disagreement(None)
        parameters, batches, exchange = self._prepare()
        refusal = self._refusal(exchange)
        grads = [None if refusal else local_gradient(p.name, p.tensor) for p in parameters]
        active = {i for i, grad in enumerate(grads) if grad is not None or exchange.distributed}
        adamw = AdamWStep(self.param_groups, self.state, refused=refusal is not None)

        batches = [batch for batch in (batch.only(active) for batch in batches) if batch.stacks]
        updates: dict[tuple[int, ...], Update] = {}
        skipped = adamw.not_finite_flags()
        with exchange.workspace.frame():
            if exchange.distributed:
                updates, skipped = self._agreed_updates(parameters, batches, exchange, grads, adamw, skipped, refusal)
            batch_of = {batch.stacks[0]: batch for batch in batches}

            def directions(indices: tuple[int, ...]) -> Tensor:
                if not exchange.distributed:  # each stack when its turn comes, while it is in the cache
                    batch = batch_of[indices]
                    (statistics,), _ = self._sums(parameters, [batch], exchange, grads, [])
                    updates.update(self._batch_updates(parameters, batch, *statistics))
                return self._directions(parameters, exchange, grads, indices, updates[indices].valid)

            for bucket in exchange.map(active, directions, self._work(parameters, exchange.workspace)):
                with exchange.workspace.frame():
                    self._apply(parameters, exchange, bucket, updates)
                del bucket
        adamw.run(skipped)
        self._count_adamw(skipped)
        self._warn_of_ungrouped()
        if refusal is not None:
            raise refusal  # the other ranks raise it in their next step
        return loss

    def sharing(self) -> str:
        """Which rank orthogonalizes how much, a line each. Before the first step this is collective."""
        parameters, _, exchange = self._prepare()
        costs, ranks = [_cost(p) for p in parameters], range(exchange.world_size)
        owned = [[i for i, owner in enumerate(exchange.assignment.owners) if owner == rank] for rank in ranks]
        loads = [sum(costs[i] for i in matrices) for matrices in owned]
        mean = sum(loads) / len(loads)
        lines = [
            f"rank {rank}: {len(matrices)} matrices, {load / 1e9:.3g} GFLOP, {load / mean:.3f} of the mean"
            for rank, (matrices, load) in enumerate(zip(owned, loads, strict=True))
        ]
        return "\n".join([*lines, f"rank {exchange.rank} sends {exchange.bytes_sent:,} bytes of matrices a step"])

    # ------------------------------------------------------------------ preparation

    def _prepare(self) -> tuple[list[MatrixParameter], list[StatisticsBatch], Exchange]:
        """Layouts, batches and exchange: made at the first step, and again when groups or dtypes have changed."""
        self._fill_state()
        prepared_for = [
            (id(g), [(id(p), p.dtype) for p in g["params"]], g.get("orthogonalizer"), g.get("shape_scale"))
            for g in self.param_groups
        ]
        if self._prepared is None or prepared_for != self._prepared_for or not self._prepared[2].is_current:
            self._prepared = None
            names = {tensor: name for group in self.param_groups for tensor, name in named_parameters(group)}
            module = self._module()
            self._trained = None if module is None else TrainedModule(module, names)
            parameters = [
                MatrixParameter(name, tensor, group, self._layout(name, tensor, group))
                for group in self.param_groups
                if group["orthogonalize"]
                for tensor, name in named_parameters(group)
            ]
            self._follow_parameters()
            device = parameters[0].tensor.device
            iteration_dtype(device.type)  # a wrong environment variable is refused before ranks wait for one another
            numbers = {id(group): number for number, group in enumerate(self.param_groups)}
            matrices = [
                Matrix(
                    p.name,
                    p.layout.stored,
                    wire_dtype(p),
                    _cost(p),
                    p.layout.region,
                    (numbers[id(p.group)], p.tensor.dtype, *p.layout.shape),
                )
                for p in parameters
            ]
            exchange = Exchange(matrices, device, self.bucket_bytes, lambda: self._published(parameters), Workspace())
            self._compared_in = exchange.group
            batches = self._statistics_batches(parameters, exchange)
            compared = [parameters[i].name for batch in batches for indices in batch.stacks for i in indices]
            compared += [name for _, name in self._adamw_parameters()]
            self._agreement = StepAgreement(exchange, compared, self._module)
            self._prepared = parameters, batches, exchange
            self._prepared_for = prepared_for
        return self._prepared

    def _published(self, parameters: Sequence[MatrixParameter]) -> Published:
        """What the other ranks must have alike."""
        described: list[tuple[Tensor, str, tuple[int, ...], ShardRegion | None]]
        described = [(p.tensor, p.name, p.layout.shape, p.layout.region) for p in parameters]
        for tensor, name in self._adamw_parameters():
            shape, region = self._regions.get(tensor, (tuple(tensor.shape), None))
            described.append((tensor, name, shape, region))
        sums = checksums([local_tensor(tensor) for tensor, *_ in described])
        descriptions = [
            ParameterDescription(self._label(name), shape, tensor.dtype, part_of(tensor, region), checksum)
            for (tensor, name, shape, region), checksum in zip(described, sums, strict=True)
        ]
        # Only once: AdamW's replicas may come to differ by what a reduction rounds, which a step accepts.
        compare, hyper = self._compared_in() is not current_group(), plain(self._hyper_parameters())
        count = len(parameters)
        return Published(descriptions[:count], descriptions[count:], hyper, self._number, compare)

    def _label(self, name: str) -> str:
        return parameter_label(name, self._module())

    def _hyper_parameters(self) -> HyperParameters:
        keys = {True: sorted(self._matrix_defaults), False: sorted(self._adamw_defaults)}
        return [(g["name"], {key: g[key] for key in keys[g["orthogonalize"]] if key in g}) for g in self.param_groups]

    def _adamw_parameters(self) -> list[tuple[Tensor, str]]:
        return [pair for group in self.param_groups if not group["orthogonalize"] for pair in named_parameters(group)]

    def _statistics_batches(self, parameters: list[MatrixParameter], exchange: Exchange) -> list[StatisticsBatch]:
        stacks_of: dict[Any, list[tuple[int, ...]]] = defaultdict(list)
        for indices in (s.indices for bucket in exchange.buckets for s in bucket):
            first = parameters[indices[0]]
            shape = first.layout.statistic_shape(self.per_column)
            of_its_own = None if exchange.distributed else indices
            stacks_of[id(first.group), shape, statistics_dtype(first.tensor), of_its_own].append(indices)
        batches = []
        for (_, _, dtype, _), stacks in stacks_of.items():
            members = [i for indices in stacks for i in indices]
            first = parameters[members[0]]
            per_block = [
                [self._shape_factor(shape, first.group["shape_scale"]) for shape in parameters[i].layout.matrix_shapes]
                for i in members
            ]
            factors = torch.tensor(per_block, dtype=dtype, device=exchange.device)
            leading = (len(first.layout.blocks),) if len(first.layout.blocks) > 1 else ()
            columns = (1,) if self.per_column else ()
            counts = [exchange.holder_counts[i] for i in members]
            holders = torch.tensor(counts, dtype=dtype, device=exchange.device)
            rounding = [tolerance(exchange.replicas[i].count, parameters[i].tensor.dtype) for i in members]
            wide = torch.float64 if exchange.distributed else dtype
            bounds = torch.tensor(rounding, dtype=wide, device=exchange.device)
            factors = factors.view(-1, *leading, *columns)
            batches.append(StatisticsBatch(first.group, stacks, dtype, factors, holders, bounds))
        return batches

    # ------------------------------------------------------------------ statistics

    def _refusal(self, exchange: Exchange) -> Exception | None:
        """Why this rank cannot use its gradients; alone it raises, else it takes part without them and raises then."""
        if self._trained is not None:
            self._trained.refuse_join()
        missing = set()
        try:
            for group in self.param_groups:
                for tensor, name in named_parameters(group):
                    if tensor.grad is None:
                        missing.add(tensor)
                    elif tensor.grad.layout != torch.strided:
                        refuse_sparse(self._label(name), tensor.grad)
            if self._trained is not None:
                self._trained.check(missing)
        except (ValueError, RuntimeError) as error:
            if not exchange.distributed:
                raise
            return error
        return None

    def _agreed_updates(
        self,
        parameters: list[MatrixParameter],
        batches: Sequence[StatisticsBatch],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        adamw: AdamWStep,
        not_finite: list[Tensor],
        refusal: Exception | None,
    ) -> tuple[dict[tuple[int, ...], Update], list[Tensor]]:
        """Sum the statistics and flags of all ranks in one all-reduce, check that they agree, decide on the updates.

        Returns:
            For each stack its update; for each AdamW group a number above zero if it is skipped.
        """
        presence = adamw.presence()
        compared = self._adamw_parameters() if exchange.has_replicas else []
        largest = [adamw.largest(tensor) for tensor, _ in compared]
        numbers = self._agreement.numbers(self._hyper_parameters(), refusal, largest)
        statistics, flags = self._sums(parameters, batches, exchange, grads, [*not_finite, *presence, *numbers])
        count = len(not_finite)
        not_finite, presence, numbers = flags[:count], flags[count : 2 * count], flags[2 * count :]
        differing = []
        if exchange.has_replicas:
            for batch, (grad_sq, direction_sq, present, difference) in zip(batches, statistics, strict=True):
                norm_sq = grad_sq.view(len(present), -1).sum(dim=1)
                differs = difference.abs() > batch.tolerance * norm_sq
                differing.append(batch.valid(grad_sq, direction_sq, present) & differs)
        self._agreement.check(numbers, differing, presence, refusal)
        updates: dict[tuple[int, ...], Update] = {}
        for batch, of_batch in zip(batches, statistics, strict=True):
            updates |= self._batch_updates(parameters, batch, *of_batch[:3])
        return updates, [a + on_some_ranks_only(b) for a, b in zip(not_finite, presence, strict=True)]

    def _sums(
        self,
        parameters: list[MatrixParameter],
        batches: Sequence[StatisticsBatch],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        flags: list[Tensor],
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Sum the statistics of batches, and flags, over the ranks: one all-reduce."""
        partials = [self._batch_partials(parameters, exchange, grads, batch) for batch in batches]
        flat = [part for parts in partials for part in parts] + flags
        if not flat:
            return [], []
        dtype = max((part.dtype for part in flat), key=lambda d: d.itemsize)
        sizes = [part.numel() for part in flat]
        summed = exchange.sum(torch.cat([part.flatten().to(dtype) for part in flat]))
        totals = iter(
            total.view_as(part).to(part.dtype) for total, part in zip(torch.split(summed, sizes), flat, strict=True)
        )
        return [list(itertools.islice(totals, len(parts))) for parts in partials], list(totals)

    def _batch_partials(
        self,
        parameters: list[MatrixParameter],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        batch: StatisticsBatch,
    ) -> list[Tensor]:
        of_stacks = []
        for indices in batch.stacks:
            with exchange.workspace.frame():
                of_stacks.append(self._partials(parameters, exchange, grads, indices))
        return [torch.cat(parts) for parts in zip(*of_stacks, strict=True)]

    def _partials(
        self,
        parameters: list[MatrixParameter],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        indices: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        """This rank's part of ``||G||^2`` and ``||N||^2`` (K, *statistic), and of the count of gradients (K,).

        Where there are replicas also its part of a number (K,) that is zero if they have the same ``||G||^2``.
        """
        grad_sq, direction_sq, present, norm_sq = self._local_statistics(parameters, exchange, grads, indices)
        if not (exchange.distributed and exchange.has_replicas):
            return grad_sq, direction_sq, present
        return grad_sq, direction_sq, present, norm_sq.double() * exchange.replicas[indices[0]].weight

    def _local_statistics(
        self,
        parameters: list[MatrixParameter],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        indices: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What counts of ``||G||^2``, ``||N||^2`` and of present gradients; and this rank's own ``||G||^2`` (K,)."""
        first, device = parameters[indices[0]], exchange.device
        layout, dtype, counts = first.layout, statistics_dtype(first.tensor), exchange.is_primary_replica(indices[0])
        zeros = torch.zeros(len(indices), *layout.statistic_shape(self.per_column), dtype=dtype, device=device)
        found = [grads[i] is not None for i in indices]
        if not layout.region.numel or not any(found):
            none = torch.zeros(len(indices), dtype=dtype, device=device)
            return zeros, zeros, none, none
        _, buffer, grad = self._momenta(parameters, exchange.workspace, grads, indices)
        present = torch.ones(len(indices), dtype=dtype, device=device)
        if not all(found):  # no list becomes a tensor: the device would wait for it
            present = torch.stack(
                [one if has else torch.zeros_like(one) for one, has in zip(present, found, strict=True)]
            )
        if not counts:  # the gradient of another replica enters the sums; this rank's only its own momentum
            norm_sq = sum_of_squares(grad, dtype)
            return zeros, zeros, torch.where(norm_sq.isfinite(), present, present / 2), norm_sq  # half: not valid
        grad_sq = layout.sums_of_squares(grad, self.per_column, dtype, exchange.workspace)
        norm_sq = grad_sq
        if exchange.replicas[indices[0]].weight and grad_sq.dim() > 1:  # summed as on the other replicas
            norm_sq = sum_of_squares(grad, dtype)
        norm_sq = norm_sq.view(len(indices), -1).sum(dim=1)
        if not self.adaptive:
            return grad_sq, zeros, present, norm_sq
        keys = {key: first.group[key] for key in ("momentum", "nesterov")}
        direction = formulas.direction(grad, buffer, **keys, out=exchange.workspace.like(grad))
        direction_sq = layout.sums_of_squares(direction, self.per_column, dtype, exchange.workspace)
        return grad_sq, direction_sq, present, norm_sq

    def _momenta(
        self,
        parameters: list[MatrixParameter],
        workspace: Workspace,
        grads: Sequence[Tensor | None],
        indices: tuple[int, ...],
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The local momenta of a stack; and in one tensor (K, ...) each, in one dtype, the momenta and the gradients.

        Where there is no gradient the momentum stands in for it: the average of M with M is M.
        """
        tensors = [parameters[i].tensor for i in indices]
        momenta = [local_tensor(self.state[tensor]["momentum_buffer"]) for tensor in tensors]
        dtype = torch.promote_types(tensors[0].dtype, momenta[0].dtype)
        found = [m if (g := grads[i]) is None else g for i, m in zip(indices, momenta, strict=True)]
        gradients = stack([tensor.to(dtype) for tensor in found], workspace)
        return momenta, stack(momenta, workspace).to(dtype), gradients

    # ------------------------------------------------------------------ updates

    def _batch_updates(
        self,
        parameters: list[MatrixParameter],
        batch: StatisticsBatch,
        grad_sq: Tensor,
        direction_sq: Tensor,
        present: Tensor,
    ) -> dict[tuple[int, ...], Update]:
        """Advance step, skipped and v where gradients are valid; give the update of each stack."""
        states = [self.state[parameters[i].tensor] for indices in batch.stacks for i in indices]
        valid = batch.valid(grad_sq, direction_sq, present)
        per_member = (-1,) + (1,) * (grad_sq.dim() - 1)

        step = torch.stack([state["step"] for state in states])
        v = torch.stack([state["v"] for state in states]) if self.adaptive else None
        sizes, new_v = self._step_size(batch.group, grad_sq, direction_sq, v, (step + 1).view(per_member))
        if v is not None and new_v is not None:
            torch._foreach_copy_(
                [state["v"] for state in states], list(torch.where(valid.view(per_member), new_v, v).unbind())
            )
        torch._foreach_add_([state["step"] for state in states], list(valid.to(step.dtype).unbind()))
        skipped = ((present > 0) & ~valid).to(step.dtype)
        torch._foreach_add_([state["skipped"] for state in states], list(skipped.unbind()))

        group = batch.group
        size = formulas.update_size(sizes, batch.factors, max_step=group.get("max_step"))
        factor = formulas.decay_factor(
            sizes,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            max_step=group.get("max_step"),
            decay=group.get("decay", "lr"),
            floor=self.per_column,
        )
        size = torch.where(valid.view(per_member), size, 0)
        factor = torch.where(valid.view(per_member), factor, 1)
        counts = [len(indices) for indices in batch.stacks]
        parts = zip(*(torch.split(whole, counts) for whole in (valid, size, factor)), strict=True)
        return {indices: Update(*part) for indices, part in zip(batch.stacks, parts, strict=True)}

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
        parameters: list[MatrixParameter],
        exchange: Exchange,
        grads: Sequence[Tensor | None],
        indices: tuple[int, ...],
        valid: Tensor,
    ) -> Tensor:
        """Update the momenta where valid; give the directions N (K, ...) to orthogonalize, in their wire dtype."""
        first, workspace = parameters[indices[0]], exchange.workspace
        shape = local_tensor(first.tensor).shape
        sent = workspace.take((len(indices), *shape), wire_dtype(first), exchange.device)
        with workspace.frame():
            momenta, buffer, grad = self._momenta(parameters, workspace, grads, indices)
            # Where not valid M stands in for G: nothing is updated, and the direction stays finite.
            grad = torch.where(valid.view(-1, *(1 for _ in shape)), grad, buffer, out=workspace.like(grad))
            formulas.update_momentum(grad, buffer, momentum=first.group["momentum"])
            if first.group["nesterov"]:
                direction = formulas.look_ahead(grad, buffer, momentum=first.group["momentum"], out=grad)
            else:
                direction = grad.copy_(buffer)
            sent.copy_(self._to_orthogonalize(direction))
            unstack(buffer, momenta)
        return sent

    def _to_orthogonalize(self, direction: Tensor) -> Tensor:
        """What is orthogonalized, from N, which may be overwritten."""
        return direction

    def _work(
        self, parameters: list[MatrixParameter], workspace: Workspace
    ) -> Callable[[StackedTensors], list[Tensor]]:
        """What the exchange does with whole stored matrices: the polar factors of the true ones, stored alike."""

        def polar(stacks: StackedTensors) -> list[Tensor]:
            results: dict[int, Tensor] = {}
            by_group: dict[int, list[int]] = defaultdict(list)
            for position, (indices, _) in enumerate(stacks):
                by_group[id(parameters[indices[0]].group)].append(position)
            for positions in by_group.values():
                firsts = [parameters[stacks[position][0][0]] for position in positions]
                group, layouts = firsts[0].group, [first.layout for first in firsts]
                matrices = [
                    matrix
                    for position, layout in zip(positions, layouts, strict=True)
                    for matrix in layout.matrices(stacks[position][1])
                ]
                factors = iter(
                    orthogonalize(
                        matrices,
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

    def _apply(
        self,
        parameters: list[MatrixParameter],
        exchange: Exchange,
        bucket: StackedTensors,
        updates: dict[tuple[int, ...], Update],
    ) -> None:
        """Apply a bucket's polar factors (flat local shards) to the weights."""
        for indices, ortho in bucket:
            layout, update = parameters[indices[0]].layout, updates[indices]
            weights = [local_tensor(parameters[i].tensor) for i in indices]
            shape, weight = weights[0].shape, stack(weights, exchange.workspace)
            formulas.apply_update(
                weight,
                exchange.workspace.like(weight, update.size.dtype).copy_(ortho.view(weight.shape)),
                layout.expand_to_shard(update.size, self.per_column, shape),
                layout.expand_to_shard(update.factor, self.per_column, shape),
            )
            unstack(weight, weights)


def wire_dtype(parameter: MatrixParameter) -> torch.dtype:
    """In which matrices are communicated: bfloat16 for Newton-Schulz, whatever it iterates in; else the parameter's."""
    newton_schulz = parameter.group["orthogonalizer"] == "newton_schulz"
    return torch.bfloat16 if newton_schulz else parameter.tensor.dtype


def _cost(parameter: MatrixParameter) -> int:
    keys = {key: parameter.group[key] for key in ("ns_steps", "ns_coefficients")}
    return sum(newton_schulz_flops(shape, **keys) for shape in parameter.layout.matrix_shapes)
