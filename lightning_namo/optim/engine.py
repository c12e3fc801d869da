"""The only `step`: what every rule asks for, sums over the ranks and shared-out orthogonalization, is answered here.

Nothing here asks which parallel strategy runs: a parameter's `Layout` says where its local shard is in its matrix.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_namo.optim.adamw import AdamWStep, on_some_ranks_only
from lightning_namo.optim.formulas import HyperParameters
from lightning_namo.optim.groups import named_parameters
from lightning_namo.optim.rule import Matrices, Rule
from lightning_namo.optim.run import Reading, Requests, StackRun, Watcher
from lightning_namo.optim.stack import MatrixParameter, MatrixStack, statistics_dtype
from lightning_namo.optim.state import StatefulOptimizer
from lightning_namo.optim.step_agreement import StepAgreement
from lightning_namo.optim.trained_module import TrainedModule
from lightning_namo.optim.trial import Scratch, requests_of, scratch_of
from lightning_namo.polar.iteration_dtype import iteration_dtype
from lightning_namo.polar.orthogonalize import orthogonalize
from lightning_namo.routing.names import parameter_label
from lightning_namo.sharding import agreement
from lightning_namo.sharding.agreement import ParameterDescription, checksums, plain, tolerance
from lightning_namo.sharding.assignment import Matrix
from lightning_namo.sharding.batch import BatchLayout, divide
from lightning_namo.sharding.discovery import part_of
from lightning_namo.sharding.exchange import Exchange
from lightning_namo.sharding.layout import Layout, Rectangle
from lightning_namo.sharding.local import local_tensor, refuse_sparse
from lightning_namo.sharding.process_group import current_group, gather
from lightning_namo.sharding.publication import Published
from lightning_namo.torch_versions import eagerly
from lightning_namo.workspace import Workspace

Runs = dict[int, list[StackRun]]  # of each bucket, by its number


class OrthogonalizedOptimizer(StatefulOptimizer):
    """Base of the optimizers that orthogonalize matrices, one's own too; holds the only `step`.

    A subclass is a docstring with its formula, a signature, the kinds of its states, and a rule: a generator that
    computes on `Matrices`, and yields `Sum` and `Polar`. It may compute with torch what it likes, from gradients,
    momentum, weights, states, hyper-parameters and ``x.step``. What it gets for that, without a line of its own:

    - The same numbers on one process and in shards of DDP, FSDP1, FSDP2, HSDP and tensor parallelism, for matrices that
      are stored transposed, fused (``blocks``) or convolutions, alone or in stacks.
    - A matrix whose gradient is missing on some ranks, or not finite, keeps weights and states to the bit; the momentum
      stands in for its gradient, so that nothing else feels it. It is counted in `skipped_steps`.
    - Checkpoints, copies and pickles with its states, which go on under another strategy; `lightning-namo plan`;
      hyper-parameters of the engine (``ns_steps``, ``momentum_dtype``, ``adamw_lr``, ...) in its constructor.

    What would break that is refused before the first step changes anything, by an error that says what to write:
    numbers that meet elements without ``x.spread``; the use of a part of a sum that was not asked for; functions that
    reduce elements, which are this rank's only; numbers read on the host; elements made before a sum and used after it;
    what was read and has been written since; states that are not declared. What no such trial can see, `check_rule` of
    `lightning_namo.testing` does. A rule runs eagerly, also where the step is called in compiled code.

    Attributes:
        state: Of the class: the states that the rule keeps beside the momentum, by name: "matrix", "column" or "row"
            for one number of each, "element" for a tensor like the parameter. They start at zero, in float32 (float64
            for float64 weights). (Of an optimizer: its state, as torch's.)
        ranges: Of the class: what the hyper-parameters may be that it adds, `lightning_namo.arguments.Range` by name;
            for constructors, groups, checkpoints and the command line. Those of the base classes are added.
        fixed: Of the class: hyper-parameters by which its states change their meaning, so that a checkpoint goes on
            with its own only, and what a checkpoint has that lacks them.
        bucket_bytes: Bound on the bytes of the matrices that a rank assembles at a time; a larger matrix is in a bucket
            of its own. None: 8 MiB on CPUs, elsewhere a 256th of the accelerator's memory. Set it before the first
            step. Above parameters, gradients and state a step on shards needs about 11 times that, and about 17 times
            where the iteration runs in float32 (`iteration_dtype`), with three buckets in flight.
        batched: Whether the sums of all matrices are taken at once, and stacks and buckets are as large as their bound.
            None: on all devices but CPUs, which work on a stack while it is in the cache.
        keeps_readings: Whether a step keeps what its rule reports, for `readings`. `ReadingLog` sets it for the steps
            that it logs.

    Example:
        >>> from lightning_namo.optim import Polar, Sum
        >>> class Normalized(OrthogonalizedOptimizer):
        ...     'Muon whose updates have a norm of lr.'
        ...
        ...     def __init__(self, params, lr=0.1, momentum=0.95):
        ...         super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": True, "weight_decay": 0.0})
        ...
        ...     def rule(self, x, h):
        ...         O = yield Polar(x.advance(h))
        ...         (O_sq,) = yield Sum(x.square_sum(O))
        ...         x.apply(O, step_size=h.lr / (O_sq.sqrt() + 1e-8))
    """

    bucket_bytes: int | None = None
    batched: bool | None = None
    keeps_readings: bool = False
    _readings: Sequence[Reading] = ()  # of the last step
    _watchers: Sequence[Watcher] = ()
    _prepared: tuple[list[MatrixParameter], list[list[MatrixStack]], Exchange] | None = None
    _prepared_for: Sequence[tuple[Any, ...]] = ()
    _requests: dict[tuple[int, tuple[int, ...]], Requests]  # of what is prepared, by group and shape
    _agreement: StepAgreement
    _trained: TrainedModule | None = None
    _compared_in: Callable[[], Any] = staticmethod(lambda: None)  # the process group in which weights were compared

    def rule(self, x: Matrices, h: HyperParameters) -> Rule:
        """One step of the matrices x, with the hyper-parameters h of their group: a generator, see `optim.rule`."""
        raise TypeError(f"Expected {type(self).__name__} to have a rule: def rule(self, x, h), a generator method.")

    def _ruled(self, x: Matrices, h: HyperParameters) -> Rule:
        """The rule, with hyper-parameters that groups leave out."""
        vars(h).update({key: absent for key, absent in self.fixed.items() if key not in vars(h)})
        return self.rule(x, h)

    @eagerly(reason="lightning_namo's step runs eagerly")
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
        _, _, exchange = self._prepare()
        refusal = self._refusal(exchange)
        adamw = AdamWStep(self.param_groups, self.state, refused=refusal is not None)
        skipped = adamw.not_finite_flags()
        readings: list[Reading] = []
        with exchange.workspace.frame():
            for watcher in self._watchers:
                watcher.step_begins()
            for runs in self._start(refused=refusal is not None):
                if exchange.distributed:
                    skipped = self._agree(runs, adamw, skipped, refusal)
                else:
                    self._leading_sums(runs, [])
                self._update(runs)
                for run in itertools.chain.from_iterable(runs.values()):
                    if run.stack.part is not None:
                        run.count_step()
                    if self.keeps_readings:
                        readings += run.readings()
        for watcher in self._watchers:
            watcher.step_ends()
        self._readings = readings
        adamw.run(skipped)
        self._count_adamw(skipped)
        self._warn_of_ungrouped()
        if refusal is not None:
            raise refusal  # the other ranks raise it in their next step
        return loss

    def readings(self) -> dict[str, dict[str, Tensor]]:
        """What the rule reported in the last step, if `keeps_readings` was set before it; steps taken and skipped.

        Returns:
            By name of a reading, and by name of a parameter: a tensor on the device, the same on all ranks, (B,) for
            the parameter's matrices (1, or as many as it has blocks or experts), or (B, n) or (B, m) for their columns
            or rows. NaN where a matrix was skipped, and behind the rows of lower blocks. A matrix without a gradient is
            not there.
        """
        found: dict[Tensor, dict[str, Tensor]] = {}
        for reading in self._readings:
            reading.write(found)
        by_name: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for group in self.param_groups:
            for tensor, name in named_parameters(group):
                for key, values in found.get(tensor, {}).items():
                    by_name[key][name] = values.flatten(0, 1).squeeze(1)
                if tensor in found:
                    for key in ("step", "skipped"):
                        by_name[key][name] = self.state[tensor][key].reshape(1)
        return dict(by_name)

    def sharing(self) -> str:
        """Which rank orthogonalizes how much, a line each. Before the first step this is collective."""
        parameters, _, exchange = self._prepare()
        costs, ranks = [p.cost for p in parameters], range(exchange.world_size)
        owned = [[i for i, owner in enumerate(exchange.assignment.owners) if owner == rank] for rank in ranks]
        loads = [sum(costs[i] for i in matrices) for matrices in owned]
        mean = sum(loads) / len(loads)
        lines = [
            f"rank {rank}: {sum(parameters[i].count for i in matrices)} matrices, {load / 1e9:.3g} GFLOP, "
            f"{load / mean if mean else 0:.3f} of the mean"
            for rank, (matrices, load) in enumerate(zip(owned, loads, strict=True))
        ]
        return "\n".join([*lines, f"rank {exchange.rank} sends {exchange.bytes_sent:,} bytes of matrices a step"])

    def requests(self, parameter: MatrixParameter) -> Requests:
        """What the rule asks for in a step of a matrix. Before the first step this is collective."""
        self._prepare()
        return self._requests[id(parameter.group), parameter.layout.shape]

    def _has_own_momentum(self, group: dict[str, Any]) -> bool:
        layout = Layout((2, 3), Rectangle(0, 2, 0, 3), transposed=False, blocks=(2,))
        some = MatrixParameter("some matrix", torch.empty(layout.shape, device="meta"), group, layout)
        return requests_of(self._ruled, self._kinds, some).own_momentum

    def scratch(self, parameter: MatrixParameter, count: int) -> Scratch:
        """What memory the rule takes for a stack of so many matrices like one."""
        return scratch_of(self._ruled, self._kinds, parameter, count, parameter.tensor.device.type == "cpu")

    def whole_matrices(
        self, read: Callable[[MatrixStack], Tensor | None]
    ) -> Iterator[tuple[MatrixStack, tuple[Tensor, ...]]]:
        """The true matrices that this rank owns, from shards that all ranks send. Collective.

        They are float32, or float64 where any parameter is.

        Args:
            read: From a stack of P to what is sent of it, tensors like its shards, (Q P, ...); or to None: nothing, on
                all ranks.

        Yields:
            A stack, and for each of its blocks matrices (Q P, m, n); of one bucket after the other.
        """
        parameters, buckets, exchange = self._prepare()
        dtype = max((statistics_dtype(p.tensor) for p in parameters), key=lambda d: d.itemsize, default=torch.float32)

        def shards(number: int) -> dict[int, Tensor]:
            found = {place: read(stack) for place, stack in enumerate(buckets[number])}
            return {place: tensor.to(dtype) for place, tensor in found.items() if tensor is not None}

        for number, whole in exchange.to_owners(shards, dtype):
            for place, tensor in whole.items():
                stack = buckets[number][place]
                yield stack, stack.layout.matrices(tensor.view(len(tensor), *stack.layout.stored))

    # ------------------------------------------------------------------ preparation

    def _prepare(self) -> tuple[list[MatrixParameter], list[list[MatrixStack]], Exchange]:
        """Parameters, stacks by bucket, and exchange: made at the first step, and again when something has changed."""
        self._fill_state()
        prepared_for = [
            (id(g), [(id(p), p.dtype) for p in g["params"]], g.get("orthogonalizer")) for g in self.param_groups
        ]
        if self._prepared is None or prepared_for != self._prepared_for or not self._prepared[2].is_current:
            self._prepared = None
            names = {tensor: name for group in self.param_groups for tensor, name in named_parameters(group)}
            module = self._module()
            self._trained = None if module is None else TrainedModule(module, names)
            parameters = self._matrix_parameters()
            self._follow_parameters()
            self._requests = {}
            for p in parameters:
                if (key := (id(p.group), p.layout.shape)) not in self._requests:
                    self._requests[key] = requests_of(self._ruled, self._kinds, p)
            device = next(tensor for group in self.param_groups for tensor in group["params"]).device
            iteration_dtype(device.type)  # a wrong environment variable is refused before ranks wait for one another
            numbers = {id(group): number for number, group in enumerate(self.param_groups)}
            matrices = [
                Matrix(
                    p.name,
                    p.layout.stored,
                    p.wire_dtype,
                    p.cost,
                    p.layout.region,
                    (numbers[id(p.group)], p.tensor.dtype, p.tensor.stride(), *p.layout.shape, p.part and p.name),
                    p.count,
                    p.part is not None,
                )
                for p in parameters
            ]
            exchange = Exchange(
                matrices, device, self.bucket_bytes, lambda: self._published(parameters), Workspace(), self.batched
            )
            self._compared_in = exchange.group
            buckets = [
                [self._stack(s.indices, parameters, exchange, self.state) for s in bucket]
                for bucket in exchange.buckets
            ]
            compared = [
                p.name for bucket in buckets for stack in bucket for p in stack.parameters for _ in range(p.count)
            ]
            compared += [name for _, name in self._adamw_parameters()]
            self._agreement = StepAgreement(exchange, compared, self._module)
            self._prepared = parameters, buckets, exchange
            self._prepared_for = prepared_for
        for stack in (stack for bucket in self._prepared[1] for stack in bucket):
            if not stack.is_bound(self.state):  # loaded, cast or replaced since
                self._follow_parameters()
                stack.bind(self.state)
        return self._prepared

    def _matrix_parameters(self) -> list[MatrixParameter]:
        """The parameters of the groups of matrices; batched ones in parts, which are the same on all ranks."""
        found = [
            (name, tensor, group, self._layout(name, tensor, group))
            for group in self.param_groups
            if group["orthogonalize"]
            for tensor, name in named_parameters(group)
        ]
        batches = [
            ((self._label(name), (layout.count, *layout.matrix.stored), tensor.dtype), layout)
            for name, tensor, _, layout in found
            if isinstance(layout, BatchLayout)
        ]
        of_ranks = gather(batches, "compare their parameters before a step")
        agreement.check_agreement([[signature for signature, _ in of_rank] for of_rank in of_ranks])
        divided = iter([divide([layout for _, layout in of_batch]) for of_batch in zip(*of_ranks, strict=True)])
        parameters = []
        for name, tensor, group, layout in found:
            if isinstance(layout, Layout):
                parameters.append(MatrixParameter(name, tensor, group, layout))
                continue
            parts = [layout.part(*bounds) for bounds in next(divided)]
            for part in parts:
                of_part = name if len(parts) == 1 else f"{name}[{part.first}:{part.last}]"
                parameters.append(MatrixParameter(of_part, tensor, group, part.layout, part))
        return parameters

    def _stack(
        self,
        indices: Sequence[int],
        parameters: Sequence[MatrixParameter],
        exchange: Exchange,
        states: Any,
    ) -> MatrixStack:
        members, device = [parameters[i] for i in indices], exchange.device
        each = [i for i in indices for _ in range(parameters[i].count)]
        counts = [exchange.holder_counts[i] for i in each]
        bounds = [tolerance(exchange.replicas[i].count, parameters[i].tensor.dtype) for i in each]
        stack = MatrixStack(
            members,
            self._kinds,
            exchange.is_primary_replica(indices[0]),
            exchange.replicas[indices[0]].weight,
            torch.tensor(counts, dtype=statistics_dtype(members[0].tensor), device=device)
            if exchange.distributed
            else None,
            torch.tensor(bounds, dtype=torch.float64, device=device) if exchange.has_replicas else None,
        )
        stack.bind(states)
        return stack

    def _published(self, parameters: Sequence[MatrixParameter]) -> Published:
        """What the other ranks must have alike."""
        described: list[tuple[Tensor, str, tuple[int, ...], Any]]
        described = [(p.local(p.tensor), p.name, p.layout.shape, p.layout.region) for p in parameters]
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

    def _hyper_parameters(self) -> agreement.HyperParameters:
        keys = {True: sorted(self._matrix_defaults), False: sorted(self._adamw_defaults)}
        return [(g["name"], {key: g[key] for key in keys[g["orthogonalize"]] if key in g}) for g in self.param_groups]

    def _adamw_parameters(self) -> list[tuple[Tensor, str]]:
        return [pair for group in self.param_groups if not group["orthogonalize"] for pair in named_parameters(group)]

    # ------------------------------------------------------------------ the step

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

    def _start(self, refused: bool) -> Iterator[Runs]:
        """The rules of all stacks, to be answered together; or those of one stack after the other, on one CPU."""
        _, buckets, exchange = self._prepared or self._prepare()
        together: Runs = {}
        distributed = exchange.distributed
        rule = self._ruled if self.fixed else self.rule
        for number, stacks in enumerate(buckets):
            runs = []
            for stack in stacks:
                grads = [None] * len(stack.parameters) if refused else stack.gradients()
                for first, end in [(0, len(grads))] if distributed else _present(grads):
                    part = stack if end - first == len(grads) else stack.some(first, end)
                    requests = self.requests(stack.parameters[0])
                    runs.append(
                        StackRun(part, rule, requests, grads[first:end], exchange.workspace, self.keeps_readings)
                    )
            if distributed or exchange.batched:
                together[number] = runs
            elif runs:
                yield {number: runs}
        if distributed or any(together.values()):  # without matrices the ranks agree on AdamW's parameters
            yield together

    def _agree(self, runs: Runs, adamw: AdamWStep, not_finite: list[Tensor], refusal: Exception | None) -> list[Tensor]:
        """The first sums, with what all ranks must agree on in the same all-reduce.

        Returns:
            For each AdamW group a number above zero if it is skipped.
        """
        presence = adamw.presence()
        compared = self._adamw_parameters() if self._exchange.has_replicas else []
        largest = [adamw.largest(tensor) for tensor, _ in compared]
        numbers = self._agreement.numbers(self._hyper_parameters(), refusal, largest)
        count = len(not_finite)

        def check(flags: list[Tensor], differing: list[Tensor]) -> None:
            not_finite[:], presence[:] = flags[:count], flags[count : 2 * count]
            self._agreement.check(flags[2 * count :], differing, presence, refusal)

        self._leading_sums(runs, [*not_finite, *presence, *numbers], check)
        return [a + on_some_ranks_only(b) for a, b in zip(not_finite, presence, strict=True)]

    def _leading_sums(
        self,
        runs: Runs,
        flags: list[Tensor],
        check: Callable[[list[Tensor], list[Tensor]], None] = lambda flags, differing: None,
    ) -> None:
        """Which gradients are valid, and the sums that rules ask for before their first polar factor.

        Args:
            runs: The rules.
            flags: What else is summed in the first all-reduce.
            check: Is told their sums, and which gradients differ between replicas, before a rule goes on.
        """
        every = [run for of_bucket in runs.values() for run in of_bucket]
        totals, flags = self._sums([run.gradient_parts() for run in every], flags)()
        differing = [run.decide(of_run) for run, of_run in zip(every, totals, strict=True)]
        batches: dict[Tensor, list[StackRun]] = defaultdict(list)
        for run in every:
            if run.stack.part is not None:
                batches[run.stack.parameters[0].tensor].append(run)
        for of_batch in batches.values():
            StackRun.agree(of_batch)
        check(flags, [flag for flag in differing if flag is not None])
        for run, of_run in zip(every, totals, strict=True):
            if run.requests.sums_first:
                run.answer(of_run)
        while waiting := [run for run in every if run.leading_left]:
            for run in waiting:
                run.go_on()
            self._answer(waiting)

    def _answer(self, runs: Sequence[StackRun]) -> None:
        totals, _ = self._sums([run.parts() for run in runs])()
        for run, of_run in zip(runs, totals, strict=True):
            run.answer(of_run)

    def _sums(
        self, parts: Sequence[Sequence[Tensor]], flags: Sequence[Tensor] = ()
    ) -> Callable[[], tuple[list[list[Tensor]], list[Tensor]]]:
        """Start to sum the parts of each run, and flags, over the ranks: one all-reduce. What is returned ends it."""
        flat = [*(part for of_run in parts for part in of_run), *flags]
        if not flat:
            return lambda: ([[] for _ in parts], [])
        dtype = max((part.dtype for part in flat), key=lambda d: d.itemsize)
        together = torch.cat([part.flatten().to(dtype) for part in flat])
        wait = self._exchange.start_sum(together)

        def end() -> tuple[list[list[Tensor]], list[Tensor]]:
            wait()
            split = torch.split(together, [part.numel() for part in flat])
            totals = iter(total.view_as(part).to(part.dtype) for total, part in zip(split, flat, strict=True))
            return [list(itertools.islice(totals, len(of_run))) for of_run in parts], list(totals)

        return end

    def _update(self, runs: Runs) -> None:
        """Orthogonalize, bucket by bucket, and let the rules go on to their ends."""
        exchange, queue = self._exchange, deque(runs)
        later: Callable[[], None] | None = None
        while queue:
            for number, results in exchange.map(queue, lambda k: self._directions(runs[k]), self._work(runs)):
                for place in list(results):  # no name keeps a polar factor for longer than its rule does
                    runs[number][place].take_polar(results.pop(place))
                if later is not None:
                    later()
                later = self._go_on(runs[number], number, queue)
                if not exchange.distributed:  # the results are there until the next
                    later()
                    later = None
            if later is not None:
                later()
                later = None

    def _directions(self, runs: Sequence[StackRun]) -> dict[int, Tensor]:
        """The directions N of a bucket's stacks, by place, in their wire dtype."""
        workspace, directions = self._exchange.workspace, {}
        for place, run in enumerate(runs):
            if not run.has_ended:
                shape = (run.stack.count, *run.stack.local_shape)
                directions[place] = workspace.take(shape, run.stack.parameters[0].wire_dtype, self._exchange.device)
                run.write_directions(directions[place])
        return directions

    def _go_on(self, runs: Sequence[StackRun], number: int, queue: deque[int]) -> Callable[[], None]:
        """Start the sums that a bucket's rules ask for after a polar factor; what is returned answers them.

        It is called when the next bucket has arrived: until then the all-reduce may queue behind an all-to-all.
        """
        asking = [run for run in runs if run.asks_for_sums]
        end = self._sums([run.parts() for run in asking])

        def go_on() -> None:
            for run, of_run in zip(asking, end()[0], strict=True):
                run.answer(of_run)
            waiting = asking
            while waiting:
                for run in waiting:
                    run.go_on()
                waiting = [run for run in waiting if run.asks_for_sums]
                self._answer(waiting)
            if not all(run.has_ended for run in runs):
                queue.appendleft(number)  # another polar factor

        return go_on

    def _work(self, runs: Runs) -> Callable[[int, dict[int, Tensor]], dict[int, Tensor]]:
        """What the exchange does with whole stored matrices: the polar factors of the true ones, stored alike."""

        def polar(number: int, whole: dict[int, Tensor]) -> dict[int, Tensor]:
            results: dict[int, Tensor] = {}
            by_group: dict[int, list[int]] = defaultdict(list)
            for place in whole:
                by_group[id(runs[number][place].stack.group)].append(place)
            for places in by_group.values():
                stacks = [runs[number][place].stack for place in places]
                group = stacks[0].group
                matrices = [
                    matrix
                    for place, stack in zip(places, stacks, strict=True)
                    for matrix in stack.layout.matrices(whole[place].view(stack.count, *stack.layout.stored))
                ]
                factors = iter(
                    orthogonalize(
                        matrices,
                        method=group["orthogonalizer"],
                        ns_steps=group["ns_steps"],
                        ns_coefficients=group["ns_coefficients"],
                        workspace=self._exchange.workspace,
                    )
                )
                for place, stack in zip(places, stacks, strict=True):
                    of_stack = [next(factors) for _ in stack.layout.blocks]
                    results[place] = stack.layout.store(of_stack)
                    for watcher in self._watchers:
                        watcher.sees(runs[number][place], of_stack)
            return results

        return polar

    @property
    def _exchange(self) -> Exchange:
        return self._prepare()[2] if self._prepared is None else self._prepared[2]

    def _start_from(self, states: list[dict[str, Any]]) -> None:
        """The momentum counts as the gradient of a first step, where the rule keeps numbers of what came before."""
        parameters, _, exchange = self._prepare()
        if any(requests.own_momentum for requests in self._requests.values()):
            raise ValueError(
                f"Expected {type(self).__name__} to average gradients, as what it is to take over does, but its rule "
                "averages something else. Start it anew, without adopt_state. "
                "Nothing was loaded."
            )
        runs = []
        tensors = [p for group in self.param_groups if group["orthogonalize"] for p in group["params"]]
        of_parameter = dict(zip(tensors, states, strict=True))
        gradients: dict[Tensor, Tensor] = {}
        for index, parameter in enumerate(parameters):
            requests = self._requests[id(parameter.group), parameter.layout.shape]
            if requests.starts_numbers:
                state = of_parameter[parameter.tensor]
                if parameter.tensor not in gradients:
                    gradients[parameter.tensor] = local_tensor(state["momentum_buffer"])
                    state["momentum_buffer"] = torch.zeros_like(state["momentum_buffer"])
                stack = self._stack([index], parameters, exchange, {parameter.tensor: state})
                stack.tolerance = None
                gradient = gradients[parameter.tensor]
                gradient = gradient if parameter.part is None else parameter.part.local(gradient)
                runs.append(StackRun(stack, self._ruled, requests, [gradient], exchange.workspace))
        with exchange.workspace.frame():
            self._leading_sums({0: runs}, [])
        for run in runs:
            with exchange.workspace.frame():
                self._directions([run])
            step = of_parameter[run.stack.parameters[0].tensor]["step"]
            step.copy_(step.bool() | (run.norm_sq > 0).any())


def _present(grads: Sequence[Tensor | None]) -> Iterator[tuple[int, int]]:
    """First and end of each row of gradients that are there."""
    first = 0
    for is_there, members in itertools.groupby(grads, key=lambda grad: grad is not None):
        end = first + sum(1 for _ in members)
        if is_there:
            yield first, end
        first = end
