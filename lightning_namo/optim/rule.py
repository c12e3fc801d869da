"""What a rule works with, `Matrices` (x) and `HyperParameters` (h), and what it asks the engine for: `Sum`, `Polar`.

A rule is a generator method of an `OrthogonalizedOptimizer`. It computes on the local shards of K like matrices, and
yields where it needs the other ranks. Numbers are tensors (K, 1, 1), (K, 1, n) or (K, m, 1), full length on every rank;
elements are laid out like the local shard and are of another type, `Elements`, so that the two cannot meet by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_namo.optim import formulas
from lightning_namo.optim.elements import Elements, LookAhead, Part, kind_of
from lightning_namo.optim.formulas import HyperParameters
from lightning_namo.optim.stack import MatrixStack
from lightning_namo.sharding.layout import StatisticKind
from lightning_namo.sharding.local import local_tensor, stack, unstack
from lightning_namo.workspace import Workspace

_SMALL = 2**16  # elements: smaller shards are gathered on accelerators, larger ones read and written where they are
_LOGGED = ("step", "skipped", "skipped_steps", "noise_scale", "noise_scale_tokens")
Rule: TypeAlias = Generator["Sum | Polar", Any, None]


class Sum:
    """Asks for sums over all shards of the matrices: ``a, b = yield Sum(x.square_sum(s), x.column_square_sum(t))``.

    Sums before the first `Polar` are one all-reduce for the whole model, later ones are one for each bucket.

    Args:
        parts: What `Matrices.square_sum` and its kin return.

    Raises:
        TypeError: For anything else.
    """

    def __init__(self, *parts: Part) -> None:
        for part in parts:
            if not isinstance(part, Part):
                raise TypeError(
                    "Expected Sum to be asked for what x.square_sum, x.column_square_sum or x.row_square_sum return "
                    f"but got {kind_of(part)}."
                )
        self.parts = parts

    def __repr__(self) -> str:
        return "a request, not its answer: (total,) = yield Sum(part)"


class Polar:
    """Asks for the polar factors of the matrices: ``O = yield Polar(x.advance(h))``, in the iteration's dtype.

    Args:
        direction: Elements, as `Matrices.advance` returns.

    Raises:
        TypeError: For anything else.
    """

    def __init__(self, direction: Elements) -> None:
        if not isinstance(direction, Elements):
            raise TypeError(f"Expected Polar to be asked for elements (x.advance(h)) but got {kind_of(direction)}.")
        self.direction = direction

    def __repr__(self) -> str:
        return "a request, not its answer: O = yield Polar(x.advance(h))"


class Matrices:
    """K true matrices (m, n) of one stack, as this rank has them: what a rule reads and writes.

    The states that the rule's class declares are attributes, numbers or elements by their kind; writing one writes the
    matrices that are valid (whose gradient is there, and finite) and leaves the others as they were, to the bit.

    Args:
        of: The stack.
        blocks: Which blocks of its parameters: of one shape.
        grads: The local gradients of its parameters; None where there is none.
        workspace: For what is needed for a moment.
    """

    _stack: MatrixStack
    _blocks: Sequence[int]
    _grads: Sequence[Tensor | None]
    _workspace: Workspace
    _on_cpu: bool
    _in_one: bool  # whether shards are gathered, or read and written where they are
    _valid: Tensor | None  # which of P parameters may be written, (P,), once that is known
    _invalid: Tensor  # which may not
    _raw: Tensor | list[Tensor] | None  # the gradients before
    _masked: Tensor | None  # and after
    _lazy: LookAhead | None  # N of the last `advance`
    _resumed: int
    _summed: int  # how many sums before the first polar factor were answered
    _written: list[str]
    _readings: dict[str, Tensor] | None  # what the rule reports, if somebody looks

    def __init__(
        self, of: MatrixStack, blocks: Sequence[int], grads: Sequence[Tensor | None], workspace: Workspace
    ) -> None:
        own = self.__dict__
        own |= {"_stack": of, "_blocks": blocks, "_grads": grads, "_workspace": workspace}
        own |= {
            "_valid": None,
            "_raw": None,
            "_masked": None,
            "_lazy": None,
            "_resumed": 0,
            "_summed": 0,
            "_written": [],
            "_readings": None,
        }
        own["_on_cpu"] = of.state["step"].is_cpu
        small = self._on_cpu or of.layout.region.numel < _SMALL
        own["_in_one"] = of.part is not None or (len(grads) > 1 and small)

    # ------------------------------------------------------------------ numbers

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of each whole matrix."""
        return self._stack.layout.matrix_shapes[self._blocks[0]]

    @property
    def step(self) -> Tensor:
        """The number of this step, counted from 1, (K, 1, 1)."""
        return self._of_parameters(self._stack.state["step"]) + 1

    def square_sum(self, elements: Elements) -> Part:
        """``||X||_F^2`` of each matrix, (K, 1, 1) once it was asked for."""
        return self._part(elements, "matrix")

    def column_square_sum(self, elements: Elements) -> Part:
        """``||X[:, j]||^2`` of each column, (K, 1, n) once it was asked for."""
        return self._part(elements, "column")

    def row_square_sum(self, elements: Elements) -> Part:
        """``||X[i, :]||^2`` of each row, (K, m, 1) once it was asked for."""
        return self._part(elements, "row")

    def spread(self, number: Tensor) -> Elements:
        """Numbers (K, 1, 1), (K, 1, n) or (K, m, 1), laid out like the local shard."""
        shape = (self._stack.count, *self._stack.local_shape)
        laid_out = self._laid_out(self._number(number, "x.spread"), 0).expand(shape)
        return Elements.having(self, laid_out, is_own=False)  # may be the number itself

    # ------------------------------------------------------------------ elements

    @property
    def grad(self) -> Elements:
        """The gradients G. Where a matrix is not valid the momentum stands in for it, once that is known."""
        return Elements(self, self._gradient, is_gradient=True, is_finite=True)

    @property
    def momentum(self) -> Elements:
        """The momenta M."""
        return Elements(self, lambda: self._settled()._stack.state["momentum_buffer"], of="momentum")

    @property
    def weight(self) -> Elements:
        """The weights W, to be read; `apply` writes them."""
        return Elements(self, self._weights, of="weight")

    def look_ahead(self, h: HyperParameters) -> Elements:
        """N from the momentum before this step, nothing changed: ``(1 - mu) G + mu M'`` with Nesterov, else ``M'``.

        ``M' = mu M + (1 - mu) G`` is what `advance` makes of the momentum.
        """
        keys = {"momentum": h.momentum, "nesterov": h.nesterov}

        def read() -> Tensor | list[Tensor]:
            buffer, grad = self._momentum(), self.grad
            if self._on_cpu or self._valid is not None:
                return formulas.direction(grad.stacked(), buffer, **keys, out=self._workspace.like(buffer))
            weight = formulas.gradient_weight(**keys)
            return list(torch._foreach_lerp(buffer.unbind(), grad.tensors(), weight))

        return Elements(self, read, until=self._resumed, of="momentum")

    def advance(self, h: HyperParameters, toward: Elements | None = None) -> Elements:
        """Move the momentum, ``M <- mu M + (1 - mu) G``, and give N: ``(1 - mu) G + mu M`` with Nesterov, else M.

        Args:
            h: With ``momentum`` (mu) and ``nesterov``.
            toward: What takes the place of G; None: the gradient.
        """
        self._settled()
        state, buffer = self._stack.state["momentum_buffer"], self._momentum()
        if toward is None:
            toward = self.grad
        moved = self._masked_gradient() if toward.is_gradient else toward.stacked()
        self._written.extend(["momentum"] if toward.is_gradient else ["momentum", "momentum of its own"])
        grad = moved if toward.is_gradient else torch.where(self._mask(), moved.to(buffer.dtype), buffer)
        formulas.update_momentum(grad, buffer, momentum=h.momentum)
        if buffer.dtype != state.dtype:
            state.copy_(buffer)
        self.__dict__["_masked"] = None  # N is written over it
        direction = LookAhead(self, grad if h.nesterov else None, buffer, h.momentum)
        self.__dict__["_lazy"] = direction
        return direction

    def apply(self, direction: Elements, step_size: Tensor | float, decay: Tensor | float = 1.0) -> None:
        """``W <- decay W - step_size direction``.

        Args:
            direction: Elements.
            step_size: Numbers (K, 1, 1), (K, 1, n) or (K, m, 1), or one for all.
            decay: Likewise.
        """
        stack_, dtype, invalid = self._stack, self._stack.statistics_dtype, self._of_parameters(self._invalid)
        if not isinstance(direction, Elements):
            raise TypeError(f"Expected apply to have elements as its direction but got {kind_of(direction)}.")
        size = self._number(step_size, "step_size").masked_fill(invalid, 0)
        factor = None if isinstance(decay, float | int) and decay == 1 else self._number(decay, "decay")
        if not stack_.layout.region.numel:
            return
        stacked = direction.stacked()
        if not direction.is_finite:  # 0 times an infinity would not leave the weights alone
            fill = stacked.masked_fill_ if direction.is_own and stacked.is_contiguous() else stacked.masked_fill
            stacked = fill(~self._mask(), 0)
        if self._on_cpu and stacked.dtype != dtype:
            stacked = self._workspace.like(stacked, dtype).copy_(stacked)
        self._written.append("weight")
        weights, sizes = self._weights(), self._laid_out(size, 0)
        factors = None if factor is None else self._laid_out(factor.masked_fill(invalid, 1), 1)
        if isinstance(weights, Tensor):
            formulas.apply_update([weights], [stacked], [sizes], None if factors is None else [factors])
        elif self._in_one:
            whole = stack(weights, self._workspace)
            formulas.apply_update([whole], [stacked], [sizes], None if factors is None else [factors])
            unstack(whole, weights)
        else:
            numbers = sizes.unbind(), None if factors is None else factors.unbind()
            formulas.apply_update(weights, stacked.unbind(), *numbers)

    def report(self, **readings: Tensor | float | Callable[[], Tensor | float]) -> None:
        """Leave readings of this step, ``x.report(step_scale=lambda: a / h.lr)``, if somebody looks: else it is free.

        `OrthogonalizedOptimizer.readings` gives them, and `ReadingLog` logs them by their names.

        Args:
            readings: Numbers (K, 1, 1), (K, 1, n) or (K, m, 1), or one for all, or functions that compute such, which
                are called at once, and only if somebody looks.

        Raises:
            TypeError: For elements, or a part of a sum.
            ValueError: For numbers of another shape, or a name that is taken.
        """
        if self._readings is not None:
            for name, reading in readings.items():
                if name in _LOGGED:
                    raise ValueError(f"Expected readings by names of their own, but the log itself adds {name}.")
                number = self._number(reading() if callable(reading) else reading, f"the reading {name}")
                self._readings[name] = number.clone()  # the rule may write it

    # ------------------------------------------------------------------ states

    def __getattr__(self, name: str) -> Any:
        kind = self._kind(name)
        if kind == "element":
            return Elements(self, lambda: self._stack.state[name], of=name)
        parts = [self._stack.layout.by_block(self._stack.state[name], kind)[b] for b in self._blocks]
        return self._together(parts).clone()  # else it would change with the state

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self._kind(name)
        state = self._stack.state[name]
        if kind == "element":
            if not isinstance(value, Elements):
                raise TypeError(f"Expected x.{name} to be set to elements but got {kind_of(value)}.")
            torch.where(self._mask(), value.stacked().to(state.dtype), state, out=state)
            self._written.append(name)
            return
        self._written.append(name)
        value = self._number(value, f"x.{name}").to(state.dtype)
        views = self._stack.layout.by_block(state, kind)
        value = value.view(len(state), len(self._blocks), *value.shape[1:])
        shape = views[self._blocks[0]].shape[1:]
        if any(size not in (1, full) for size, full in zip(value.shape[2:], shape, strict=True)):
            raise ValueError(f"Expected x.{name} to be set to numbers (K, {shape[0]}, {shape[1]}), K matrices.")
        if len(self._blocks) == len(views):
            whole = state.view(len(state), len(views), *shape)
            torch.where(self._validity().view(-1, 1, 1, 1), value, whole, out=whole)
            return
        for b, part in zip(self._blocks, value.unbind(1), strict=True):
            views[b].copy_(torch.where(self._validity().view(-1, 1, 1), part, views[b]))

    def _kind(self, name: str) -> Any:
        kinds = self._stack.kinds
        if name in ("grad", "momentum", "weight"):
            raise AttributeError(
                f"Expected x.{name} to be read only: x.apply(direction, step_size, decay) writes weights, x.advance(h) "
                "moves the momentum."
            )
        if name not in kinds:
            raise AttributeError(
                f"Expected one of the states that the rule's class declares ({', '.join(kinds) or 'none'}) or what "
                f'Matrices has, but got x.{name}. Declare it: state = {{"{name}": "element"}}, or "matrix", "column", '
                f'"row". (A hyper-parameter is h.{name}.)'
            )
        return kinds[name]

    # ------------------------------------------------------------------ what the engine calls

    def _decided(self, valid: Tensor, invalid: Tensor) -> None:
        """Which of P parameters may be written, (P,), and which may not."""
        self.__dict__.update(_valid=valid, _invalid=invalid)

    def _resume(self, of_the_model: bool = False) -> None:
        """The rule goes on: directions that it was given before cannot be read any more.

        Args:
            of_the_model: Whether with a sum before its first polar factor, for which all matrices had to wait.
        """
        self.__dict__["_resumed"] += 1
        self.__dict__["_summed"] += of_the_model
        self._forget()

    def _forget(self) -> None:
        """The frame ends: what was read in the workspace is not there any more."""
        self.__dict__.update(_raw=None, _masked=None, _lazy=None)

    # ------------------------------------------------------------------ inside

    def _of_parameters(self, values: Tensor) -> Tensor:
        """One of each parameter, (P,), as numbers (K, 1, 1)."""
        return values.view(-1, 1).expand(-1, len(self._blocks)).reshape(-1, 1, 1)

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        """Numbers (P, r, c) of each block as (K, r, c)."""
        whole = torch.stack(list(parts), dim=1) if len(parts) > 1 else parts[0]
        return whole.reshape(self._stack.count * len(parts), *parts[0].shape[1:])

    def _number(self, value: Any, what: str) -> Tensor:
        """A number of the rule as (K, 1 or m, 1 or n)."""
        (m, n), K = self.shape, self._stack.count * len(self._blocks)
        if isinstance(value, Elements | Part) or not isinstance(value, Tensor | float | int):
            raise TypeError(f"Expected {what} to have numbers of matrices, columns or rows but got {kind_of(value)}.")
        if not isinstance(value, Tensor):
            device = self._stack.state["step"].device
            return torch.full((K, 1, 1), float(value), dtype=self._stack.statistics_dtype, device=device)
        if value.dim() == 0:  # a number on the host for tensors elsewhere, too
            return torch.zeros_like(self.step).add(value)
        if value.shape not in ((K, 1, 1), (K, 1, n), (K, m, 1)):
            raise ValueError(
                f"Expected {what} to have numbers (K, 1, 1), (K, 1, n) or (K, m, 1), here with K, m, n = {K}, {m}, "
                f"{n}, but got {tuple(value.shape)}."
            )
        return value.to(self._stack.statistics_dtype)

    def _laid_out(self, number: Tensor, other: float) -> Tensor:
        """Numbers of these blocks, spread over the shards; the elements of other blocks have another one."""
        layout = self._stack.layout
        values = number.view(self._stack.count, len(self._blocks), *number.shape[1:])
        if len(layout.blocks) == 1:
            return layout.spread([number], self._stack.local_shape)
        none = torch.full_like(values[:, 0, :1, :1], other)
        own = dict(zip(self._blocks, values.unbind(1), strict=True))
        columns = {b: own.get(b, none) for b in range(len(layout.blocks))}
        wide = [value.expand(-1, -1, values.shape[3]) for value in columns.values()]
        return layout.spread(wide, self._stack.local_shape)

    def _validity(self) -> Tensor:
        if self._valid is None:
            raise RuntimeError(
                "Expected the rule to write nothing before its first request, in which it is found out which gradients "
                "are valid, where that asks for sums of x.grad."
            )
        return self._valid

    def _mask(self) -> Tensor:
        """Which elements may be written: broadcasts against the stacked shards (P, ...)."""
        valid = self._validity()
        if len(self._blocks) == len(self._stack.layout.blocks):
            return valid.view(-1, *(1 for _ in self._stack.local_shape))
        return self._laid_out(self._of_parameters(valid).float(), 0) > 0

    def _part(self, elements: Elements, kind: StatisticKind) -> Part:
        stack_ = self._stack
        if not isinstance(elements, Elements):
            raise TypeError(f"Expected the sum of the squares of elements but got {kind_of(elements)}.")
        (m, n), dtype = self.shape, stack_.statistics_dtype
        if not stack_.counts or not stack_.layout.region.numel:  # another replica's enter the sums
            shape = {"matrix": (1, 1), "column": (1, n), "row": (m, 1)}[kind]
            K, device = stack_.count * len(self._blocks), stack_.state["step"].device
            return Part(torch.zeros(K, *shape, dtype=dtype, device=device), elements.is_gradient)
        if kind == "matrix" and len(stack_.layout.blocks) == 1 and not self._on_cpu:
            tensors = elements.tensors()
            if tensors[0].dtype == torch.bool:
                tensors = [tensor.to(dtype) for tensor in tensors]
            norms = torch._foreach_norm(tensors, dtype=dtype)
            return Part(torch.stack(norms).square_().view(-1, 1, 1), elements.is_gradient)
        stacked = elements.stacked()
        stacked = stacked.to(dtype) if stacked.dtype == torch.bool else stacked
        with self._workspace.frame():
            parts = stack_.layout.sums_of_squares(stacked, kind, dtype, self._workspace)
        return Part(self._together([parts[b] for b in self._blocks]), elements.is_gradient)

    def _weights(self) -> list[Tensor] | Tensor:
        """One of each of P parameters, or (P, ...) of a batched one."""
        parameters = self._stack.parameters
        if self._stack.part is not None:
            return parameters[0].local(parameters[0].tensor)
        return [local_tensor(parameter.tensor) for parameter in parameters]

    def _settled(self) -> Matrices:
        """These, once N of the last `advance` stands in memory of its own: the momentum may change."""
        if self._lazy is not None:
            self._lazy.settle()
            self.__dict__["_lazy"] = None
        return self

    def _momentum(self) -> Tensor:
        """(P, ...) in the dtype in which it meets the gradient: the state itself, or a copy."""
        return self._stack.state["momentum_buffer"].to(self._stack.dtype)

    def _gradient(self) -> Tensor | list[Tensor]:
        self._settled()
        if self._valid is not None:
            return self._masked_gradient()
        raw = self._raw
        if raw is None and self._stack.part is not None:
            (grad,), momentum = self._grads, self._stack.state["momentum_buffer"]
            self.__dict__["_raw"] = raw = (momentum if grad is None else grad).to(self._stack.dtype)
        elif raw is None:
            momenta = self._stack.state["momentum_buffer"].unbind()
            found = [m if g is None else g for g, m in zip(self._grads, momenta, strict=True)]
            found = [tensor.to(self._stack.dtype) for tensor in found]
            self.__dict__["_raw"] = raw = stack(found, self._workspace) if self._on_cpu else found
        return raw

    def _masked_gradient(self) -> Tensor:
        """(P, ...) in the workspace; the momentum where the gradient is not valid."""
        self._settled()
        masked = self._masked
        if masked is None:
            buffer, mask = self._momentum(), self._mask()
            masked = self._workspace.like(buffer)
            if self._stack.part is not None:
                (grad,) = self._grads
                torch.where(mask, buffer if grad is None else grad.to(buffer.dtype), buffer, out=masked)
                self.__dict__["_masked"] = masked
                return masked
            found = [m if g is None else g.to(m.dtype) for g, m in zip(self._grads, buffer, strict=True)]
            if self._in_one:
                torch.where(mask, torch.stack(found, out=masked), buffer, out=masked)
            else:
                for out, valid, grad, momentum in zip(masked, mask, found, buffer, strict=True):
                    torch.where(valid, grad, momentum, out=out)
            self.__dict__["_masked"] = masked
        return masked
