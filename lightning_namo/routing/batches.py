"""Which parameters are batches of matrices: experts, and the groups of convolutions."""

from __future__ import annotations

from torch import nn

from lightning_namo.routing.candidates import Candidate, Confidence
from lightning_namo.routing.layers import CONVS, Tree, class_words
from lightning_namo.routing.names import class_name, words
from lightning_namo.routing.reasons import is_weight
from lightning_namo.sharding.batch import Batched

# How transformers' classes that do not declare it keep bare parameters: by their labels (the last one: all others),
# whether they are batches of matrices (or what says how many are in dimension 0), and whether input features are rows.
_KNOWN: dict[str, dict[str, tuple[bool | str, bool]]] = {
    "DeepseekV4GroupedLinear": {"": ("n_groups", False)},
    "DbrxExpertGLU": {"w2": ("moe_num_experts", True), "": ("moe_num_experts", False)},
    "FunnelRelMultiheadAttention": {"": (False, True)},
    "GroupedLinearLayer": {"": (True, True)},  # ConvBERT's
    "Llama4TextExperts": {"": (True, True)},
    "RecurrentGemmaRglru": {"": (True, True)},
    "XLNetRelativeAttention": {"o": (False, False), "": (False, True)},
    "ZambaMambaMixer": {"": (True, False)},  # its heads
}


def _known(owner: nn.Module, label: str) -> tuple[Batched, bool] | None:
    """Batch and orientation of a parameter of one of transformers' classes; None: it is none of those."""
    for cls in type(owner).__mro__:
        if cls.__module__.startswith("transformers.") and cls.__name__ in _KNOWN:
            of = _KNOWN[cls.__name__]
            batched, transposed = of.get(label, of[""])
            return (getattr(owner, batched) if isinstance(batched, str) else batched), transposed
    return None


def find_batch(candidate: Candidate, tree: Tree) -> None:
    """Find out whether a matrix is a batch of matrices: experts, or the groups of a convolution."""
    (_, label, owner, path), shape = candidate.uses[0], candidate.shape
    adapted = tree.modules[path[:-2]] if path[-2:-1] in (("lora_A",), ("lora_B",)) else None
    doubt: Confidence = "assumed" if candidate.glob else "please check"  # whether it is one, not that it is a matrix
    experts = getattr(adapted, "num_experts", 1)  # of peft's target_parameters: all in one A, and in one B
    if isinstance(owner, CONVS) and owner.groups > 1:
        candidate.batched, candidate.batch_words = owner.groups, "one for each group of the convolution"
    elif experts > 1 and path[-2] == "lora_A":
        candidate.batched, candidate.batch_words = experts, "one for each expert that peft adapts"
    elif experts > 1:
        candidate.confidence = doubt
        candidate.notes.append(f"peft keeps {experts} experts' B in its columns, one in {experts}: no blocks of it")
    elif (known := _known(owner, label)) is not None:
        candidate.batched, candidate.turned = known
        candidate.batch_words, candidate.confidence = f"as {class_name(owner)} uses them", "sure"
        candidate.notes.clear()
    elif len(shape) == 3 and min(shape[1:]) > 1 and not is_weight(candidate.uses[0]):
        candidate.batched = True
        if isinstance(getattr(owner, "is_transposed", None), bool):
            candidate.batch_words, candidate.confidence = f"declared by {class_name(owner)}", "sure"
        else:
            candidate.batch_words = "assumed of a bare parameter: see batched, transposed, matrix"
            said = {"expert", "experts", "moe"} & (class_words(owner) | {w for part in path for w in words(part)})
            candidate.confidence = "assumed" if said else doubt
        candidate.notes.clear()
