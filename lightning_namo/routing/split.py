"""`split_parameters`: a module's parameters in groups, each with its reason.

Muon and its kin orthogonalize the update of a hidden weight matrix. Embeddings, output heads, norms, biases
and scalars are not hidden matrices and take AdamW. `split_parameters` decides by identity and by module rather
than by name, keeps the reason of each decision and how sure it is, and lets globs overrule it.
"""

from __future__ import annotations

import json
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_namo.routing.batches import find_batch
from lightning_namo.routing.candidates import OUTPUT_HEAD, Candidate, Reason, Side, Use, times
from lightning_namo.routing.fused import adapter_blocks, find_fused, possible
from lightning_namo.routing.globs import Blocks, overrule, set_batches, set_blocks
from lightning_namo.routing.heads import find_heads, find_unread, judge_last, leading_back
from lightning_namo.routing.layers import EMBEDDINGS, Tree
from lightning_namo.routing.reasons import decide, first_layer, is_depthwise, is_weight
from lightning_namo.sharding.batch import Box
from lightning_namo.sharding.discovery import find_regions, reshard
from lightning_namo.sharding.layout import ShardRegion

ROUTING = ("adamw", "orthogonalize", "blocks", "batched", "transposed", "matrix", "heads", "first_layers")
"""The arguments that decide on the routes."""


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
        regions: For every parameter its full shape, and the region of it that this process holds.
        module: Weak reference to the module.
    """

    def __init__(self, module: nn.Module, candidates: list[Candidate], regions: _Regions) -> None:
        groups: dict[str, dict[str, Any]] = {}
        for candidate in candidates:
            if candidate.parameter.requires_grad:
                template = candidate.template
                group = groups.setdefault(template["name"], {"params": [], **template})
                group["params"].append((candidate.name, candidate.parameter))
        super().__init__(sorted(groups.values(), key=lambda group: not group["orthogonalize"]))
        self.routes = [candidate.route for candidate in candidates]
        self.templates = {candidate.parameter: candidate.template for candidate in candidates}
        self.names = {candidate.parameter: candidate.name for candidate in candidates}
        self.regions = regions
        self.module = weakref.ref(module)

    def __str__(self) -> str:
        cells = [("name", "shape", "group", "confidence", "reason")]
        cells += [(r.name, times(r.shape) or "scalar", r.group, r.confidence, r.reason) for r in self.routes]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        table = ["  ".join([*map(str.ljust, row[:4], widths), row[4]]) for row in cells]
        return "\n".join([*table, *self.summary])

    @property
    def waits(self) -> bool:
        """Whether an output head is trained while all matrices are frozen, to be orthogonalized later."""
        trained = [route for route in self.routes if route.group != "frozen"]
        frozen = any(template["orthogonalize"] for template in self.templates.values())
        has_head = any(len(route.shape) > 1 and route.reason.startswith(OUTPUT_HEAD) for route in trained)
        return frozen and has_head and all(route.group == "adamw" for route in trained)

    @property
    def summary(self) -> list[str]:
        """Lines: how many parameters went where, and which of them a reader should check."""
        sizes: dict[str, list[int]] = {"matrices": [], "AdamW": [], "frozen": []}
        for route in self.routes:
            part = {"adamw": "AdamW", "frozen": "frozen"}.get(route.group, "matrices")
            sizes[part].append(math.prod(route.shape))
        counts = [f"{len(found)} {part} ({sum(found):,} elements)" for part, found in sizes.items()]
        lines = [f"{len(self.routes)} parameters: {', '.join(counts)}"]
        if self.waits:
            lines.append("Nothing is orthogonalized until frozen matrices are trained: AdamW trains the head alone.")
        doubtful = [route.name for route in self.routes if route.confidence == "please check"]
        if doubtful:
            more = f" and {len(doubtful) - 20} more" if len(doubtful) > 20 else ""
            lines.append(f"Please check {len(doubtful)} of them: {', '.join(doubtful[:20])}{more}.")
        return lines

    def to_json(self) -> str:
        """The routes as JSON: a list with name, shape, group, confidence and reason of every parameter."""
        return json.dumps([route._asdict() for route in self.routes], indent=2)


def split_parameters(
    module: nn.Module,
    *,
    adamw: str | Iterable[str] = (),
    orthogonalize: str | Iterable[str] = (),
    blocks: Blocks | None = None,
    batched: str | Iterable[str] = (),
    transposed: str | Iterable[str] = (),
    matrix: str | Iterable[str] = (),
    heads: Side = "adamw",
    first_layers: Side = "adamw",
) -> ParameterGroups:
    """Split a module's parameters into hidden matrices, to be orthogonalized, and the rest, for AdamW.

    AdamW takes embeddings; output heads (tied to an embedding, returned by Hugging Face's ``get_output_embeddings()``,
    called so at the top of a model, or the last Linear, which nothing follows); norms; biases, vectors and scalars,
    also with dimensions of size 1; routers of experts; first layers (patch embeddings, stems of convolutions); what
    state-space models keep beside matrices (A, D, dt); depthwise convolutions; complex parameters; and bare parameters
    that are called as position tables, tokens, codebooks, latents, prompts, scales and coefficients are.
    Everything else of two or more dimensions is a matrix, flattened from dimension 1, but for batches of them: a bare
    parameter of three dimensions (experts: along the first, in the orientation that transformers' classes declare, else
    with output features as rows), a grouped convolution, a matrix for each group, and adapters of experts or of fused
    projections. Frozen parameters are in no group. Globs (`fnmatch`, case-sensitive) see all names of a parameter,
    cleaned of ``_orig_mod.``, ``_fsdp_wrapped_module.`` and the like. docs/routing.md has the families one by one.

    Args:
        module: The module, before or after a strategy has sharded or wrapped it.
        adamw: Globs of parameters that take AdamW whatever the routing says; a string is one glob.
        orthogonalize: Globs of parameters to orthogonalize whatever the routing says.
        blocks: Glob -> how the rows (output features) of a parameter divide into matrices of their own, as in
            fused q/k/v: a number of equal blocks, the row count of each block in order, or "auto": as its module has
            them, or "heads": q, k and v by attention heads. One of these two words alone: all matrices so, as far as
            it is known.
        batched: Globs of parameters that are batches of matrices along their first dimension, such as experts.
        transposed: Globs of parameters that are stored with input features as rows; so are the matrices of a batch.
        matrix: Globs of parameters that are one matrix, flattened from dimension 1, and no batch.
        heads: "matrix": output heads that are not tied to an embedding are matrices, too.
        first_layers: "matrix": patch embeddings and stems are matrices, too.

    Returns:
        The groups, ready for ``torch.optim.Optimizer``, those of matrices first.

    Raises:
        ValueError: If a parameter is uninitialized (lazy), a glob matches nothing or contradicts another, a
            vector is to be orthogonalized, blocks do not fit the rows, or no trainable matrix is left; but an output
            head may be trained alone while all matrices are frozen (`BackboneFinetuning`).

    Example:
        >>> groups = split_parameters(model, adamw="*.gate.weight", blocks={"*.qkv.weight": 3})
        >>> print(groups)
    """
    groups = route_parameters(**locals())
    if not any(group["orthogonalize"] for group in groups) and not groups.waits:
        raise ValueError(_nothing(module, groups))
    return groups


def check_routing(given: Mapping[str, Any]) -> None:
    """Refuse values of the routing's arguments that mean nothing for any module.

    Raises:
        ValueError: With the argument's name.
    """
    for key in ("heads", "first_layers"):
        if given[key] not in ("adamw", "matrix"):
            raise ValueError(f"Expected {key} to be 'adamw' or 'matrix'. Got {given[key]!r}.")
    for key in ("adamw", "orthogonalize", "batched", "transposed", "matrix"):
        if not isinstance(given[key], Iterable):
            raise ValueError(f"Expected {key} to be globs over parameter names. Got {given[key]!r}.")
    blocks = given["blocks"]
    if blocks is not None and not isinstance(blocks, Mapping) and blocks not in ("auto", "heads"):
        raise ValueError(f"Expected blocks to be 'auto', 'heads' or a mapping from globs to blocks. Got {blocks!r}.")
    for glob, asked in blocks.items() if isinstance(blocks, Mapping) else ():
        if isinstance(asked, bool) or not isinstance(asked, int | Sequence):
            raise ValueError(
                f"Expected blocks of {glob!r} to be 'auto', 'heads', a number of blocks, or the rows of each. "
                f"Got {asked!r}."
            )


def route_parameters(
    module: nn.Module,
    adamw: str | Iterable[str],
    orthogonalize: str | Iterable[str],
    blocks: Blocks | None,
    batched: str | Iterable[str],
    transposed: str | Iterable[str],
    matrix: str | Iterable[str],
    heads: Side,
    first_layers: Side,
) -> ParameterGroups:
    """As `split_parameters`, also for a module without a trainable matrix."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected a module, whose parameters are split by what they are, but got {module!r:.80}.")
    check_routing(locals())
    reshard(module)
    regions = find_regions(module)
    tree = Tree(module)
    candidates = _find_candidates(tree, regions)
    _judge(tree, candidates, heads, first_layers)
    overrule(candidates, adamw, orthogonalize)
    matrices = [candidate for candidate in candidates if candidate.is_matrix]
    for candidate in matrices:
        if not is_depthwise(candidate):
            find_batch(candidate, tree)
    set_batches(candidates, batched, transposed, matrix)
    for candidate in matrices:
        candidate.blocks = adapter_blocks(candidate)
    fused = {candidate.name: find_fused(candidate, tree) for candidate in matrices}
    set_blocks(candidates, blocks or {}, fused)
    for candidate in matrices:
        if candidate.blocks == 1 and (words := possible(fused[candidate.name])) is not None:
            candidate.notes.append(words)
    return ParameterGroups(module, candidates, regions)


