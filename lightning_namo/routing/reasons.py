"""Why a parameter takes AdamW: decided by identity and by module rather than by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lightning_namo.sharding.batch import Batched
from lightning_namo.sharding.layout import stored_shape

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED_CONVS)
_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, *_CONVS)
_EMBEDDING_NAME = re.compile(r"embed|(^|[._])(emb|pos)([._]|$)")  # of bare parameters, such as position tables


class Route(NamedTuple):
    """Where a parameter went, and why.

    Attributes:
        name: Its first name in the module, without what wrappers add.
        shape: Its full shape as stored, whatever part of it this process holds.
        group: Name of its parameter group, or "frozen".
        reason: Why, in words.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    reason: str


class Use(NamedTuple):
    """One place where a parameter is registered: its name in the module, and its label in its layer."""

    name: str
    label: str
    owner: nn.Module


@dataclass
class Candidate:
    """What is known of one parameter; a tied one has several uses, and is named after the first."""

    parameter: nn.Parameter
    shape: tuple[int, ...]
    uses: list[Use]
    adamw: str | None = None  # why it takes AdamW; None: it is a matrix
    glob: str | None = None  # the glob that overruled the routing, in words
    blocks: int | list[int] = 1
    batched: Batched = False
    batch_words: str = ""  # why it is, or what was assumed
    turned: bool | None = None  # whether the user says that rows are input features; None: nothing

    @property
    def name(self) -> str:
        """Its first name in the module."""
        return self.uses[0].name

    @property
    def transposed(self) -> bool:
        """Whether it is stored with input features as rows."""
        owner = self.uses[0].owner
        if self.turned is not None:
            return self.turned
        if self.batched is True:
            return getattr(owner, "is_transposed", False) is True  # what transformers' experts declare
        return isinstance(owner, _TRANSPOSED_CONVS) or is_hugging_face_conv1d(owner)

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
        if self.adamw is not None:
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
        if self.adamw is None and self.batched:
            count = self.shape[0] if self.batched is True else self.batched
            features = "input" if self.transposed else "output"
            words = [f"{count} matrices {times(self.stored)}, {features} features as rows, {self.batch_words}"]
        elif self.adamw is None and len(self.shape) > 2:
            words.append(f"flattened to {times(stored_shape(self.shape))}")
        if self.adamw is None and self.transposed and not self.batched:
            words.append("stored transposed")
        if len(self.uses) > 1:
            more = f" and {len(self.uses) - 2} more" if len(self.uses) > 2 else ""
            words.append(f"tied to {self.uses[1].name}{more}")
        reason = ", ".join(words)
        if self.parameter.requires_grad:
            return Route(self.name, self.shape, self.template["name"], reason)
        return Route(self.name, self.shape, "frozen", f"requires_grad=False; else {reason}")


