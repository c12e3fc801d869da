"""Which parameters are hidden matrices, which take AdamW, and why.

Muon and its kin orthogonalize the update of a hidden weight matrix. Embeddings, output heads, norms, biases
and scalars are no such matrices and take AdamW. `split_parameters` decides by identity and by module rather
than by name, keeps the reason of each decision, and lets globs overrule it.
"""

from __future__ import annotations

import difflib
import math
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_namo.regions import Region, find_regions, is_fsdp2, reshard, stored_shape

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED_CONVS)
_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, *_CONVS)
_DATA_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
# Where torch.compile, FSDP1 and activation checkpointing, and where Fabric keep the module that they wrap.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPED |= {"_forward_module", "_original_module"}


_EMBEDDING_NAME = re.compile(r"embed|(^|[._])(emb|pos)([._]|$)")  # of bare parameters, such as position tables


class Route(NamedTuple):
    """Where a parameter went, and why.

    Attributes:
        name: Its first name in the module, without what wrappers add.
        shape: Its full shape as stored, whatever part of it lies on this process.
        group: Name of its parameter group, or "frozen".
        reason: Why, in words.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    reason: str


class ParameterGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer, with the reasons behind them: ``print`` them for a table.

    Each group is ``{"params": [(name, parameter), ...], "name": str, "orthogonalize": bool}``. Groups of
    matrices also have ``"transposed"`` (the stored first dimension is the input) and ``"blocks"`` (the true
    matrices stacked by rows in one parameter: 1 for a single one, k for k equal ones, a list of row counts
    for unequal ones). torch's optimizers write into these dicts: a second optimizer needs its own groups.

    Attributes:
        routes: One `Route` per parameter, in the order of the module.
        templates: For every parameter, frozen ones too, the keys that its group has beside ``"params"``.
        names: For every parameter its name, as in `Route`.
        regions: For every parameter its full shape, and the region of it that lies on this process.
        module: Weak reference to the module.
    """

    def __init__(self, module: nn.Module, entries: list[_Entry], regions: _Regions) -> None:
        groups: dict[str, dict[str, Any]] = {}
        for entry in entries:
            if entry.parameter.requires_grad:
                template = entry.template
                group = groups.setdefault(template["name"], {"params": [], **template})
                group["params"].append((entry.name, entry.parameter))
        super().__init__(sorted(groups.values(), key=lambda group: not group["orthogonalize"]))
        self.routes = [entry.route for entry in entries]
        self.templates = {entry.parameter: entry.template for entry in entries}
        self.names = {entry.parameter: entry.name for entry in entries}
        self.regions = regions
        self.module = weakref.ref(module)

    def __str__(self) -> str:
        cells = [("name", "shape", "group", "reason")]
        cells += [(r.name, _times(r.shape) or "scalar", r.group, r.reason) for r in self.routes]
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        table = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in cells]
        sizes: dict[str, list[int]] = {"matrices": [], "AdamW": [], "frozen": []}
        for route in self.routes:
            part = {"adamw": "AdamW", "frozen": "frozen"}.get(route.group, "matrices")
            sizes[part].append(math.prod(route.shape))
        counts = [f"{len(found)} {part} ({sum(found):,} elements)" for part, found in sizes.items()]
        return "\n".join([*table, f"{len(self.routes)} parameters: {', '.join(counts)}"])


