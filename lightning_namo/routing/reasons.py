"""Why a parameter takes AdamW: by identity and by module, by name where a bare parameter belongs to no known module."""

from __future__ import annotations

import re

from torch import nn

from lightning_namo.routing.candidates import OUTPUT_HEAD, Candidate, Reason, Use
from lightning_namo.routing.layers import (
    CONVS,
    EMBEDDINGS,
    LAYER_WORDS,
    TRANSPOSED_CONVS,
    Tree,
    class_words,
    is_layer,
    is_linear,
    is_lora,
    is_norm,
    role_path,
)
from lightning_namo.routing.names import words
from lightning_namo.sharding.layout import stored_shape

_RELATIVE, _PLACES = {"rel", "relative"}, {"bias", "biases", "table", "pos", "position", "positions", "emb", "embed"}
_NAMES: dict[str, set[str]] = {  # of bare parameters: why not a matrix, and the words that say so
    "bias": {"bias", "biases"},
    "position table": {"pos", "ape", "position", "positions", "positional"},
    "token": {"token", "tokens", "cls", "register", "registers"},
    "codebook": {"codebook", "codebooks", "codevectors", "centroids", "prototypes"},
    "latents": {"latent", "latents", "queries", "probe", "slots"},
    "prompt": {"prompt", "prompts"},
    "layer scale": {"gamma", "layerscale"},
    "scale": {"scale", "scales", "gain", "gains", "temperature"},
    "coefficients": {"coef", "coefs", "coeff", "coeffs", "coefficient", "coefficients"},
    "norm": {"norm", "layernorm", "rmsnorm"},
    "embedding by its name": {"emb", "embed", "embeds", "embedding", "embeddings", "embedder"},
}
_COEFFICIENTS = _NAMES["coefficients"]
_ROUTERS, _EXPERTS = {"router", "routers", "routing"}, {"expert", "experts", "moe"}
_GATE = re.compile(r"^(w_?)?(gate|gating|g|noise|noisy_gate)s?(_(layer|linear|fn|network|net|w|weight))?$")
_STATES = re.compile(r"mamba|ssm|ssd|^s[456]", re.IGNORECASE)  # in names of state-space models' classes
_STATE_A = re.compile(r"^(a_?logs?|log_a|a_log_bias|log_a_(real|imag)|a_(real|re|imag|im)|(inv|neg)_a_(real|imag))$")
_HOLDERS = LAYER_WORDS - {"model", "net", "network", "transformer", "block", "head", "layers", "flow", "mixer"}
_WEIGHTS = {"weight", "weights", "kernel", "matrix", "proj", "projection", "w", "up", "down", "gate"}
_STEMS = {"stem", "stems", "patchify"}
_PATCHES = {"patch", "patches"}
_READERS = {"embed", "embedding", "embeddings", "embedder", "embeds", "projection", "proj"}


def is_weight(use: Use) -> bool:
    """Whether this is a layer's weight, and not the norm that weight_norm keeps beside it."""
    return is_layer(use.owner) and "weight" in use.label and not use.label.endswith(("_g", ".original0"))


def decide(candidate: Candidate, tree: Tree) -> None:
    """Find out whether a parameter takes AdamW, and why; whether there is doubt about a matrix."""
    reason = _reason(candidate, tree)
    if reason is not None:
        candidate.adamw, candidate.confidence = reason
    elif not any(is_weight(use) or is_lora(use.path, use.label) for use in candidate.uses):
        known = any(_WEIGHTS & set(words(u.label)) or _HOLDERS & class_words(u.owner) for u in candidate.uses)
        candidate.confidence = "assumed" if known else "please check"
        if not known:
            candidate.notes.append("a bare parameter whose name says nothing")


def _reason(candidate: Candidate, tree: Tree) -> Reason | None:
    first, shape, uses = candidate.uses[0], candidate.shape, candidate.uses
    if candidate.parameter.is_complex():
        return Reason("complex")
    if any(isinstance(use.owner, EMBEDDINGS) or _is_called_embedding(use) for use in uses):
        known = any(isinstance(use.owner, EMBEDDINGS) for use in uses)
        is_first = isinstance(first.owner, EMBEDDINGS) or _is_called_embedding(first)
        return Reason("embedding" if is_first else OUTPUT_HEAD, "sure" if known else "assumed")
    if any(is_norm(use.owner) for use in uses):
        return Reason("norm")
    if not shape:
        return Reason("scalar")
    if any(is_lora(use.path, use.label) for use in uses) and len(shape) > 1:
        return None
    is_vector = sum(size > 1 for size in shape) < 2 and not any(is_weight(use) for use in uses)
    for use in uses:
        if not is_weight(use) and (named := _by_name(use, shape)) is not None:
            return Reason(named, "sure" if is_vector or len(shape) < 2 else "assumed")
    if len(shape) < 2:
        return Reason("vector")
    if any(_ROUTERS & class_words(use.owner) for use in uses):
        return Reason("router")
    if any(_is_called_router(use, tree) for use in uses):
        return Reason("router", "assumed")
    if is_vector:
        return Reason("vector with dimensions of size 1")
    return next(filter(None, (_by_role(use) for use in uses)), None)


