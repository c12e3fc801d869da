"""`check_rule`: whether a rule of one's own trains on shards, in stacks and through checkpoints as on one process."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.trial import requests_of
from lightning_namo.testing.differences import Results, differences
from lightning_namo.testing.simulated_ranks import SimulatedRanks, ways_to_shard

_EXACT = 1e-7  # relative, in float64 with the exact polar factor: sums in another order, through some SVDs


def check_rule(
    cls: Callable[..., OrthogonalizedOptimizer],
    reference: Callable[..., Any] | None = None,
    *,
    rtol: float | None = None,
    processes: int = 1,
) -> None:
    """Check that a rule gives on every layout what it gives on one process; for a test of one's own.

    On this process, with the exact polar factor in float64: matrices beside others of their shape, stored transposed,
    and as blocks of one parameter; shards of every kind, of ranks that are simulated here; gradients that are missing,
    not finite or zero; checkpoints, copies and pickles (of a class at the top of a module); other groups; rates that
    change and are tensors; a thousandth step; bfloat16 and float32 weights.

    Args:
        cls: The class, or a partial of it with hyper-parameters.
        reference: What it should compute: an optimizer class of anybody's, called with a list of parameters, or a
            generator function, called with a weight (m, n) and an iterable of its gradients, that yields the weight
            after each step. The hyper-parameters are up to it.
        rtol: How far the updates may be from the reference's, relative to their norm. None: 1e-6 if ``cls`` takes the
            exact polar factor (``partial(cls, orthogonalizer="svd")``), else 0.05: Newton-Schulz in bfloat16.
        processes: 2 to 4: in that many processes (gloo, on the CPU), too, under DDP, FSDP1, FSDP2, HSDP and tensor
            parallelism as far as they go with that number. The class must be one that other processes can import.

    Raises:
        AssertionError: That says what broke.
        TypeError: If ``cls`` is no `OrthogonalizedOptimizer`.

    Example:
        >>> from lightning_namo import Muon
        >>> check_rule(Muon)
    """
    of = cls.func if isinstance(cls, partial) else cls
    if not isinstance(of, type) or not issubclass(of, OrthogonalizedOptimizer):
        raise TypeError(f"Expected check_rule to get a subclass of OrthogonalizedOptimizer but got {of!r}.")
    if inspect.unwrap(of.step) is not inspect.unwrap(OrthogonalizedOptimizer.step):
        raise TypeError(f"Expected {of.__name__} to be a rule, and to leave step to the engine, but it has its own.")
    _Checked(cls, of.__name__).everything()
    if reference is not None:
        _compare(cls, of.__name__, reference, rtol)
    if processes > 1:
        from lightning_namo.testing.processes import check_layouts

        check_layouts(cls, of.__name__, processes, _EXACT)


class _Checked:
    """The properties of a rule, each a method that raises an AssertionError.

    Rates, decays and the sizes of gradients change from step to step, as schedules and training change them.
    """

    shapes = ((5, 3), (3, 5), (4, 4))  # three matrices of each: as many as columns, in case somebody mixes the two up
    rates = (1.0, 0.5, 2.0, 0.25)  # by step, times the learning rate
    decays = (1.0, 2.0, 0.0, 0.5)
    sizes = (1.0, 1e3, 1e-3, 1.0)  # of gradients

    def __init__(self, cls: Callable[..., OrthogonalizedOptimizer], name: str) -> None:
        self.cls, self.name = cls, name
        self.of_shape(self.shapes[0])

    def of_shape(self, shape: tuple[int, int]) -> None:
        """Take matrices of another shape."""
        self.shape = shape
        self.weights = [_random(*shape, seed=i) for i in range(3)]
        self.grads = [
            [size * _random(*shape, seed=10 * step + i) for i in range(3)]
            for step, size in enumerate(self.sizes, start=1)
        ]

    def everything(self) -> None:
        """All properties."""
        self._try(self.trains, "takes steps on three matrices of one shape")
        self._try(self.repeats, "is run twice")
        self._try(self.goes_on_from_its_state, "goes on from its state")
        self._try(self.keeps_groups_apart, "trains two groups")
        for shape in self.shapes:
            self.of_shape(shape)
            for start in (0, 999):
                what = f"trains {shape} matrices from step {start + 1} on"
                self._try(partial(self.keeps_matrices_apart, start), what)
                self._try(partial(self.runs_on_shards, start), f"{what}, in shards")
        self.of_shape(self.shapes[0])
        self._try(self.knows_rows_from_columns, "trains matrices that are stored transposed")
        self._try(self.takes_blocks, "trains a parameter of several blocks")
        self._try(self.takes_batches, "trains a parameter of several experts")
        self._try(self.skips_unusable_gradients, "takes a step in which a gradient is missing, NaN or infinite")
        self._try(self.takes_tensors_as_rates, "takes steps with tensors as learning rate and weight decay")
        self._try(self.survives_zero_gradients, "takes steps with gradients of zero")
        self._try(self.takes_every_dtype, "takes steps on float32 and bfloat16 weights")

    # ------------------------------------------------------------------ properties

    def trains(self) -> None:
        """It runs, and changes weights and states."""
        together = self._train(self.weights, self.grads)
        for result, weight in zip(together, self.weights, strict=True):
            self._expect(_is_finite(result), "weights or states are not finite after ordinary gradients.")
            self._expect(
                not torch.equal(result["weight"], weight),
                "weights never change. A rule ends with x.apply(direction, step_size).",
            )
        for key in self._optimizer(self.weights)._kinds:
            self._expect(
                any(bool(result[key].any()) for result in together),
                f"x.{key} is zero after {len(self.rates)} steps. A state changes when it is assigned: x.{key} = ...",
            )

    def repeats(self) -> None:
        """The same gradients give the same."""
        self._same(
            self._train(self.weights, self.grads),
            self._train(self.weights, self.grads),
            0.0,
            "twice alike from the same start. What it computes may depend on gradients, states, hyper-parameters and "
            "x.step alone: not on random numbers, which differ between ranks, nor on anything outside x and h, which "
            "other matrices and other optimizers share. (Steps are counted by x.step.)",
        )

    def keeps_matrices_apart(self, start: int) -> None:
        """A matrix is trained beside others as alone, on CPUs and as on accelerators."""
        alone = [
            self._train([weight], [[of_step[i]] for of_step in self.grads], start)[0]
            for i, weight in enumerate(self.weights)
        ]
        together = self._train(self.weights, self.grads, start)
        why = (
            "beside other matrices of its shape as alone. Numbers are (K, 1, 1), (K, 1, n) or (K, m, 1) for K "
            "matrices: reduce over rows or columns only, with keepdim=True (r.mean(dim=-1, keepdim=True)), and keep "
            "nothing on self, for the rule runs once for each stack."
        )
        self._same(together, alone, _EXACT, why)
        batched = self._train(self.weights, self.grads, start, batched=True)
        self._same(batched, together, _EXACT, "on accelerators, where stacks wait for one another, as on a CPU. " + why)

    def keeps_groups_apart(self) -> None:
        """Matrices of another group, shape and learning rate change nothing."""
        wide, theirs = _random(2, 7, seed=30), [_random(2, 7, seed=31 + step) for step in range(len(self.rates))]
        (alone,) = self._train([wide], [[grad] for grad in theirs], factor=0.1)
        for batched in (None, True):
            optimizer = self._optimizer(self.weights, batched)
            other = nn.Parameter(wide.clone())
            optimizer.add_param_group({"params": [other]})
            for number, (grads, grad) in enumerate(zip(self.grads, theirs, strict=True)):
                self._schedule(optimizer, number)
                self._schedule(optimizer, number, 1, 0.1)
                other.grad = grad.clone()
                _step(optimizer, grads)
            found = {"weight": other.detach(), **optimizer.state[other]}
            self._same(
                [found, *_results(optimizer)],
                [alone, *self._train(self.weights, self.grads)],
                _EXACT,
                "beside another group as by itself. What a rule reads of hyper-parameters is in h, those of its group; "
                "keep nothing on self, for other groups and shapes take turns between its requests.",
                [wide, *self.weights],
            )

    def goes_on_from_its_state(self) -> None:
        """Checkpoints, copies and pickles hold all that a step needs."""
        ways: dict[str, Callable[[OrthogonalizedOptimizer], OrthogonalizedOptimizer]]
        ways = {"from its state dict": self._loaded, "as a copy": copy.deepcopy}
        if "<locals>" not in type(self._optimizer(self.weights)).__qualname__:
            ways["after pickling"] = lambda optimizer: pickle.loads(pickle.dumps(optimizer))
        for way, move in ways.items():
            optimizer = self._optimizer(self.weights)
            self._steps(optimizer, self.grads[:2])
            moved = move(optimizer)
            self._steps(moved, self.grads[2:], 2)
            self._same(
                _results(moved),
                self._train(self.weights, self.grads),
                0.0,
                f"that went on {way} as uninterrupted. All that a step needs of earlier ones must be in states that "
                'the class declares (state = {"v": "row"}), not on the optimizer or in variables; hyper-parameters are '
                "in h.",
            )

    def runs_on_shards(self, start: int) -> None:
        """Shards of every kind, of plain, transposed and fused matrices."""
        height = self.shape[0]
        kinds: dict[str, dict[str, Any]] = {
            "plain": {},
            "transposed": {"transposed": True},
            "fused": {"blocks": [height // 2, height - height // 2]},
        }
        for kind, keys in kinds.items():
            expected = self._train(self.weights, self.grads, start, **keys)
            for way, regions in ways_to_shard(*self.shape).items():
                ranks = SimulatedRanks(self._optimizer(self.weights, **keys), self.weights, regions)
                for stack in ranks.stacks:
                    stack.state["step"].add_(start)
                for number, grads in enumerate(self.grads):
                    self._schedule(ranks.optimizer, number)
                    ranks.step(grads)
                self._same(
                    ranks.gathered(),
                    expected,
                    _EXACT,
                    f"in shards, {way}, as whole ({kind} {self.shape} matrices). A rank has some of the elements: what "
                    "is made of them may not mix them (softmax, cumsum, sort, norms over a dimension); sums over a "
                    "matrix, its rows or its columns come from yield Sum(x.row_square_sum(...)); steps are counted by "
                    "x.step.",
                )

    def knows_rows_from_columns(self) -> None:
        """A matrix that is stored transposed (Conv1D) is trained alike."""
        transposed = self._train(
            [weight.T.contiguous() for weight in self.weights],
            [[grad.T.contiguous() for grad in of_step] for of_step in self.grads],
            transposed=True,
        )
        self._same(
            [{key: value.T if value.dim() == 2 else value for key, value in result.items()} for result in transposed],
            self._train(self.weights, self.grads),
            _EXACT,
            "stored transposed (Hugging Face's Conv1D) as stored plainly. Elements are laid out as they are stored: "
            "rows and columns are those of x.row_square_sum, x.column_square_sum and x.spread.",
        )

    def takes_blocks(self) -> None:
        """Blocks of one parameter, of one height or of several, are trained as matrices of their own."""
        for rows in ([5, 5, 5], [5, 2, 5]):
            weights = [weight[:height] for weight, height in zip(self.weights, rows, strict=True)]
            grads = [[grad[:height] for grad, height in zip(g, rows, strict=True)] for g in self.grads]
            apart = [self._train([w], [[of_step[i]] for of_step in grads])[0] for i, w in enumerate(weights)]
            (whole,) = self._train([torch.cat(weights)], [[torch.cat(of_step)] for of_step in grads], blocks=rows)
            parts = [
                {key: _of_block(value, i, rows, self._kind(key)) for key, value in whole.items()} for i in range(3)
            ]
            self._same(
                parts,
                apart,
                _EXACT,
                f"as blocks of {rows} rows of one parameter (fused q, k, v) as by itself. x ranges over the blocks, "
                "too, and x.shape is a block's.",
                weights,
            )

    def takes_batches(self) -> None:
        """Experts in one parameter are trained as matrices of their own, whole and in shards."""
        whole, grads = torch.stack(self.weights), [torch.stack(of_step) for of_step in self.grads]
        apart = [self._train([w], [[of_step[i]] for of_step in self.grads])[0] for i, w in enumerate(self.weights)]
        for batched in (None, True):
            optimizer = self._optimizer([whole], batched, experts=True)
            self._steps(optimizer, [[grad] for grad in grads])
            (found,) = _results(optimizer)
            parts = [{key: value if value.dim() == 0 else value[i] for key, value in found.items()} for i in range(3)]
            self._same(
                parts, apart, _EXACT, "as an expert among others in one parameter as by itself. x ranges over experts."
            )

    def skips_unusable_gradients(self) -> None:
        """A matrix without a usable gradient is left as it was, and no other feels it."""
        together = self._train(self.weights, self.grads)
        without = self._optimizer([self.weights[1]])
        for number in (0, 2, 3):
            self._steps(without, [[self.grads[number][1]]], number)
        others = [together[0], *_results(without), together[2]]
        *_, regions = ways_to_shard(*self.shape).values()
        for what, bad in (("is missing", None), ("is NaN", float("nan")), ("is infinite", float("inf"))):
            grads: list[list[Tensor | None]] = [list(of_step) for of_step in self.grads]
            grads[1][1] = None if bad is None else _with_one(self.grads[1][1], bad)
            why = (
                f"where the gradient of one matrix {what} in a step as without that step. What x.momentum, states and "
                "numbers tell of such a matrix is not finite or stale in that step: it must not reach other matrices, "
                "nor anything kept outside the states."
            )
            self._same(self._train(self.weights, grads), others, _EXACT, why)
            self._same(self._train(self.weights, grads, batched=True), others, _EXACT, why)
            ranks = SimulatedRanks(self._optimizer(self.weights), self.weights, regions)
            for number, of_step in enumerate(grads):
                hole = (2, 1) if bad is None and number == 1 else None
                self._schedule(ranks.optimizer, number)
                ranks.step(self.grads[number] if hole else of_step, absent=hole)
            self._same(ranks.gathered(), others, _EXACT, "in shards, " + why)

    def takes_tensors_as_rates(self) -> None:
        """As a captured step and some schedulers have them: read by no host."""
        optimizer = self._optimizer(self.weights)
        group, number = optimizer.param_groups[0], 0
        for number, grads in enumerate(self.grads):
            self._schedule(optimizer, number)
            for key in ("lr", "weight_decay"):
                group[key] = torch.tensor(group[key], dtype=torch.float64)
            _step(optimizer, grads)
        self._same(
            _results(optimizer),
            self._train(self.weights, self.grads),
            _EXACT,
            "with tensors as learning rate and weight decay as with floats. Compute with h.lr as it comes; do not "
            "convert it.",
        )
        parameter = optimizer._prepare()[0][0]
        rates = {key: torch.empty((), device="meta") for key in ("lr", "weight_decay")}
        requests_of(optimizer._ruled, optimizer._kinds, replace(parameter, group={**group, **rates}))

    def survives_zero_gradients(self) -> None:
        """Zero gradients, from the start and later, leave everything finite."""
        nothing = [torch.zeros_like(weight) for weight in self.weights]
        for grads in ([nothing] * 3, [self.grads[0], *[nothing] * 3], [nothing, *self.grads[:2]]):
            for result in self._train(self.weights, grads):
                self._expect(
                    _is_finite(result),
                    "weights or states are not finite after gradients of zero, as those of an unused layer are. "
                    "Divide by number + eps, or number.clamp(min=eps).",
                )

    def takes_every_dtype(self) -> None:
        """Weights of float32 and bfloat16, with the iteration that training takes."""
        for dtype in (torch.float32, torch.bfloat16):
            weights, grads = [w.to(dtype) for w in self.weights], [[g.to(dtype) for g in of] for of in self.grads]
            for result in self._train(weights, grads, orthogonalizer="newton_schulz"):
                self._expect(_is_finite(result), f"weights or states are not finite, with {dtype} weights.")

    # ------------------------------------------------------------------ inside

    def _optimizer(
        self,
        weights: Sequence[Tensor],
        batched: bool | None = None,
        orthogonalizer: str = "svd",
        experts: bool = False,
        **keys: Any,
    ) -> OrthogonalizedOptimizer:
        params = [nn.Parameter(weight.clone()) for weight in weights]
        optimizer = self.cls([{"params": params, "batched": experts, **keys}], orthogonalizer=orthogonalizer)
        optimizer.batched = batched
        self.base = {key: optimizer._matrix_defaults[key] for key in ("lr", "weight_decay")}
        return optimizer

    def _schedule(self, optimizer: OrthogonalizedOptimizer, number: int, group: int = 0, factor: float = 1.0) -> None:
        """Set a group's rates for a step, counted from 0."""
        rates = {"lr": factor * self.rates[number], "weight_decay": self.decays[number]}
        optimizer.param_groups[group].update({key: self.base[key] * rate for key, rate in rates.items()})

    def _steps(
        self,
        optimizer: OrthogonalizedOptimizer,
        grads: Sequence[Sequence[Tensor | None]],
        first: int = 0,
        factor: float = 1.0,
    ) -> None:
        for number, of_step in enumerate(grads, start=first):
            self._schedule(optimizer, number, factor=factor)
            _step(optimizer, of_step)

    def _train(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor | None]],
        start: int = 0,
        factor: float = 1.0,
        **keys: Any,
    ) -> Results:
        optimizer = self._optimizer(weights, **keys)
        for state in optimizer.state.values():
            state["step"] += start
        self._steps(optimizer, grads, factor=factor)
        return _results(optimizer)

    def _loaded(self, optimizer: OrthogonalizedOptimizer) -> OrthogonalizedOptimizer:
        """A new optimizer, built with another learning rate, that goes on from a checkpoint."""
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        base, other = self.base, {}
        if "lr" in inspect.signature(type(optimizer)).parameters:
            other["lr"] = 3 * base["lr"]
        params = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
        fresh = self.cls([{"params": params}], orthogonalizer="svd", **other)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        return fresh

    def _kind(self, key: str) -> str:
        kinds = self._optimizer(self.weights)._kinds
        return "element" if key in ("weight", "momentum_buffer") else kinds.get(key, "step")

    def _expect(self, condition: bool, what: str) -> None:
        if not condition:
            raise AssertionError(f"{self.name}: {what}")

    def _try(self, check: Callable[[], None], what: str) -> None:
        """Errors of the rule, and of the engine about it, with what was tried."""
        try:
            check()
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{self.name} fails when it {what}: {type(error).__name__}: {error}") from error

    def _same(
        self, actual: Results, expected: Results, tolerance: float, how: str, start: Sequence[Tensor] | None = None
    ) -> None:
        """Expect the same results; ``how`` ends "It is not trained ..."."""
        found = differences(actual, expected, start or self.weights, tolerance)
        self._expect(not found, f"a matrix is not trained {how} Of that matrix {found}.")