def split_parameters(
    module: nn.Module,
    *,
    adamw: str | Iterable[str] = (),
    orthogonalize: str | Iterable[str] = (),
    blocks: Mapping[str, int | Sequence[int]] | None = None,
) -> ParameterGroups:
    """Split a module's parameters into hidden matrices, to be orthogonalized, and the rest, for AdamW.

    To AdamW go embeddings; output heads (tied to an embedding, returned by Hugging Face's
    ``get_output_embeddings()``, or the last Linear as wide as an embedding's vocabulary); norms; biases,
    vectors and scalars, also with dimensions of size 1 (class tokens, LayerScale); bare parameters called
    "...embed...", "emb" or "pos" (position tables); complex parameters. All else with two or more dimensions
    is a matrix, flattened from dimension 1. Frozen parameters are in no group. Globs (`fnmatch`, case-sensitive) see
    all names of a parameter, cleaned of ``_orig_mod.``, ``_fsdp_wrapped_module.`` and the like.

    Args:
        module: The module, before or after a strategy has sharded or wrapped it.
        adamw: Globs of parameters that take AdamW whatever the routing says; a string is one glob.
        orthogonalize: Globs of parameters to orthogonalize whatever the routing says.
        blocks: Glob -> how the rows (output features) of a parameter divide into matrices of their own, as in
            fused q/k/v: a number of equal blocks, or the row count of each block in order.

    Returns:
        The groups, ready for ``torch.optim.Optimizer``, those of matrices first.

    Raises:
        ValueError: If a parameter is uninitialized (lazy), a glob matches nothing or contradicts another, a
            vector is to be orthogonalized, blocks do not fit the rows, or no trainable matrix is left.

    Example:
        >>> groups = split_parameters(model, adamw="*.gate.weight", blocks={"*.qkv.weight": 3})
        >>> print(groups)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected a module, whose parameters are split by what they are, but got {module!r:.80}.")
    reshard(module)
    regions = find_regions(module)
    entries = _find_entries(module, regions)
    heads = {*_declared_heads(module), *_head_by_width(module)}
    for entry in entries:
        entry.adamw = _adamw_reason(entry, heads)
    _overrule(entries, adamw, orthogonalize)
    _set_blocks(entries, blocks or {})
    if not any(entry.adamw is None and entry.parameter.requires_grad for entry in entries):
        listed = [f"{entry.name} ({entry.route.reason})" for entry in entries]
        more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
        raise ValueError(
            f"Expected a trainable matrix to orthogonalize in {type(module).__name__}, but got "
            f"{', '.join(listed[:20]) or 'no parameters'}{more}. Name matrices with "
            "orthogonalize=('glob', ...), or use torch.optim.AdamW."
        )
    return ParameterGroups(module, entries, regions)


_Regions = dict[nn.Parameter, tuple[tuple[int, ...], Region]]


class _Use(NamedTuple):
    """One place where a parameter is registered: its name in the module, and its label in its layer."""

    name: str
    label: str
    owner: nn.Module


@dataclass
class _Entry:
    """What is known of one parameter; a tied one has several uses, and is named after the first."""

    parameter: nn.Parameter
    shape: tuple[int, ...]
    uses: list[_Use]
    adamw: str | None = None  # why it takes AdamW; None: it is a matrix
    glob: str | None = None  # the glob that overruled the routing, in words
    blocks: int | list[int] = 1

    @property
    def name(self) -> str:
        return self.uses[0].name

    @property
    def transposed(self) -> bool:
        owner = self.uses[0].owner
        return isinstance(owner, _TRANSPOSED_CONVS) or _is_hugging_face_conv1d(owner)

    @property
    def rows(self) -> int:
        """Rows of the true matrix: output features."""
        return stored_shape(self.shape)[self.transposed]

    @property
    def template(self) -> dict[str, Any]:
        """The keys of its group but the parameters."""
        if self.adamw is not None:
            return {"name": "adamw", "orthogonalize": False}
        sizes = [self.blocks] if isinstance(self.blocks, int) else self.blocks
        suffix = "" if self.blocks == 1 else "_blocks_" + "_".join(map(str, sizes))
        name = f"matrices{'_transposed' * self.transposed}{suffix}"
        return {"name": name, "orthogonalize": True, "transposed": self.transposed, "blocks": self.blocks}

    @property
    def route(self) -> Route:
        words = [self.glob or self.adamw or "matrix"]
        if self.adamw is None and len(self.shape) > 2:
            words.append(f"flattened to {_times(stored_shape(self.shape))}")
        if self.adamw is None and self.transposed:
            words.append("stored transposed")
        if len(self.uses) > 1:
            more = f" and {len(self.uses) - 2} more" if len(self.uses) > 2 else ""
            words.append(f"tied to {self.uses[1].name}{more}")
        reason = ", ".join(words)
        if self.parameter.requires_grad:
            return Route(self.name, self.shape, self.template["name"], reason)
        return Route(self.name, self.shape, "frozen", f"requires_grad=False; else {reason}")


def _find_entries(module: nn.Module, regions: _Regions) -> list[_Entry]:
    """One entry per parameter, in the order of the module, with all its uses."""
    modules = list(_walk(module))
    at = dict(modules)  # where modules share a cleaned path: the innermost
    entries: dict[nn.Parameter, _Entry] = {}
    for path, owner in modules:
        for label, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            use = _Use(".".join([*path, label]), label, owner)
            if isinstance(owner, ParametrizationList):  # its path is (..., layer, "parametrizations", tensor)
                tensor = path[-1] if label == "original" else f"{path[-1]}.{label}"
                use = _Use(use.name, tensor, at[path[:-2]])
            elif isinstance(owner, nn.ParameterList | nn.ParameterDict):
                use = use._replace(label=".".join([*path[-1:], label]))
            entry = entries.setdefault(parameter, _Entry(parameter, regions[parameter][0], []))
            if all(use.name != other.name for other in entry.uses):
                entry.uses.append(use)
    return list(entries.values())


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers (torch.compile, FSDP1, checkpointing, Fabric) add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def parameter_label(name: str, module: nn.Module | None) -> str:
    """A parameter in messages, ``"0.weight of Generator"``: sub-modules with optimizers of their own share names.

    Args:
        name: Its name in the module.
        module: Whose class is named, without what wrappers (DDP, FSDP, torch.compile, Fabric) add; None: no class is.
    """
    if module is None:
        return name
    while inner := next((child for key, child in module._modules.items() if _wraps(module, key)), None):
        module = inner
    cls = type(module)
    return f"{name} of {(cls.__mro__[2] if is_fsdp2(module) else cls).__name__}"


def _wraps(module: nn.Module, name: str) -> bool:
    """Whether a module only wraps its child of that name."""
    return name in _WRAPPED or (name == "module" and isinstance(module, _DATA_PARALLEL))


def _walk(module: nn.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Every module with its cleaned path, in the order of the module; a shared one at each of its paths."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, path if _wraps(module, name) else (*path, name))


def _declared_heads(module: nn.Module) -> Iterator[nn.Parameter]:
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


def _head_by_width(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the last Linear as wide as an embedding's vocabulary, unless it is a hidden layer.

    Hidden is one that a later Linear reads, or that leads back to the model's own width, which may by chance
    be the length of a table too (GPT-2 medium: 1024 positions, width 1024).
    """
    tables = [table for table in module.modules() if isinstance(table, _EMBEDDINGS)]
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