def declared_heads(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of what any submodule returns as its output embeddings (Hugging Face)."""
    for submodule in module.modules():
        getter = getattr(type(submodule), "get_output_embeddings", None)
        if getter is None:
            continue
        try:
            head = getter(submodule)
        except (AttributeError, NotImplementedError):  # base classes offer it to models that have no head
            continue
        if isinstance(head, nn.Module):
            yield from head.parameters()


def head_by_width(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the last Linear as wide as an embedding's vocabulary, unless it is a hidden layer.

    Hidden is one that a later Linear reads, or that leads back to the model's own width, which may by chance
    be the length of a table too (GPT-2 medium: 1024 positions, width 1024).
    """
    tables = [table for table in module.modules() if isinstance(table, EMBEDDINGS)]
    vocabularies = {table.num_embeddings for table in tables}
    model_widths = {table.embedding_dim for table in tables}
    read: set[int] = set()
    for linear in reversed([layer for layer in module.modules() if isinstance(layer, nn.Linear)]):
        width = linear.out_features
        leads_back = width in model_widths and linear.in_features not in model_widths
        if width in vocabularies and width not in read and not leads_back:
            yield from linear.parameters()
            return
        read.add(linear.in_features)


def is_hugging_face_conv1d(owner: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, which stores ``(in, out)``; without importing transformers."""
    return ("transformers.pytorch_utils", "Conv1D") in ((c.__module__, c.__name__) for c in type(owner).__mro__)


def _is_layer(owner: nn.Module) -> bool:
    """Whether the weights of a module are matrices."""
    return isinstance(owner, _LAYERS) or is_hugging_face_conv1d(owner)


def _is_norm(owner: nn.Module) -> bool:
    return not _is_layer(owner) and any("norm" in c.__name__.lower() for c in type(owner).__mro__)


def _is_weight(use: Use) -> bool:
    """Whether this is a layer's weight, and not the norm that weight_norm keeps beside it."""
    return _is_layer(use.owner) and "weight" in use.label and not use.label.endswith(("_g", ".original0"))


def adamw_reason(candidate: Candidate, heads: set[nn.Parameter]) -> str | None:
    """Why a parameter is no hidden matrix; None if it is one."""
    first, shape = candidate.uses[0], candidate.shape
    if candidate.parameter.is_complex():
        return "complex"
    if any(isinstance(use.owner, EMBEDDINGS) for use in candidate.uses):
        return "embedding" if isinstance(first.owner, EMBEDDINGS) else "output head"
    if any(_is_norm(use.owner) for use in candidate.uses):
        return "norm"
    if len(shape) < 2:
        return "scalar" if not shape else "bias" if "bias" in first.label else "vector"
    if candidate.parameter in heads:
        return "output head"
    if sum(size > 1 for size in shape) < 2 and not any(_is_weight(use) for use in candidate.uses):
        return "vector with dimensions of size 1"
    if any(_EMBEDDING_NAME.search(use.label.lower()) and not _is_layer(use.owner) for use in candidate.uses):
        return "embedding by its name"
    return None


# How transformers' classes that do not declare it keep bare parameters: by their labels (the last one: all others),
# whether they are batches of matrices (or what says how many are in dimension 0), and whether input features are rows.
_KNOWN: dict[str, dict[str, tuple[bool | str, bool]]] = {
    "DbrxExpertGLU": {"w2": ("moe_num_experts", True), "": ("moe_num_experts", False)},
    "FunnelRelMultiheadAttention": {"": (False, True)},
    "GroupedLinearLayer": {"": (True, True)},  # ConvBERT's
    "Llama4TextExperts": {"": (True, True)},
    "RecurrentGemmaRglru": {"": (True, True)},
    "XLNetRelativeAttention": {"o": (False, False), "": (False, True)},
}


def _known(owner: nn.Module, label: str) -> tuple[Batched, bool] | None:
    """Batch and orientation of a parameter of one of transformers' classes; None: it is none of those."""
    for cls in type(owner).__mro__:
        if cls.__module__.startswith("transformers.") and cls.__name__ in _KNOWN:
            of = _KNOWN[cls.__name__]
            batched, transposed = of.get(label, of[""])
            return (getattr(owner, batched) if isinstance(batched, str) else batched), transposed
    return None


def find_batch(candidate: Candidate) -> None:
    """Find out whether a matrix is a batch of matrices: experts, or the groups of a convolution."""
    (_, label, owner), shape = candidate.uses[0], candidate.shape
    if isinstance(owner, _CONVS) and owner.groups > 1:
        is_across = isinstance(owner, _TRANSPOSED_CONVS)
        if stored_shape(shape)[0] == owner.groups or (shape[1] == 1 and not is_across):
            candidate.adamw = "depthwise convolution"
        else:
            candidate.batched, candidate.batch_words = owner.groups, "one for each group of the convolution"
    elif (known := _known(owner, label)) is not None:
        candidate.batched, candidate.turned = known
        candidate.batch_words = f"as {type(owner).__name__} uses them"
    elif len(shape) == 3 and min(shape[1:]) > 1 and not _is_layer(owner):
        candidate.batched = True
        declared = isinstance(getattr(owner, "is_transposed", None), bool)
        declares = f"declared by {type(owner).__name__}"
        candidate.batch_words = declares if declared else "assumed of a bare parameter: see batched, transposed, matrix"


def times(shape: Sequence[int]) -> str:
    """A shape in words: 3 x 4."""
    return " x ".join(map(str, shape))
