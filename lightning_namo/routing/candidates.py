"""What the routing knows of one parameter, and the route that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn

from lightning_namo.routing.layers import TRANSPOSED_CONVS, is_hugging_face_conv1d
from lightning_namo.sharding.batch import Batched
from lightning_namo.sharding.layout import stored_shape

Confidence: TypeAlias = Literal["sure", "assumed", "please check"]
Side: TypeAlias = Literal["adamw", "matrix"]
OUTPUT_HEAD = "output head"  # how the reasons of all of them begin


class Reason(NamedTuple):
    """Why a parameter takes AdamW, and how sure that is."""

    words: str
    confidence: Confidence = "sure"


class Route(NamedTuple):
    """Where a parameter went, and why.

    Attributes:
        name: Its first name in the module, without what wrappers add.
        shape: Its full shape as stored, whatever part of it this process holds.
        group: Name of its parameter group, or "frozen".
        confidence: "sure": by its module's class, its rank, a declaration or a glob; "assumed": by its name or place,
            as is usual; "please check": nothing says what it is.
        reason: Why, in words.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    confidence: Confidence
    reason: str


class Use(NamedTuple):
    """One place where a parameter is registered.

    Attributes:
        name: Its name in the module.
        label: Its name in its layer.
        owner: That layer.
        path: The layer's path, cleaned of what wrappers add.
    """

    name: str
    label: str
    owner: nn.Module
    path: tuple[str, ...]


@dataclass(eq=False)
class Candidate:
    """What is known of one parameter; a tied one has several uses, and is named after the first."""

    parameter: nn.Parameter
    shape: tuple[int, ...]
    uses: list[Use]
    adamw: str | None = None  # why it takes AdamW; None: it is a matrix
    confidence: Confidence = "sure"
    glob: str | None = None  # the glob that overruled the routing, in words
    notes: list[str] = field(default_factory=list)  # what else a reader of the table should know of a matrix
    blocks: int | list[int] = 1
    batched: Batched = False
    batch_words: str = ""  # why it is, or what was assumed
    turned: bool | None = None  # whether rows are known to be input features or not; None: as its module has it

    @property
    def name(self) -> str:
        """Its first name in the module."""
        return self.uses[0].name

    @property
    def is_matrix(self) -> bool:
        """Whether it is to be orthogonalized."""
        return self.adamw is None

    @property
    def transposed(self) -> bool:
        """Whether it is stored with input features as rows."""
        owner = self.uses[0].owner
        if self.turned is not None:
            return self.turned
        if self.batched is True:
            return getattr(owner, "is_transposed", False) is True  # what transformers' experts declare
        return isinstance(owner, TRANSPOSED_CONVS) or is_hugging_face_conv1d(owner)

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the matrix, or of each of a batch, as stored."""
        if self.batched is True:
            return stored_shape(self.shape[1:])
        rows, columns = stored_shape(self.shape)
        return rows // (int(self.batched) or 1), columns

    @property
    def rows(self) -> int:
        """Rows of the true matrix, or of each of a batch: output features."""
        return self.stored[self.transposed]

    @property
    def template(self) -> dict[str, Any]:
        """The keys of its group but the parameters."""
        if not self.is_matrix:
            return {"name": "adamw", "orthogonalize": False}
        sizes = [self.blocks] if isinstance(self.blocks, int) else self.blocks
        suffix = "" if self.blocks == 1 else "_blocks_" + "_".join(map(str, sizes))
        batch = f"_batched{'' if self.batched is True else f'_{self.batched}'}" if self.batched else ""
        name = f"matrices{batch}{'_transposed' * self.transposed}{suffix}"
        keys: dict[str, Any] = {"transposed": self.transposed, "blocks": self.blocks}
        keys |= {"batched": self.batched} if self.batched else {}
        return {"name": name, "orthogonalize": True, **keys}

    @property
    def route(self) -> Route:
        """Where it goes, and why, in words."""
        words = [self.glob or self.adamw or "matrix"]
        if self.is_matrix and self.batched:
            count = self.shape[0] if self.batched is True else self.batched
            features = "input" if self.transposed else "output"
            words = [self.glob] if self.glob else []
            words.append(f"{count} matrices {times(self.stored)}, {features} features as rows, {self.batch_words}")
        elif self.is_matrix and len(self.shape) > 2:
            words.append(f"flattened to {times(stored_shape(self.shape))}")
        if self.is_matrix and self.transposed and not self.batched:
            words.append("stored transposed")
        words += self.notes if self.is_matrix else ()
        if len(self.uses) > 1:
            more = f" and {len(self.uses) - 2} more" if len(self.uses) > 2 else ""
            words.append(f"tied to {self.uses[1].name}{more}")
        reason = ", ".join(words)
        if self.parameter.requires_grad:
            return Route(self.name, self.shape, self.template["name"], self.confidence, reason)
        return Route(self.name, self.shape, "frozen", "sure", f"requires_grad=False; else {reason}")


def times(shape: Sequence[int]) -> str:
    """A shape in words: 3 x 4."""
    return " x ".join(map(str, shape))
