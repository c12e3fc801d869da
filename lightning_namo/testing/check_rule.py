"""`check_rule`: whether a rule of one's own trains on shards, in stacks and through checkpoints as on one process."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.testing.differences import Results, differences
from lightning_namo.testing.simulated_ranks import SimulatedRanks, ways_to_shard

_STEPS = 4
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
    not finite or zero; checkpoints, copies and pickles (of a class at the top of a module); a learning rate that is a
    tensor; bfloat16 and float32 weights.

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
    of = cls.func if isinstance(cls, functools.partial) else cls
    if not isinstance(of, type) or not issubclass(of, OrthogonalizedOptimizer):
        raise TypeError(f"Expected check_rule to get a subclass of OrthogonalizedOptimizer but got {of!r}.")
    rule = _Checked(cls, of.__name__)
    rule.trains()
    rule.repeats()
    rule.keeps_matrices_apart()
    rule.goes_on_from_its_state()
    rule.runs_on_shards()
    rule.knows_rows_from_columns()
    rule.takes_blocks()
    rule.skips_missing_and_infinite_gradients()
    rule.takes_a_tensor_as_learning_rate()
    rule.survives_zero_gradients()
    rule.takes_every_dtype()
    if reference is not None:
        rule.equals(reference, rtol)
    if processes > 1:
        from lightning_namo.testing.processes import check_layouts

        check_layouts(cls, of.__name__, processes, _EXACT)


class _Checked:
    """The properties of a rule, each a method that raises an AssertionError."""

    shape = (5, 3)  # as many matrices as columns, in case somebody mixes the two up

    def __init__(self, cls: Callable[..., OrthogonalizedOptimizer], name: str) -> None:
        self.cls, self.name = cls, name
        self.weights = [_random(*self.shape, seed=i) for i in range(3)]
        self.grads = [[_random(*self.shape, seed=10 * step + i) for i in range(3)] for step in range(1, _STEPS + 1)]

    # ------------------------------------------------------------------ properties

    def trains(self) -> None:
        """It runs, and changes weights."""
        with self._running("takes steps on three matrices of one shape"):
            self.together = self._train(self.weights, self.grads)
        for result, weight in zip(self.together, self.weights, strict=True):
            self._expect(_is_finite(result), "weights or states are not finite after ordinary gradients.")
            self._expect(
                not torch.equal(result["weight"], weight),
                "weights never change. A rule ends with x.apply(direction, step_size).",
            )

    def repeats(self) -> None:
        """The same gradients give the same."""
        again = self._train(self.weights, self.grads)
        self._same(
            again,
            self.together,
            0.0,
            "twice alike from the same start. What it computes may depend on gradients, states, hyper-parameters and "
            "x.step alone: not on random numbers, which differ between ranks, nor on anything outside x and h, which "
            "other matrices and other optimizers share. (Steps are counted by x.step.)",
        )

    def keeps_matrices_apart(self) -> None:
        """A matrix is trained beside others as alone."""
        alone = [
            self._train([weight], [[of_step[i]] for of_step in self.grads])[0] for i, weight in enumerate(self.weights)
        ]
        why = (
            "beside other matrices of its shape as alone. Numbers are (K, 1, 1), (K, 1, n) or (K, m, 1) for K "
            "matrices: reduce over rows or columns only, with keepdim=True (r.mean(dim=-1, keepdim=True)), and keep "
            "nothing on self, for the rule runs once for each stack."
        )
        self._same(self.together, alone, _EXACT, why)
        batched = self._train(self.weights, self.grads, batched=True)
        self._same(
            batched, self.together, _EXACT, "on accelerators, where stacks wait for one another, as on a CPU. " + why
        )

    def knows_rows_from_columns(self) -> None:
        """A matrix that is stored transposed (Conv1D) is trained alike."""
        transposed = self._train(
            [weight.T.contiguous() for weight in self.weights],
            [[grad.T.contiguous() for grad in of_step] for of_step in self.grads],
            transposed=True,
        )
        back = [{key: value.T if value.dim() == 2 else value for key, value in result.items()} for result in transposed]
        self._same(
            back,
            self.together,
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
            stacked = [[torch.cat(of_step)] for of_step in grads]
            with self._running(f"takes steps on a parameter of blocks of {rows} rows"):
                (whole,) = self._train([torch.cat(weights)], stacked, blocks=rows)
            parts = [
                {key: _of_block(value, i, rows, self._kind(key)) for key, value in whole.items()} for i in range(3)
            ]
            self._same(
                parts,
                apart,
                _EXACT,
                f"as blocks of {rows} rows of one parameter (fused q, k, v) as by itself. x ranges over the blocks, "
                "too, and x.shape is a block's.",
                start=weights,
            )

    def runs_on_shards(self) -> None:
        """Shards of every kind, of plain, transposed and fused matrices."""
        for keys in ({}, {"transposed": True}, {"blocks": [2, 2, 1]}):
            expected = self._train(self.weights, self.grads, **keys)
            for way, regions in ways_to_shard(*self.shape).items():
                optimizer = self._optimizer(self.weights, **keys)
                with self._running(f"takes steps on shards: {way}"):
                    ranks = SimulatedRanks(optimizer, self.weights, regions)
                    for grads in self.grads:
                        ranks.step(grads)
                    found = ranks.gathered()
                self._same(
                    found,
                    expected,
                    _EXACT,
                    f"in shards, {way}, as whole. A rank has some of the elements: what is made of them may not mix "
                    "them (softmax, cumsum, sort, norms over a dimension); sums over a matrix, its rows or its columns "
                    "come from yield Sum(x.row_square_sum(...)).",
                )

    def skips_missing_and_infinite_gradients(self) -> None:
        """A matrix without a usable gradient is left as it was, and no other feels it."""
        expected = self._train([self.weights[1]], [[g[1]] for i, g in enumerate(self.grads) if i != 1])
        others = [self.together[0], expected[0], self.together[2]]
        for what, bad in (("is missing", None), ("is NaN", float("nan")), ("is infinite", float("inf"))):
            grads: list[list[Tensor | None]] = [list(of_step) for of_step in self.grads]
            grads[1][1] = None if bad is None else _with_one(self.grads[1][1], bad)
            why = (
                f"where the gradient of one matrix {what} in a step as without that step. What x.momentum, states and "
                "numbers tell of such a matrix is not finite or stale in that step: it must not reach other matrices, "
                "nor anything kept outside the states."
            )
            with self._running(f"takes a step in which a gradient {what}"):
                self._same(self._train(self.weights, grads), others, _EXACT, why)
                self._same(self._train(self.weights, grads, batched=True), others, _EXACT, why)
                ranks = SimulatedRanks(
                    self._optimizer(self.weights), self.weights, ways_to_shard(*self.shape).popitem()[1]
                )
                for step, of_step in enumerate(grads):
                    hole = (2, 1) if bad is None and step == 1 else None
                    ranks.step(self.grads[step] if hole else of_step, absent=hole)
                self._same(ranks.gathered(), others, _EXACT, "in shards, " + why)

    def goes_on_from_its_state(self) -> None:
        """Checkpoints, copies and pickles hold all that a step needs."""
        with self._running("saves and loads its state"):
            ways: dict[str, Callable[[OrthogonalizedOptimizer], OrthogonalizedOptimizer]]
            ways = {"from its state dict": self._loaded, "as a copy": copy.deepcopy}
            if "<locals>" not in type(self._optimizer(self.weights)).__qualname__:
                ways["after pickling"] = lambda optimizer: pickle.loads(pickle.dumps(optimizer))
            for way, move in ways.items():
                optimizer = self._optimizer(self.weights)
                for grads in self.grads[:2]:
                    _step(optimizer, grads)
                moved = move(optimizer)
                for grads in self.grads[2:]:
                    _step(moved, grads)
                self._same(
                    _results(moved),
                    self.together,
                    0.0,
                    f"that went on {way} as uninterrupted. All that a step needs of earlier ones must be in states "
                    'that the class declares (state = {"v": "row"}), not on the optimizer or in variables.',
                )

    def takes_a_tensor_as_learning_rate(self) -> None:
        """As a captured step and some schedulers have it."""
        optimizer = self._optimizer(self.weights)
        group = optimizer.param_groups[0]
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        with self._running("takes steps with a tensor as learning rate"):
            for grads in self.grads:
                _step(optimizer, grads)
        self._same(
            _results(optimizer),
            self.together,
            _EXACT,
            "with its learning rate as a tensor as with a float. Compute with h.lr as it comes; do not convert it.",
        )

    def survives_zero_gradients(self) -> None:
        """Zero gradients, from the start and later, leave everything finite."""
        nothing = [torch.zeros_like(weight) for weight in self.weights]
        with self._running("takes steps with gradients of zero"):
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
            with self._running(f"takes steps on {dtype} weights with Newton-Schulz"):
                weights, grads = [w.to(dtype) for w in self.weights], [[g.to(dtype) for g in of] for of in self.grads]
                results = self._train(weights, grads, orthogonalizer="newton_schulz")
            for result in results:
                self._expect(_is_finite(result), f"weights or states are not finite, with {dtype} weights.")

    def equals(self, reference: Callable[..., Any], rtol: float | None) -> None:
        """It computes what the reference computes."""
        for shape in ((6, 4), (4, 6), (5, 5)):
            probe = self.cls([nn.Parameter(_random(*shape))])
            is_exact = probe.param_groups[0]["orthogonalizer"] == "svd"
            dtype = torch.float64 if is_exact else torch.float32
            bound = rtol if rtol is not None else 1e-6 if is_exact else 0.05
            weight = _random(*shape, seed=9).to(dtype)
            grads = [_random(*shape, seed=20 + step).to(dtype) for step in range(_STEPS)]
            ours = _each_weight(self.cls, weight, grads)
            if inspect.isgeneratorfunction(reference):
                theirs = [w.detach().clone() for w in reference(weight.clone(), iter(grads))]
            else:
                theirs = _each_weight(reference, weight, grads)
            for step, (actual, expected) in enumerate(zip(ours, theirs, strict=True), start=1):
                off = float((actual - expected).norm() / (expected - weight).norm())
                self._expect(
                    off <= bound,
                    f"after step {step} of a {shape} matrix its update is {off:.1e} (relative) from the reference's, "
                    f"where {bound:.0e} is allowed. Compare step 1 by hand: the formula, or a hyper-parameter whose "
                    "default is another one there.",
                )

    # ------------------------------------------------------------------ inside

    def _optimizer(
        self, weights: Sequence[Tensor], batched: bool | None = None, orthogonalizer: str = "svd", **keys: Any
    ) -> OrthogonalizedOptimizer:
        params = [nn.Parameter(weight.clone()) for weight in weights]
        optimizer = self.cls([{"params": params, **keys}], orthogonalizer=orthogonalizer)
        optimizer.batched = batched
        return optimizer

    def _train(self, weights: Sequence[Tensor], grads: Sequence[Sequence[Tensor | None]], **keys: Any) -> Results:
        optimizer = self._optimizer(weights, **keys)
        for of_step in grads:
            _step(optimizer, of_step)
        return _results(optimizer)

    def _loaded(self, optimizer: OrthogonalizedOptimizer) -> OrthogonalizedOptimizer:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        fresh = self._optimizer([p.detach() for p in optimizer.param_groups[0]["params"]])
        fresh.load_state_dict(torch.load(file, weights_only=True))
        return fresh

    def _kind(self, key: str) -> str:
        kinds = self._optimizer(self.weights)._kinds
        return "element" if key in ("weight", "momentum_buffer") else kinds.get(key, "step")

    def _expect(self, condition: bool, what: str) -> None:
        if not condition:
            raise AssertionError(f"{self.name}: {what}")

    @contextmanager
    def _running(self, what: str) -> Iterator[None]:
        """Errors of the rule, and of the engine about it, with what was tried."""
        try:
            yield
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