def _compare(
    cls: Callable[..., OrthogonalizedOptimizer], name: str, reference: Callable[..., Any], rtol: float | None
) -> None:
    """It computes what the reference computes."""
    for shape in ((6, 4), (4, 6), (5, 5)):
        probe = cls([nn.Parameter(_random(*shape))])
        is_exact = probe.param_groups[0]["orthogonalizer"] == "svd"
        dtype = torch.float64 if is_exact else torch.float32
        bound = rtol if rtol is not None else 1e-6 if is_exact else 0.05
        weight = _random(*shape, seed=9).to(dtype)
        grads = [_random(*shape, seed=20 + step).to(dtype) for step in range(4)]
        ours = _each_weight(cls, weight, grads)
        if inspect.isgeneratorfunction(reference):
            theirs = [w.detach().clone() for w in reference(weight.clone(), iter(grads))]
        else:
            theirs = _each_weight(reference, weight, grads)
        for step, (actual, expected) in enumerate(zip(ours, theirs, strict=True), start=1):
            off = float((actual - expected).norm() / (expected - weight).norm())
            if not off <= bound:
                raise AssertionError(
                    f"{name}: after step {step} of a {shape} matrix its update is {off:.1e} (relative) from the "
                    f"reference's, where {bound:.0e} is allowed. Compare step 1 by hand: the formula, or a "
                    "hyper-parameter whose default is another one there."
                )


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_one(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed[-1, -1] = value
    return changed


def _is_finite(result: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in result.values())


def _step(optimizer: torch.optim.Optimizer, grads: Sequence[Tensor | None]) -> None:
    for parameter, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        parameter.grad = None if grad is None else grad.clone()
    optimizer.step()


def _results(optimizer: OrthogonalizedOptimizer) -> Results:
    params = optimizer.param_groups[0]["params"]
    return [{"weight": p.detach().clone(), **{k: v.clone() for k, v in optimizer.state[p].items()}} for p in params]


def _each_weight(make: Callable[..., torch.optim.Optimizer], weight: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    parameter = nn.Parameter(weight.clone())
    optimizer, found = make([parameter]), []
    for grad in grads:
        _step(optimizer, [grad])
        found.append(parameter.detach().clone())
    return found


def _of_block(value: Tensor, block: int, rows: Sequence[int], kind: str) -> Tensor:
    """The part of a weight or a state of a parameter that is of one of its blocks."""
    first = sum(rows[:block])
    if kind == "element" or (kind == "row" and value.dim() == 1):
        return value[first : first + rows[block]]
    return value if kind == "step" else value[block]
