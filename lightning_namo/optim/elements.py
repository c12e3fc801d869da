"""What rules compute with beside numbers: elements of the local shards, and parts of sums that were not asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_namo.optim import formulas
from lightning_namo.optim.stack import MatrixStack
from lightning_namo.sharding.local import stack
from lightning_namo.workspace import Workspace

_ONLY_A_PART = (
    "Expected a sum to be asked for before it is used ({}): it is this rank's part only. Write "
    "(total,) = yield Sum(part)."
)


_KEEP_FINITE = {"abs", "neg", "sign"}  # functions by which what is finite stays so
_OF_A_TENSOR = {"T", "mT", "H", "mH", "data", "dim", "ndim", "nelement", "numel", "reshape", "shape", "size", "view"}


class Holder(Protocol):
    """What elements know of the `Matrices` that they are of."""

    _stack: MatrixStack
    _workspace: Workspace
    _on_cpu: bool
    _resumed: int
    _summed: int
    _written: list[str]


@dataclass(eq=False)
class Part:
    """This rank's part of sums over the matrices: opaque, since it means nothing before ``yield Sum(part)``.

    Attributes:
        tensor: (K, 1, 1), (K, 1, n) or (K, m, 1).
        of_gradient: Whether it is of ``x.grad`` itself.
    """

    tensor: Tensor
    of_gradient: bool = False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_ONLY_A_PART.format(name))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(_ONLY_A_PART.format(func.__name__))


class Elements:
    """Tensors that are laid out like the local shards of the matrices; arithmetic on them gives more of them.

    Torch's functions, methods and operators take them as they take tensors. A number of a matrix, column or row meets
    them as ``x.spread(number)``.

    Args:
        x: The matrices.
        read: Gives the tensors: stacked (P, ...), or a list of P.
        is_gradient: Whether they are ``x.grad``.
        until: They can be read until the rule is resumed this often; None: for good.
        of: What they are, if that may be written; then they can be read until it is.
        is_own: Whether nobody else writes the memory that they are in.
        is_finite: Whether they are finite in any case.
    """

    def __init__(
        self,
        x: Holder,
        read: Callable[[], Tensor | list[Tensor]],
        *,
        is_gradient: bool = False,
        until: int | None = None,
        of: str = "",
        is_own: bool = False,
        is_finite: bool = False,
    ) -> None:
        self._x, self._read, self._until = x, read, until
        self._of, self._version = of, x._written.count(of)
        self._held_since: int | None = None
        self.is_gradient, self.is_own, self.is_finite = is_gradient, is_own, is_finite

    @classmethod
    def having(cls, x: Holder, stacked: Tensor, *, is_own: bool = True, is_finite: bool = False) -> Elements:
        """Elements in a tensor (P, ...)."""
        return cls(x, lambda: stacked, is_own=is_own, is_finite=is_finite)

    def tensors(self) -> list[Tensor]:
        """One tensor for each of P parameters."""
        found = self._found()
        return list(found.unbind()) if isinstance(found, Tensor) else found

    def stacked(self) -> Tensor:
        """One tensor (P, ...)."""
        found = self._found()
        return found if isinstance(found, Tensor) else stack(found, self._x._workspace)

    def write(self, out: Tensor) -> None:
        """Copy to a tensor (P, ...) of any dtype."""
        out.copy_(self.stacked())

    def _found(self) -> Tensor | list[Tensor]:
        if self._until is not None and self._x._resumed > self._until:
            raise RuntimeError(
                "Expected elements to be used before the next yield: afterwards the gradient or the momentum has "
                "changed. Ask for them again (x.look_ahead(h)), or compute what is needed of them before the yield."
            )
        if self._held_since is not None and self._x._summed > self._held_since:
            raise RuntimeError(
                "Expected elements that were computed before a sum to be used before it is asked for: until all ranks "
                "have answered they would be held for the whole model. Compute them again after the yield."
            )
        if self._x._written.count(self._of) > self._version:
            raise RuntimeError(
                f"Expected elements to be used before x.{self._of} is written, from which they are read. Take them "
                "out before: .clone()."
            )
        return self._get()

    def _get(self) -> Tensor | list[Tensor]:
        return self._read()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found: list[Holder] = []
        of_others, is_finite = set(), list[bool]()
        writes = func.__name__.endswith("_") and not func.__name__.endswith("__")
        if (kwargs or {}).get("out") is not None:
            raise TypeError(f"Expected {func.__name__} to make new elements, but got out=. Take what it returns.")

        def plain(value: Any) -> Any:
            if isinstance(value, Elements):
                found.append(value._x)
                is_finite.append(value.is_finite)
                stacked = value.stacked()
                if writes and len(found) == 1 and (value._of or value.is_gradient):
                    raise TypeError(
                        f"Expected {func.__name__} to write elements of the rule's own, but got {value._name()}. "
                        "Assign what is made of a state (x.u = x.u.mul(0.9)); x.advance moves the momentum, x.apply "
                        "the weight."
                    )
                if writes and not value.is_own:  # the memory of the engine
                    stacked = stacked.clone()
                elif not value.is_own:
                    of_others.add(stacked.untyped_storage()._cdata)
                return stacked
            if isinstance(value, Part) or (isinstance(value, Tensor) and value.dim()):
                raise TypeError(
                    f"Expected {func.__name__} to have elements, or numbers spread over them (x.spread(number)), but "
                    f"got {kind_of(value)} besides elements: on a shard it would meet other elements than its own."
                )
            return [plain(v) for v in value] if isinstance(value, list | tuple) else value

        result = func(*[plain(a) for a in args], **{key: plain(v) for key, v in (kwargs or {}).items()})
        x = found[0]
        if isinstance(result, Tensor) and result.shape == (x._stack.count, *x._stack.local_shape):
            in_place = result.untyped_storage()._cdata in of_others  # as what .to(dtype) returns may be
            finite = func.__name__ in _KEEP_FINITE and all(is_finite)
            made = Elements.having(x, result.clone() if in_place else result, is_finite=finite)
            made._held_since = x._summed
            return made
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            raise TypeError(
                f"Expected {func.__name__} to keep the shape of the elements, which are this rank's only. For sums "
                "over them yield Sum(x.square_sum(elements))."
            )
        return result

    def __bool__(self) -> bool:
        raise TypeError("Expected a decision that all ranks take alike, but elements are this rank's part only.")

    def _name(self) -> str:
        """What they are, if that is not the rule's own."""
        return "x.grad" if self.is_gradient else f"x.{self._of}"

    def __matmul__(self, other: object) -> None:
        raise TypeError("Expected no product of matrices of elements: a rank has a part of them. O = yield Polar(...).")

    __rmatmul__ = __matmul__

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(Tensor, name)  # an AttributeError as a tensor's
        if name in _OF_A_TENSOR:
            raise TypeError(
                f"Expected no {name} of elements: they are this rank's part of the matrices, laid out as it is stored. "
                "The shape of each whole matrix is x.shape; numbers of rows and columns meet elements by x.spread."
            )
        if not callable(attribute):
            return getattr(self.stacked(), name)
        return lambda *args, **kwargs: Elements.__torch_function__(attribute, (), (self, *args), kwargs)