def _is_hugging_face_conv1d(owner: nn.Module) -> bool:
    return ("transformers.pytorch_utils", "Conv1D") in ((c.__module__, c.__name__) for c in type(owner).__mro__)


def _is_layer(owner: nn.Module) -> bool:
    """Whether a module is one whose weights are matrices."""
    return isinstance(owner, _LAYERS) or _is_hugging_face_conv1d(owner)


def _is_norm(owner: nn.Module) -> bool:
    return not _is_layer(owner) and any("norm" in c.__name__.lower() for c in type(owner).__mro__)


def _is_weight(use: _Use) -> bool:
    """Whether this is a layer's weight, and not the norm that weight_norm keeps beside it."""
    return _is_layer(use.owner) and "weight" in use.label and not use.label.endswith(("_g", ".original0"))


def _adamw_reason(entry: _Entry, heads: set[nn.Parameter]) -> str | None:
    """Why a parameter is no hidden matrix; None if it is one."""
    first, shape = entry.uses[0], entry.shape
    if entry.parameter.is_complex():
        return "complex"
    if any(isinstance(use.owner, _EMBEDDINGS) for use in entry.uses):
        return "embedding" if isinstance(first.owner, _EMBEDDINGS) else "output head"
    if any(_is_norm(use.owner) for use in entry.uses):
        return "norm"
    if len(shape) < 2:
        return "scalar" if not shape else "bias" if "bias" in first.label else "vector"
    if entry.parameter in heads:
        return "output head"
    if sum(size > 1 for size in shape) < 2 and not any(_is_weight(use) for use in entry.uses):
        return "vector with dimensions of size 1"
    if any(_EMBEDDING_NAME.search(use.label.lower()) and not _is_layer(use.owner) for use in entry.uses):
        return "embedding by its name"
    return None