def _judge(tree: Tree, candidates: list[Candidate], heads: Side, first_layers: Side) -> None:
    """Decide on every parameter; on heads and first layers as the user says."""
    back = leading_back(tree, candidates)
    of_heads = find_heads(tree, back)
    for candidate in candidates:
        decide(candidate, tree)
        if candidate.is_matrix and candidate.parameter in of_heads:
            _send(candidate, of_heads[candidate.parameter], heads)
        if candidate.is_matrix and is_depthwise(candidate):
            candidate.adamw = "depthwise convolution"
    layers = [c for c in candidates if is_weight(c.uses[0]) or any(isinstance(u.owner, EMBEDDINGS) for u in c.uses)]
    matrices = [candidate for candidate in candidates if candidate.is_matrix]
    first = {c: first_layer(c, tree, c.uses[0].owner is layers[0].uses[0].owner) for c in matrices if layers}
    for candidate, words in first.items() if None in first.values() else ():  # else there is no body after them
        if words is not None:
            _send(candidate, Reason(words, "assumed"), first_layers)
    last, doubt = judge_last(tree, candidates, back)
    of_last = Reason(f"{OUTPUT_HEAD}, the last Linear, which nothing follows", "assumed")
    for candidate in last:
        if OUTPUT_HEAD not in ", ".join(candidate.notes):
            _send(candidate, of_last if doubt is None else Reason(doubt, "please check"), heads)
    has_body = sum(candidate.is_matrix for candidate in candidates) > 1
    for candidate, doubt in find_unread(tree, candidates, back).items() if has_body else ():
        if not candidate.notes:
            _send(candidate, Reason(doubt, "please check"), heads)


