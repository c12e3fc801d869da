"""Output heads, by role: tied, declared, called so at the top of a model, or the last Linear, which nothing follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_namo.routing.candidates import OUTPUT_HEAD, Candidate, Confidence, Reason
from lightning_namo.routing.fused import QKV, UNFUSED
from lightning_namo.routing.layers import CONVS, EMBEDDINGS, Tree, is_linear, is_lora, is_norm
from lightning_namo.routing.names import class_name, words
from lightning_namo.routing.reasons import is_weight

_SURE = {"lm_head", "classifier", "score", "qa_outputs"}
_WHOLE = {*_SURE, "seq_relationship", "class_embed", "logits_proj", "logits_dense"}
_LAST_WORDS = {"head", "heads", "classifier", "classifiers", "score", "scores", "logits", "prediction", "predictions"}
_NOT = {"pre", "pool", "pooler", "pooling", "multi", "attention", "attn", "conv"}  # pre_classifier
_OUTPUTS = ({"head", "classifier", "logits", "decoder"}, {"out", "output", "final"})  # of a head's layers, these first
_VISION = {"torchvision", "timm"}  # whose models call their head fc
_BODY = {"pool", "pooler", "pooling", "projection", "projector", "connector", "merger", "adapter"}
_BODY |= {"modulation", "ada"}


def find_heads(tree: Tree, back: set[nn.Parameter]) -> dict[nn.Parameter, Reason]:
    """The weights of output heads that are declared, or called so outside of blocks, with the reason for each.

    One that is called so, but as wide as the model, may well be hidden: "please check".
    """
    heads: dict[nn.Parameter, Reason] = {}
    paths = {module: path for path, module in tree.modules.items()}
    for head, cls in _declared(tree.root):
        if head in paths:
            heads |= dict.fromkeys(_outputs(paths[head], tree), Reason(f"{OUTPUT_HEAD}, declared by {cls}"))
    outer: tuple[str, ...] | None = None
    for path in tree.modules:
        is_inside = outer is not None and path[: len(outer)] == outer
        if is_inside or not _is_called_head(path, tree):
            continue
        outer, called = path, path[-1]
        for parameter in _outputs(path, tree):
            doubt = called not in _SURE | {"head"} and "head" in words(called) and parameter in back
            how: Confidence = "sure" if called in _SURE else "please check" if doubt else "assumed"
            but = ", but as wide as the model" if doubt else ""
            heads.setdefault(parameter, Reason(f"{OUTPUT_HEAD}, called {called}{but}", how))
    return heads


def leading_back(tree: Tree, candidates: list[Candidate]) -> set[nn.Parameter]:
    """Weights as wide as what embeddings give or norms take, and not much narrower than what they read."""
    widths = {module.embedding_dim for module in tree.modules.values() if isinstance(module, EMBEDDINGS)}
    widths |= {c.shape[0] for c in candidates for use in c.uses if is_norm(use.owner) and len(c.shape) == 1}
    matrices = (candidate for candidate in candidates if len(candidate.shape) > 1)
    return {c.parameter for c in matrices if c.rows in widths and 8 * c.rows >= max(c.stored)}


def _declared(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What any submodule returns as its output embeddings (Hugging Face), and the class that does."""
    for submodule in root.modules():
        getter = getattr(type(submodule), "get_output_embeddings", None)
        if getter is None:
            continue
        try:
            head = getter(submodule)
        except (AttributeError, NotImplementedError):  # base classes offer it to models that have no head
            continue
        if isinstance(head, nn.Module):
            yield head, class_name(submodule)


def _is_called_head(path: tuple[str, ...], tree: Tree) -> bool:
    """Whether a module is called what heads are called, and is in none of several like blocks."""
    if not path or is_lora(path, ""):
        return False
    named = [word for word in words(path[-1]) if not word.isdigit()]
    module, parent = tree.modules[path], tree.modules[path[:-1]]
    is_fc = path[-1] == "fc" and any(cls.__module__.partition(".")[0] in _VISION for cls in type(parent).__mro__)
    if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
        return True
    is_named = path[-1] in _WHOLE or not _LAST_WORDS.isdisjoint(named[-1:]) or named[:1] == ["predict"] or is_fc
    return is_named and _NOT.isdisjoint([*named, *words(type(module).__name__)]) and not tree.in_block(path)