class LookAhead(Elements):
    """N after `Matrices.advance`, made where it is wanted: in the dtype in which it is sent, or over the gradient."""

    def __init__(self, x: Holder, grad: Tensor | None, buffer: Tensor, momentum: float) -> None:
        super().__init__(
            x, list, until=x._resumed, is_finite=True
        )  # a method of its own as the reader would be a cycle
        self._grad, self._buffer, self._mu = grad, buffer, momentum
        self._made: Tensor | None = None

    def write(self, out: Tensor) -> None:
        """Copy to a tensor (P, ...); on accelerators without a copy in between."""
        if self._x._on_cpu or self._made is not None or self._grad is None:
            out.copy_(self.stacked())
        else:
            formulas.look_ahead(self._grad, self._buffer, momentum=self._mu, out=out)

    def settle(self) -> None:
        """Take N out of the momentum, which is about to change."""
        self._made = self._buffer.clone() if self._grad is None else self._get()

    def _get(self) -> Tensor:
        if self._made is None:
            if self._grad is None:
                return self._buffer
            self._made = formulas.look_ahead(self._grad, self._buffer, momentum=self._mu, out=self._grad)
        return self._made


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, Elements):
        return f"{value._name()}, elements" if value._of or value.is_gradient else "elements"
    if isinstance(value, Part):
        return "a part of a sum, which was not asked for"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _operator(cls: type[Elements | Part], name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)
    return lambda self, *args: cls.__torch_function__(method, (), (self, *args))


_BINARY = ("add", "sub", "mul", "truediv", "pow")
for _name in (
    *_BINARY,
    *(f"r{name}" for name in _BINARY),
    "neg",
    "abs",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and",
    "or",
    "invert",
):
    setattr(Elements, f"__{_name}__", _operator(Elements, f"__{_name}__"))
    setattr(Part, f"__{_name}__", _operator(Part, f"__{_name}__"))
