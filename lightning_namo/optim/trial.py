"""A rule tried without memory, on the meta device: what it asks for in a step, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_namo.optim.elements import Elements
from lightning_namo.optim.formulas import HyperParameters
from lightning_namo.optim.rule import Matrices, Polar, Rule, Sum
from lightning_namo.optim.run import Answers, Requests, hyper_parameters, kind_of
from lightning_namo.optim.stack import MatrixParameter, MatrixStack, StateKind, momentum_dtype, statistics_dtype
from lightning_namo.workspace import Workspace

_MOST_REQUESTS = 100
RuleOf = Callable[[Matrices, HyperParameters], Rule]


@dataclass(frozen=True)
class Scratch:
    """The most bytes that a rule takes beside weights, gradients, state and what is sent, per element of a shard.

    Attributes:
        leading: Before its first polar factor's directions are asked for.
        directing: While it makes the directions.
        held: From then on until the polar factor is there.
        applied: After a polar factor, to the next request or the end.
        waiting: While it waits for sums after a polar factor, beside the factor; 0 if it asks for none.
    """

    leading: float
    directing: float
    held: float
    applied: float
    waiting: float


def requests_of(rule: RuleOf, kinds: Mapping[str, StateKind], parameter: MatrixParameter) -> Requests:
    """What a rule asks for in a step of a parameter.

    Raises:
        TypeError: If the rule is not a generator, or yields something else than `Sum` and `Polar`.
        ValueError: If it asks for no polar factor, or does not end.
        Exception: Whatever the rule itself raises.
    """
    trials = [_Trial(rule, kinds, parameter, 1, part) for part in range(len(set(parameter.layout.blocks)))]
    for trial in trials:
        trial.run()
        if trial.asked != trials[0].asked:
            raise ValueError(
                f"Expected the rule of {trial.name} to ask for the same of all blocks of {parameter.name}, but it asks "
                f"for {', '.join(trials[0].asked)} of some and for {', '.join(trial.asked)} of others."
            )
    sums = [sum(of_part) for of_part in zip(*(trial.sums for trial in trials), strict=True)]
    first = all(trial.sums_first for trial in trials)
    own_momentum = "momentum of its own" in trials[0].x._written
    return Requests(tuple(trials[0].asked), tuple(sums), first, trials[0].starts_numbers, own_momentum)


def scratch_of(
    rule: RuleOf, kinds: Mapping[str, StateKind], parameter: MatrixParameter, count: int, on_cpu: bool
) -> Scratch:
    """What memory a rule takes for a stack of so many parameters like one."""
    trial = _Trial(rule, kinds, parameter, count, 0)
    trial.x.__dict__.update(_on_cpu=on_cpu, _in_one=trial.x._in_one or (on_cpu and count > 1))
    trial.memory = _Memory()
    trial.x.__dict__["_readings"] = None
    trial.run()
    first, ends = trial.asked.index("polar"), [*trial.asked, "the end"]  # what each phase comes to
    lives = list(zip(ends, trial.lives, strict=True))
    numbers = (
        max(trial.peaks[:first], default=0),
        trial.peaks[first],
        max(live for end, live in lives if end == "polar"),
        max(trial.peaks[first + 1 :]),
        max((live for end, live in lives[first + 1 :] if end == "sum"), default=0),
    )
    numel = trial.x._stack.state["momentum_buffer"].numel()
    return Scratch(*(number / max(numel, 1) for number in numbers))


class _Trial:
    """A rule that goes from request to request, each answered by tensors without memory."""

    def __init__(
        self, rule: RuleOf, kinds: Mapping[str, StateKind], parameter: MatrixParameter, count: int, part: int
    ) -> None:
        self.name = parameter.group.get("algorithm", "the optimizer")
        self._owner = getattr(rule, "__self__", None)
        self._before = dict(vars(self._owner)) if self._owner is not None else {}
        stack = _stack_like(kinds, parameter, count)
        grads = [torch.empty_like(member.tensor) for member in stack.parameters]
        self.x = Matrices(stack, stack.block_sets[part], grads, Workspace())
        self.x._decided(*torch.ones(2, count, dtype=torch.bool, device="meta"))
        self.steps = rule(self.x, hyper_parameters(parameter.group))
        if not isinstance(self.steps, Generator):
            raise TypeError(f"Expected the rule of {self.name} to be a generator: O = yield Polar(x.advance(h)).")
        self.x.__dict__["_readings"] = {}  # mistakes in them are told now
        self.memory: _Memory | None = None
        self.asked: list[str] = []
        self.sums: list[int] = []
        self.peaks: list[int] = []  # of each phase: before each request, and after the last
        self.lives: list[int] = []
        self.sums_first = self.starts_numbers = False
        self._wire = parameter.wire_dtype

    def run(self) -> None:
        answer: Any = None
        while (request := self._next(answer)) is not None:
            answer = self._answer(request)
            if len(self.asked) > _MOST_REQUESTS:
                raise ValueError(
                    f"Expected the rule of {self.name} to end, but it has asked for {len(self.asked)} sums and polar "
                    "factors."
                )
        for key, value in vars(self._owner).items() if self._owner is not None else ():
            if value is not self._before.get(key) and isinstance(value, Elements | Tensor):
                rows, columns = (1, 1, *value.shape)[-2:] if isinstance(value, Tensor) else (2, 2)
                numbers = "column" if columns > 1 else "row" if rows > 1 else "matrix"
                kind = "element" if min(rows, columns) > 1 else numbers
                raise ValueError(
                    f"Expected the rule of {self.name} to keep nothing on self, since all stacks share self and "
                    f"checkpoints do not save it. Got self.{key}: declare it, state = {{'{key}': '{kind}'}}, and use "
                    f"x.{key}, or log it, x.report({key}=...)."
                )
        if "polar" not in self.asked:
            raise ValueError(
                f"Expected the rule of {self.name} to ask for a polar factor (O = yield Polar(x.advance(h))), but it "
                f"asks for {' and '.join(self.asked) or 'nothing'}. What needs none is AdamW's: orthogonalize=False."
            )

    def _next(self, answer: Any) -> Sum | Polar | None:
        x, sent = self.x, torch.empty_like(self.x._stack.state["momentum_buffer"], dtype=self._wire)
        x._resume(bool(self.asked) and "polar" not in self.asked)
        with self.memory or nullcontext():
            try:
                request = self.steps.send(answer)
            except StopIteration:
                request = None
            except (NotImplementedError, RuntimeError) as error:
                if "device meta" in str(error):
                    raise TypeError(
                        f"Expected the rule of {self.name} to make tensors on the device of the matrices: "
                        f"device=x.step.device. ({error})"
                    ) from error
                if "meta tensor" not in str(error):
                    raise
                raise TypeError(
                    f"Expected the rule of {self.name} to read no number on the host (if, float(), .item()), for a "
                    "step waits for no device. Let what it asks for depend on hyper-parameters and shapes alone, and "
                    f"choose between numbers with torch.where. ({error})"
                ) from error
            if isinstance(request, Polar):
                request.direction.write(sent)
                request.direction = Elements.having(x, sent)  # gone once it was sent
            x._resume()
        if self.memory is not None:
            self.peaks.append(self.memory.peak)
            self.memory.peak = self.memory.live()
            self.lives.append(self.memory.peak)
        if request is not None:
            self.asked.append(kind_of(request))
        return request

    def _answer(self, request: Sum | Polar) -> Any:
        kinds, x = self.x._stack.kinds, self.x
        if isinstance(request, Polar):
            if self.asked.count("polar") == 1:
                self.starts_numbers = any(kinds.get(key, "element") != "element" for key in x._written)
            self.sums.append(0)
            shards = torch.empty_like(x._stack.state["momentum_buffer"], dtype=self._wire)
            return Elements.having(x, shards, is_finite=True)
        if len(self.asked) == 1:
            self.sums_first = not x._written and any(part.of_gradient for part in request.parts)
        self.sums.append(sum(part.tensor.numel() for part in request.parts))
        return Answers(part.tensor for part in request.parts)


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of the tensors that are made under it, as long as somebody holds them, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._made[storage._cdata] = weak, storage.nbytes()
        self.peak = max(self.peak, self.live())
        return out

    def live(self) -> int:
        """Bytes that are held now."""
        gone = [key for key, (weak, _) in self._made.items() if weak.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._made[key]
        return sum(size for _, size in self._made.values())


def _stack_like(kinds: Mapping[str, StateKind], parameter: MatrixParameter, count: int) -> MatrixStack:
    """A stack of parameters like one, without memory."""
    layout, dtype = parameter.layout, statistics_dtype(parameter.tensor)
    shard = torch.empty_like(parameter.local(parameter.tensor), device="meta")
    shard = shard if parameter.part is None else shard[0]
    state = {key: torch.empty(count, dtype=dtype, device="meta") for key in ("step", "skipped")}
    shape, of = (count, *shard.shape), momentum_dtype(parameter.group) or shard.dtype
    state["momentum_buffer"] = torch.empty(shape, dtype=of, device="meta")
    for key, kind in kinds.items():
        sizes = shape if kind == "element" else (count, *layout.statistic_shape(kind))
        state[key] = torch.empty(sizes, dtype=dtype, device="meta")
    members = [MatrixParameter(parameter.name, torch.empty_like(shard), parameter.group, layout) for _ in range(count)]
    return MatrixStack(members, kinds, True, 0, None, None, state)