def _outputs(path: tuple[str, ...], tree: Tree) -> list[nn.Parameter]:
    """The weights of a head's output layer; its other layers are hidden, and all are if a norm follows them."""
    if isinstance(tree.modules[path], nn.ModuleList | nn.ModuleDict):  # several heads
        return [parameter for name in tree.children(path) for parameter in _outputs((*path, name), tree)]
    module = tree.modules[path]
    if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
        tails: Any = module.tail
        return [module.head.weight, *(tail[-1].weight for tail in tails)]
    inside = tree.inside(path)
    layers = [(at, module) for at, module in inside if _maps(at, tree) and not tree.in_block(at, len(path))]
    if not layers:
        return [p for label, p in tree.modules[path].named_parameters(recurse=False) if label == "weight"]
    if is_norm([module for _, module in inside if next(module.parameters(recurse=False), None) is not None][-1]):
        return []
    read = {_reads(module) for _, module in layers}
    several = [m for _, m in layers if is_linear(m) and _gives(m) not in read]  # of boxes and classes
    called = [[module for at, module in layers if at != path and said & {*words(at[-1])}] for said in _OUTPUTS]
    outputs = next(filter(None, called), [module for _, module in layers])
    return [parameter for module in {outputs[-1]: 0, **dict.fromkeys(several)} for parameter in module.parameters()]


def _gives(module: nn.Module) -> int:
    """The features that a Linear, transformers' Conv1D or a convolution gives."""
    sizes = (getattr(module, name, None) for name in ("out_features", "nf", "out_channels"))
    return next((size for size in sizes if isinstance(size, int)), 0)


def _reads(module: nn.Module) -> int:
    """The features that one reads."""
    sizes = (getattr(module, name, None) for name in ("in_features", "nx", "in_channels"))
    return next((size for size in sizes if isinstance(size, int)), 0)


def _maps(path: tuple[str, ...], tree: Tree) -> bool:
    """Whether a module is a Linear or a convolution that may be a head's."""
    module, parent = tree.modules[path], tree.modules[path[:-1]]
    is_part = isinstance(parent, nn.MultiheadAttention) or is_lora(path, "")
    return (is_linear(module) or isinstance(module, CONVS)) and not is_part


def judge_last(tree: Tree, candidates: list[Candidate], back: set[nn.Parameter]) -> tuple[list[Candidate], str | None]:
    """The weights of the last layer, where it is a Linear outside of blocks that follows a matrix.

    Returns:
        Them, and what speaks against their being an output head; None: nothing does.
    """
    uses = [(use, candidate) for candidate in candidates for use in candidate.uses]
    order = {path: place for place, (path, _) in enumerate(tree.all)}
    last = max((use for use, _ in uses), key=lambda use: order[use.path], default=None)
    if last is None or not _maps(last.path, tree) or tree.in_block(last.path):
        return [], None
    found = [c for use, c in uses if use.path == last.path and is_weight(use) and c.is_matrix and len(c.uses) == 1]
    if not any(candidate.is_matrix and candidate not in found for candidate in candidates):
        return [], None  # the only matrix has no body before it
    if isinstance(last.owner, CONVS):
        return found, "the last layer, a convolution: an output?"
    vocabularies = {module.num_embeddings for module in tree.modules.values() if isinstance(module, EMBEDDINGS)}
    called = {word for part in last.path[-3:] for word in words(part)} & _BODY
    if any(c.parameter in back or (called and c.rows not in vocabularies) for c in found):
        because = f"called {min(called)}" if called else "as wide as the model"
        beside = [
            candidate
            for use, candidate in uses
            if called & {*words(use.path[-1] if use.path else "")} and use.path[:-1] == last.path[:-1]
        ]
        alike = [c for c in beside if c.is_matrix and is_weight(c.uses[0]) and c not in found]
        return [*found, *alike], f"the last layer, but {because}: an output?"
    return found, None


def find_unread(tree: Tree, candidates: list[Candidate], back: set[nn.Parameter]) -> dict[Candidate, str]:
    """Matrices of Linears outside of blocks that nothing in the model can read, or that are as wide as a table is long.

    They may be output heads of other names than heads have: of one of several nets, of an auxiliary loss. Or what reads
    them is computed otherwise, so that this is but a doubt. The last of those that read one another is found alone.
    """
    tables = [module for module in tree.modules.values() if isinstance(module, EMBEDDINGS)]
    vocabularies, widths = ({getattr(t, key) for t in tables} for key in ("num_embeddings", "embedding_dim"))
    widths |= {c.shape[0] for c in candidates if len(c.shape) == 1 and is_norm(c.uses[0].owner)}
    weights = [c for c in candidates if len(c.shape) > 1]
    reads = {_reads(c.uses[0].owner) for c in weights} | {c.stored[1 - c.transposed] for c in weights} | widths
    found: dict[Candidate, str] = {}
    later: set[int] = set()
    for candidate in reversed([c for c in weights if is_weight(c.uses[0]) and is_linear(c.uses[0].owner)]):
        path, rows = candidate.uses[0].path, candidate.rows
        is_attention = "".join(path[-1:]).lower() in QKV | UNFUSED
        is_hidden = candidate.parameter in back or is_attention or is_lora(path, "") or tree.in_block(path)
        if candidate.is_matrix and not is_hidden:
            if rows in vocabularies and rows not in later:
                found[candidate] = "as wide as an embedding is long: an output?"
            elif rows not in reads and isinstance(candidate.uses[0].owner, nn.Linear):
                found[candidate] = f"nothing reads its {rows} features: an output?"
        later.add(candidate.stored[1 - candidate.transposed])
    return found