def _match(keyword: str, globs: str | Iterable[str], entries: list[_Entry]) -> Iterator[tuple[_Entry, list[str]]]:
    """The entries that globs match by any of their names, each with the globs that match it."""
    globs = [globs] if isinstance(globs, str) else list(globs)
    matched = [[g for g in globs if any(fnmatchcase(use.name, g) for use in e.uses)] for e in entries]
    for glob in globs:
        if not any(glob in found for found in matched):
            names = [use.name for entry in reversed(entries) for use in entry.uses]
            tails = {name.split(".", k)[-1]: name for name in names for k in range(name.count(".") + 1)}
            close = difflib.get_close_matches(glob.strip("*."), tails, n=3, cutoff=0.0)
            nearest = ", ".join(dict.fromkeys(tails[tail] for tail in close))
            raise ValueError(
                f"Expected {glob!r} in {keyword} to match a parameter, but got no match. Nearest: {nearest}."
            )
    return ((entry, found) for entry, found in zip(entries, matched, strict=True) if found)


def _overrule(entries: list[_Entry], adamw: str | Iterable[str], orthogonalize: str | Iterable[str]) -> None:
    """Let the user's globs have the last word over the routing."""
    for entry, globs in _match("adamw", adamw, entries):
        entry.adamw = entry.glob = f"glob {globs[0]!r} in adamw"
    for entry, globs in _match("orthogonalize", orthogonalize, entries):
        glob = f"glob {globs[0]!r} in orthogonalize"
        if entry.glob is not None:
            raise ValueError(
                f"Expected one glob to decide on {entry.name}, but got {entry.glob} and {glob}. Narrow one."
            )
        if len(entry.shape) < 2 or entry.parameter.is_complex():
            got = "is complex" if entry.parameter.is_complex() else f"has shape {entry.shape}"
            raise ValueError(
                f"Expected {glob} to match real parameters of two or more dimensions, but {entry.name} "
                f"{got}. Narrow the glob."
            )
        entry.adamw, entry.glob = None, glob


def _set_blocks(entries: list[_Entry], blocks: Mapping[str, int | Sequence[int]]) -> None:
    """Divide matrices into row blocks as the user asks."""
    for entry, globs in _match("blocks", blocks, entries):
        if len(globs) > 1:
            raise ValueError(f"Expected one glob in blocks for {entry.name}, but got {' and '.join(globs)}.")
        if entry.adamw is not None:
            raise ValueError(
                f"Expected {globs[0]!r} in blocks to match matrices, but {entry.name} takes AdamW "
                f"({entry.adamw}). Narrow the glob, or name the parameter in orthogonalize."
            )
        asked, rows = blocks[globs[0]], entry.rows
        equal = [rows // asked] * asked if isinstance(asked, int) and 1 <= asked <= rows else []
        sizes = equal if isinstance(asked, int) else list(asked)
        if sum(sizes) != rows or min(sizes, default=0) < 1:
            raise ValueError(
                f"Expected blocks of {entry.name} to divide its {rows} rows (output features), or to be row "
                f"counts that add up to them. Got {asked}."
            )
        entry.blocks = asked if isinstance(asked, int) else sizes if len(sizes) > 1 else 1


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
