"""One step of one stack: its rule, resumed by the engine when what it asked for is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_namo.optim.elements import Elements
from lightning_namo.optim.elements import kind_of as what
from lightning_namo.optim.formulas import HyperParameters
from lightning_namo.optim.rule import Matrices, Polar, Rule, Sum
from lightning_namo.optim.stack import MatrixStack
from lightning_namo.sharding.local import sum_of_squares
from lightning_namo.workspace import Workspace


@dataclass(frozen=True)
class Requests:
    """What a rule asks for in a step, in order.

    Attributes:
        kinds: "sum" or "polar" for each request.
        sums: How many numbers of a parameter each request sums; 0 for a polar factor.
        starts_numbers: Whether it writes a number (a state that is none of elements) before its first polar factor.
        own_momentum: Whether it averages something else than gradients.
        sums_first: Whether its first request sums squares of the gradient, before anything is written: these tell
            which gradients are finite.
    """

    kinds: tuple[str, ...]
    sums: tuple[int, ...]
    sums_first: bool
    starts_numbers: bool
    own_momentum: bool

    @property
    def leading(self) -> int:
        """How many sums it asks for before its first polar factor."""
        return self.kinds.index("polar")


@dataclass(frozen=True)
class Reading:
    """What a rule has reported of some blocks of a stack's parameters; NaN where a matrix was skipped.

    Attributes:
        stack: The matrices.
        blocks: Which blocks, of one shape.
        name: That the rule gave it.
        number: (K, 1, 1), (K, 1, n) or (K, m, 1).
    """

    stack: MatrixStack
    blocks: Sequence[int]
    name: str
    number: Tensor

    def write(self, found: dict[Tensor, dict[str, Tensor]]) -> None:
        """Write it among those of all matrices of each parameter, (matrices, blocks, 1 or m or n), by name."""
        stack, part = self.stack, self.stack.part
        rows, columns = self.number.shape[1:]
        width = max(m for m, _ in stack.layout.matrix_shapes) if rows > 1 else columns
        count, first = (1, 0) if part is None else (part.of.count, part.first)
        values = self.number.view(stack.count, len(self.blocks), rows * columns)
        for place, parameter in enumerate(stack.parameters):
            of_parameter, own = found.setdefault(parameter.tensor, {}), values if part else values[place : place + 1]
            whole = values.new_full((count, len(stack.layout.blocks), width), math.nan)
            if (before := of_parameter.get(self.name)) is not None:  # other blocks, or experts
                whole = before if before.shape[2] >= width else whole
                whole[..., : before.shape[2]] = before
            of_parameter[self.name] = whole
            for block, value in zip(self.blocks, own.unbind(1), strict=True):
                whole[first : first + len(own), block, : rows * columns].copy_(value)


class StackRun:
    """A rule at work on a stack.

    Args:
        stack: The matrices.
        rule: Of the optimizer.
        requests: What the rule asks for.
        grads: The local gradients of the stack's parameters.
        workspace: For what is needed for a moment.
        keeps_readings: Whether the rule's readings are kept.
    """

    def __init__(
        self,
        stack: MatrixStack,
        rule: Callable[[Matrices, HyperParameters], Rule],
        requests: Requests,
        grads: Sequence[Tensor | None],
        workspace: Workspace,
        keeps_readings: bool = False,
    ) -> None:
        self.stack, self.requests, self._grads, self._workspace = stack, requests, grads, workspace
        h = hyper_parameters(stack.group)
        self._xs = [Matrices(stack, blocks, grads, workspace) for blocks in stack.block_sets]
        if keeps_readings:
            for x in self._xs:
                x.__dict__["_readings"] = {}
        self._rules = [rule(x, h) for x in self._xs]
        self._asked: list[Sum | Polar] = []
        self._answers: list[Any] | None = None
        self._leading = self.leading_left = requests.leading  # sums to be answered before the first polar factor
        self.has_ended = False
        self._held: Tensor | None = None
        self._resumed = 0
        self._valid = self._invalid = self._skipped = self.norm_sq = torch.empty(0)  # (P,): see `decide`
        self._present: Tensor | None = None

    @property
    def asks_for_sums(self) -> bool:
        """Whether the rule waits for sums."""
        return bool(self._asked) and isinstance(self._asked[0], Sum)

    @property
    def asks_for_polar(self) -> bool:
        """Whether the rule waits for a polar factor."""
        return bool(self._asked) and isinstance(self._asked[0], Polar)

    # ------------------------------------------------------------------ validity

    def gradient_parts(self) -> list[Tensor]:
        """This rank's part of the sums that tell whether the gradients are valid; see `decide`."""
        with self._workspace.frame():
            if self.requests.sums_first:
                self._resume()
                parts = self.parts()
            else:
                parts = [x.square_sum(x.grad).tensor for x in self._xs]
            self._forget()
        stack, has_elements = self.stack, self.stack.layout.region.numel > 0
        if stack.holders is None:
            return parts
        found = [grad is not None and has_elements for grad in self._grads]
        present = torch.ones_like(stack.holders)
        if not all(found):  # no list becomes a tensor: the device would wait for it
            one, none = present[0], torch.zeros_like(present[0])
            present = torch.stack([one if has else none for has in found]).expand_as(present)
        if not stack.has_replicas:
            return [*parts, present]
        norm_sq = self._own_norm_sq() if any(found) else torch.zeros_like(present)
        if not stack.counts:  # the gradient of another replica enters the sums; this rank's only its own momentum
            present = torch.where(norm_sq.isfinite(), present, present / 2)  # half: not valid
        return [*parts, present, norm_sq.double() * stack.weight]

    def decide(self, totals: Sequence[Tensor]) -> Tensor | None:
        """Decide which matrices are valid, from the sums over all ranks of `gradient_parts`.

        Gradients are valid that are there on all ranks, finite, and small enough for the iteration, which takes
        ``||N||^2`` in float32: a larger one would be infinite there, and N a zero matrix.

        Returns:
            Where there are replicas: which of them have another gradient than others, (P,).
        """
        stack, P = self.stack, self.stack.count
        flags = (stack.holders is not None) + stack.has_replicas
        sums = [total.reshape(P, total.numel() // P) for total in totals[: len(totals) - flags]]
        places = self._gradient_positions()
        of_gradient = [sums[i].sum(dim=1) if sums[i].shape[1] != 1 else sums[i].view(P) for i in places]
        self.norm_sq = norm_sq = torch.stack(of_gradient).sum(dim=0) if len(of_gradient) > 1 else of_gradient[0]
        largest = torch.finfo(stack.statistics_dtype).max
        if stack.group["orthogonalizer"] == "newton_schulz":
            largest = torch.finfo(torch.float32).max / 2  # N is rounded to bfloat16 first
        valid = norm_sq <= largest
        if stack.holders is not None:
            present = totals[len(sums)]
            valid &= present == stack.holders
        for place, total in enumerate(sums):  # sums of squares: none is below 0
            if place not in places:
                finite = total < math.inf
                valid &= finite.all(dim=1) if finite.shape[1] != 1 else finite.view(P)
        self._valid, self._invalid = valid, ~valid
        self._present = None if stack.holders is None else present > 0
        self._skipped = self._invalid if self._present is None else self._present & self._invalid
        for x in self._xs:
            x._decided(valid, self._invalid)
        if stack.tolerance is None:
            return None
        return valid & (totals[-1].abs() > stack.tolerance * norm_sq)

    @staticmethod
    def agree(runs: Sequence[StackRun]) -> None:
        """Let the matrices of a batched parameter be valid together or not at all.

        Args:
            runs: Of all its parts.
        """
        valid = torch.stack([run._valid.all() for run in runs]).all()
        present = [run._present.any() for run in runs if run._present is not None]
        skipped = torch.stack(present).any() & ~valid if present else ~valid
        for run in runs:
            run._valid, run._invalid, run._skipped = (t.expand(run.stack.count) for t in (valid, ~valid, skipped))
            for x in run._xs:
                x._decided(run._valid, run._invalid)

    def _gradient_positions(self) -> list[int]:
        """Where the sums of the gradient are among those of the first request: one of each x."""
        if not self.requests.sums_first:
            return list(range(len(self._xs)))
        positions, start = [], 0
        for asked in self._asked:
            assert isinstance(asked, Sum)
            positions.append(start + [part.of_gradient for part in asked.parts].index(True))
            start += len(asked.parts)
        return positions

    def _own_norm_sq(self) -> Tensor:
        """``||G||^2`` of this rank's shards, (P,), added up alike on all replicas."""
        with self._workspace.frame():
            gradients, layout = self._xs[0].grad.stacked(), self.stack.layout
            if len(layout.blocks) == 1:
                norm_sq = sum_of_squares(gradients, self.stack.statistics_dtype)
            else:
                parts = layout.sums_of_squares(gradients, "matrix", self.stack.statistics_dtype)
                norm_sq = torch.cat([part.view(-1, 1) for part in parts], dim=1).sum(dim=1)
            self._forget()
        return norm_sq

    # ------------------------------------------------------------------ requests and answers

    def parts(self) -> list[Tensor]:
        """This rank's part of the sums that the rule waits for; zeros where another replica's counts."""
        return [part.tensor for asked in self._asked if isinstance(asked, Sum) for part in asked.parts]

    def answer(self, totals: Sequence[Tensor]) -> None:
        """Keep the sums that the rule waits for; it goes on with them in `write_directions` or `go_on`.

        Where a matrix is not valid they may not be finite: what the rule writes, applies and sends is masked.
        """
        left, self._answers = iter(totals), []  # of which the first ones are the sums
        self.leading_left -= 1
        for asked in self._asked:
            assert isinstance(asked, Sum)
            self._answers.append(Answers(next(left) for _ in asked.parts))

    def go_on(self) -> None:
        """Let the rule go on with its answers."""
        with self._workspace.frame():
            self._resume(self._answers)
            self._hold()
            self._forget()

    def take_polar(self, polar: Tensor) -> None:
        """Let the rule go on with the polar factors, (P, elements)."""
        if "polar" in self.requests.kinds[self._resumed :]:  # alone, it is in memory that the next round takes
            polar = polar.clone()
        shards = polar.view(self.stack.count, *self.stack.local_shape)
        is_own = len(self._xs) == 1  # else all blocks are in it
        with self._workspace.frame():
            self._resume([Elements.having(x, shards, is_own=is_own, is_finite=True) for x in self._xs])
            self._hold()
            self._forget()

    def write_directions(self, out: Tensor) -> None:
        """Let the rule go on to a polar factor, and write the directions N that it gives to a tensor (P, ...)."""
        if self._held is not None:
            out.copy_(self._held)
            self._held = None
            return
        with self._workspace.frame():
            self._resume(self._answers)
            self._write(out)
            self._forget()

    def _hold(self) -> None:
        """Keep directions that are sent in the bucket's next round."""
        if self.asks_for_polar:
            parameter = self.stack.parameters[0]
            shape = (self.stack.count, *self.stack.local_shape)
            self._held = torch.empty(shape, dtype=parameter.wire_dtype, device=self.stack.device)
            self._write(self._held)

    def _write(self, out: Tensor) -> None:
        directions = [asked.direction for asked in self._asked if isinstance(asked, Polar)]
        directions[0].write(out)
        for x, direction in zip(self._xs[1:], directions[1:], strict=True):  # blocks of other shapes
            own = x._laid_out(torch.ones_like(x.step), 0) > 0
            out.copy_(torch.where(own, direction.stacked().to(out.dtype), out))
        if not all(direction.is_finite for direction in directions):
            out.masked_fill_(self._invalid.view(-1, *(1 for _ in out.shape[1:])), 0)
        self._asked = []  # their memory is free

    def _forget(self) -> None:
        for x in self._xs:
            x._forget()

    def _resume(self, answers: Sequence[Any] | None = None) -> None:
        self._asked, ended = [], 0
        for place, (x, rule) in enumerate(zip(self._xs, self._rules, strict=True)):
            x._resume(0 < self._resumed <= self._leading)
            try:
                self._asked.append(rule.send(None if answers is None else answers[place]))
            except StopIteration:
                ended += 1
        kind = "the end" if ended else kind_of(self._asked[0])
        expected = (*self.requests.kinds, "the end")[self._resumed]
        if kind != expected or ended not in (0, len(self._xs)):
            raise RuntimeError(
                f"Expected the rule of {self.stack.group.get('algorithm')} to ask for the same in every step, and in "
                f"all blocks of a parameter: {expected} came before at this place, and {kind} now. Let what it asks "
                "for depend on hyper-parameters and shapes alone."
            )
        self._resumed += 1
        if ended:
            self.has_ended = True
            if self.stack.part is None:
                self.stack.state["step"] += self._valid
                self.stack.state["skipped"] += self._skipped

    def readings(self) -> list[Reading]:
        """What the rule has reported, once it has ended."""
        return [
            Reading(self.stack, blocks, name, number.masked_fill(x._of_parameters(self._invalid), math.nan))
            for x, blocks in zip(self._xs, self.stack.block_sets, strict=True)
            for name, number in (x._readings or {}).items()
        ]

    def count_step(self) -> None:
        """Count the step of a batched parameter, once the rules of all its parts have ended."""
        self.stack.count_step(self._valid, self._skipped)


class Watcher(Protocol):
    """Who is told of an optimizer's steps; on all ranks, or on none."""

    def step_begins(self) -> None:
        """The gradients of a step are there."""

    def sees(self, run: StackRun, factors: Sequence[Tensor]) -> None:
        """The polar factors of a stack that this rank owns, (P, m, n) for each block; they are used again."""

    def step_ends(self) -> None:
        """The matrices are updated."""


class Answers(tuple[Tensor, ...]):
    """The sums that a rule asked for."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"Expected the answers to Sum to be unpacked before .{name}: (total,) = yield Sum(part).")


def hyper_parameters(group: dict[str, Any]) -> HyperParameters:
    """A group's hyper-parameters as a rule sees them: rates that are tensors have no dimension."""
    plain = {key: value.reshape(()) if isinstance(value, Tensor) else value for key, value in group.items()}
    return HyperParameters(**{key: value for key, value in plain.items() if key != "params"})


def kind_of(asked: object) -> str:
    """What a rule asks for, in a word.

    Raises:
        TypeError: If that is neither a sum nor a polar factor.
    """
    if not isinstance(asked, Sum | Polar):
        raise TypeError(f"Expected a rule to yield Sum(...) or Polar(...) but it yielded {what(asked)}.")
    return "sum" if isinstance(asked, Sum) else "polar"
