"""`split_parameters`: a module's parameters in groups, each with its reason.

Muon and its kin orthogonalize the update of a hidden weight matrix. Embeddings, output heads, norms, biases
and scalars are not hidden matrices and take AdamW. `split_parameters` decides by identity and by module rather
than by name, keeps the reason of each decision, and lets globs overrule it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_namo.routing.globs import overrule, set_batches, set_blocks
from lightning_namo.routing.names import walk
from lightning_namo.routing.reasons import (
    Candidate,
    Use,
    adamw_reason,
    declared_heads,
    find_batch,
    head_by_width,
    times,
)
from lightning_namo.sharding.batch import Box
from lightning_namo.sharding.discovery import find_regions, reshard
from lightning_namo.sharding.layout import ShardRegion


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
        cells = [("name", "shape", "group", "reason")]
        cells += [(r.name, times(r.shape) or "scalar", r.group, r.reason) for r in self.routes]
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
    batched: str | Iterable[str] = (),
    transposed: str | Iterable[str] = (),
    matrix: str | Iterable[str] = (),
) -> ParameterGroups:
    """Split a module's parameters into hidden matrices, to be orthogonalized, and the rest, for AdamW.

    AdamW takes embeddings; output heads (tied to an embedding, returned by Hugging Face's
    ``get_output_embeddings()``, or the last Linear as wide as an embedding's vocabulary); norms; biases,
    vectors and scalars, also with dimensions of size 1 (class tokens, LayerScale); bare parameters called
    "...embed...", "emb" or "pos" (position tables); depthwise convolutions; complex parameters. Everything else of two
    or more dimensions is a matrix, flattened from dimension 1, but for batches of them: a bare parameter of three
    dimensions (experts: along the first, in the orientation that transformers' classes declare, else with output
    features as rows), and a grouped convolution, a matrix for each group. Frozen parameters are in no group. Globs
    (`fnmatch`, case-sensitive) see all names of a parameter, cleaned of ``_orig_mod.``, ``_fsdp_wrapped_module.`` and
    the like.

    Args:
        module: The module, before or after a strategy has sharded or wrapped it.
        adamw: Globs of parameters that take AdamW whatever the routing says; a string is one glob.
        orthogonalize: Globs of parameters to orthogonalize whatever the routing says.
        blocks: Glob -> how the rows (output features) of a parameter divide into matrices of their own, as in
            fused q/k/v: a number of equal blocks, or the row count of each block in order.
        batched: Globs of parameters that are batches of matrices along their first dimension, such as experts.
        transposed: Globs of parameters that are stored with input features as rows; so are the matrices of a batch.
        matrix: Globs of parameters that are one matrix, flattened from dimension 1, and no batch.

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
    candidates = _find_candidates(module, regions)
    heads = {*declared_heads(module), *head_by_width(module)}
    for candidate in candidates:
        candidate.adamw = adamw_reason(candidate, heads)
        if candidate.adamw is None:
            find_batch(candidate)
    overrule(candidates, adamw, orthogonalize)
    set_batches(candidates, batched, transposed, matrix)
    set_blocks(candidates, blocks or {})
    if not any(candidate.adamw is None and candidate.parameter.requires_grad for candidate in candidates):
        listed = [f"{candidate.name} ({candidate.route.reason})" for candidate in candidates]
        more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
        raise ValueError(
            f"Expected a trainable matrix to orthogonalize in {type(module).__name__}, but got "
            f"{', '.join(listed[:20]) or 'no parameters'}{more}. Name matrices with "
            "orthogonalize=('glob', ...), or use torch.optim.AdamW."
        )
    return ParameterGroups(module, candidates, regions)


_Regions = dict[nn.Parameter, tuple[tuple[int, ...], ShardRegion | Box]]


def _find_candidates(module: nn.Module, regions: _Regions) -> list[Candidate]:
    """One candidate per parameter, in the order of the module, with all its uses."""
    modules = list(walk(module))
    at = dict(modules)  # where modules share a cleaned path: the innermost
    candidates: dict[nn.Parameter, Candidate] = {}
    for path, owner in modules:
        for label, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            use = Use(".".join([*path, label]), label, owner)
            if isinstance(owner, ParametrizationList):  # its path is (..., layer, "parametrizations", tensor)
                tensor = path[-1] if label == "original" else f"{path[-1]}.{label}"
                use = Use(use.name, tensor, at[path[:-2]])
            elif isinstance(owner, nn.ParameterList | nn.ParameterDict):
                use = use._replace(label=".".join([*path[-1:], label]))
            candidate = candidates.setdefault(parameter, Candidate(parameter, regions[parameter][0], []))
            if all(use.name != other.name for other in candidate.uses):
                candidate.uses.append(use)
    return list(candidates.values())