def _send(candidate: Candidate, reason: Reason, side: Side) -> None:
    """Send a matrix of some role to AdamW, or leave it a matrix and say what it is; a doubtful one stays a matrix."""
    if reason.confidence == "please check" and side == "matrix":
        return  # there is no doubt where the user wants it a matrix whatever it is
    candidate.confidence = reason.confidence
    if side == "adamw" and reason.confidence != "please check":
        candidate.adamw = reason.words
    else:
        candidate.notes.append(reason.words)


def _nothing(module: nn.Module, groups: ParameterGroups) -> str:
    """The message of a module without a trainable matrix: what it has, and what to do."""
    trained = [route for route in groups.routes if route.group != "frozen"]
    frozen = len(groups.routes) - len(trained)
    found = Counter(route.reason.partition(", tied")[0] for route in trained)
    kinds = ", ".join(f"{count} {words}" for words, count in found.most_common(6))
    more = f" and {len(found) - 6} kinds more" if len(found) > 6 else ""
    got = f"{kinds or 'no trainable parameter'}{more}{f', {frozen} frozen' if frozen else ''}"
    return (
        f"Expected a trainable matrix to orthogonalize in {type(module).__name__}. Got {got}. Use AdamW: "
        "build_optimizer has nothing to orthogonalize. Or name matrices with orthogonalize=('glob', ...)."
    )


_Regions = dict[nn.Parameter, tuple[tuple[int, ...], ShardRegion | Box]]


def _find_candidates(tree: Tree, regions: _Regions) -> list[Candidate]:
    """One candidate per parameter, in the order of the module, with all its uses."""
    candidates: dict[nn.Parameter, Candidate] = {}
    for path, owner in tree.all:
        for label, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            use = Use(".".join([*path, label]), label, owner, path)
            if isinstance(owner, ParametrizationList):  # its path is (..., layer, "parametrizations", tensor)
                tensor = path[-1] if label == "original" else f"{path[-1]}.{label}"
                use = Use(use.name, tensor, tree.modules[path[:-2]], path[:-2])
            elif isinstance(owner, nn.ParameterList | nn.ParameterDict):  # of the module around it
                use = Use(use.name, ".".join([*path[-1:], label]), tree.modules[path[:-1]], path[:-1])
            candidate = candidates.setdefault(parameter, Candidate(parameter, regions[parameter][0], []))
            if all(use.name != other.name for other in candidate.uses):
                candidate.uses.append(use)
    return list(candidates.values())