def _is_called_embedding(use: Use) -> bool:
    """Whether a table's class is called one, as VocabParallelEmbedding is."""
    last = words(type(use.owner).__name__)[-1:]
    is_table = use.label.partition(".")[0] in ("weight", "weights") and not is_layer(use.owner)
    return is_table and last in (["embedding"], ["embeddings"])


def _by_name(use: Use, shape: tuple[int, ...]) -> str | None:
    """Why a parameter that is no layer's weight is no matrix, by its name; None: the name does not say so."""
    label, named = use.label.lower(), words(use.label)
    if _RELATIVE.intersection(named) and _PLACES.intersection(named):
        return "relative-position table"
    is_projection = not {"proj", "projection"}.isdisjoint(named[-2:])  # of tokens, positions, prompts
    for reason, said in _NAMES.items():
        if said.intersection(named) and (not is_projection or reason == "bias"):
            return reason
    siblings = {other.lower() for other, _ in use.owner.named_parameters(recurse=False)}
    if "query" in named and not {"key", "value", "k", "v"} & {word for s in siblings for word in words(s)}:
        return "latents"
    of_class = class_words(use.owner)
    if "dt" in named:
        return "state-space step size (dt)"
    is_state = any(_STATES.search(cls.__name__) for cls in type(use.owner).__mro__)
    is_state = is_state or any(_STATE_A.match(other) or "dt" in words(other) for other in siblings)
    if _STATE_A.match(label) or (label == "a" and is_state):
        return "state-space A"
    if label in ("d", "ds") and (is_state or "a" in siblings):
        return "state-space D"
    if of_class & {"prompt", "prompter"} and not is_projection:
        return "prompt"
    if of_class & {"codebook", "quantizer", "vq"} and label == "weight":
        return "codebook"
    if {"oft", "boft"} & of_class.union(named):  # peft's
        return "rotations"
    if of_class & {"loss", "margin"} and label == "weight":
        return f"{OUTPUT_HEAD}, of a loss"
    if re.search(r"(^|_)lambda([_.]|\d|$)", label):
        return "layer scale"
    if len(shape) > 2 and "conv" in named and shape[1] == 1:
        return "depthwise convolution"
    return None


def _is_called_router(use: Use, tree: Tree) -> bool:
    """Whether a parameter chooses experts: by its path, or as a gate beside experts."""
    path = role_path(use.path)
    bare = not is_layer(use.owner) and use.label != "weight"
    places = (*path, use.label) if bare else path
    if any(_ROUTERS.intersection(words(part)) for part in places):
        return True
    last = places[-1].lower() if places else ""
    if {"gate", "gating"}.intersection(words(last)) and {"expert", "experts"}.intersection(words(last)):
        return True  # shared_expert_gate
    real = (*use.path, use.label) if bare else use.path
    gates = (place for place, part in enumerate(real) if _GATE.match(part.lower()))
    return any(_holds_experts(real[:place], tree, use.owner) for place in gates)


def _holds_experts(path: tuple[str, ...], tree: Tree, owner: nn.Module) -> bool:
    """Whether a module has experts, by the names of what is in it, by its own class or by its gate's."""
    if path not in tree.modules:
        return False
    holder = tree.modules[path]
    inside = [*tree.children(path), *(label for label, _ in holder.named_parameters(recurse=False))]
    named = {word for name in inside for word in words(name)}
    return bool(_EXPERTS & (named | class_words(holder) | class_words(owner)))


def _by_role(use: Use) -> Reason | None:
    """Why a layer's weight is no hidden matrix: by what layers of its name do."""
    path = role_path(use.path)
    if not path or not is_weight(use):
        return None
    named = set(words(path[-1]))
    if named & _COEFFICIENTS:
        return Reason("coefficients", "assumed")
    if "dt" in named:
        return Reason("state-space step size (dt)", "assumed")
    if named & _RELATIVE and named & {"bias", "biases"}:
        return Reason("relative-position table", "assumed")
    return None


def first_layer(candidate: Candidate, tree: Tree, is_first: bool) -> str | None:
    """Why a matrix is a first layer, which reads pixels, sound or patches of them; None: it is not.

    Args:
        candidate: A matrix.
        tree: The model.
        is_first: Whether no other layer comes before it.
    """
    use = candidate.uses[0]
    owner, path = use.owner, role_path(use.path)
    if not is_weight(use) or not (is_linear(owner) or isinstance(owner, CONVS)):
        return None
    if is_first and isinstance(owner, CONVS):
        return "first layer, a convolution"
    if tree.in_block(use.path):
        return None
    tail = {word for part in path[-3:] for word in words(part)}
    if tail & _STEMS or (tail & _PATCHES and tail & _READERS and "merger" not in tail and "merging" not in tail):
        return "first layer by its name"
    if isinstance(owner, nn.Conv2d | nn.Conv3d) and owner.in_channels in (1, 3):
        return f"first layer, of {owner.in_channels} channel{'s' * (owner.in_channels > 1)}"
    return None


def is_depthwise(candidate: Candidate) -> bool:
    """Whether a convolution has one row for each group, so that there is no matrix in it."""
    owner, shape = candidate.uses[0].owner, candidate.shape
    if not isinstance(owner, CONVS) or owner.groups == 1:
        return False
    is_across = isinstance(owner, TRANSPOSED_CONVS)
    return stored_shape(shape)[0] == owner.groups or (shape[1] == 1 and not is_across)
