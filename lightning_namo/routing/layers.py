"""Kinds of modules, by class or by a whole word of their class's name, and where they are in the model."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lightning_namo.routing.names import walk, words

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_CONVS)
_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, *CONVS)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.CrossMapLRN2d, nn.modules.batchnorm._NormBase)

_NORM_WORDS = {"norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm"}
LAYER_WORDS = {"linear", "dense", "mlp", "ffn", "feed", "feedforward", "attention", "attn", "conv", "convolution"}
LAYER_WORDS |= {"lstm", "gru", "rnn", "cell", "projection", "proj", "projector", "qkv", "experts", "moe", "mixer"}
LAYER_WORDS |= {"block", "layers", "flow", "transformer", "network", "net", "model", "head", "embedding"}


def is_hugging_face_conv1d(owner: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, which stores ``(in, out)``; without importing transformers."""
    return ("transformers.pytorch_utils", "Conv1D") in ((c.__module__, c.__name__) for c in type(owner).__mro__)


def is_layer(owner: nn.Module) -> bool:
    """Whether the weights of a module are matrices."""
    return isinstance(owner, _LAYERS) or is_hugging_face_conv1d(owner)


def is_linear(owner: nn.Module) -> bool:
    """Whether a module maps features by one matrix."""
    return isinstance(owner, nn.Linear) or is_hugging_face_conv1d(owner)


def is_norm(owner: nn.Module) -> bool:
    """Whether a module is a norm: LlamaRMSNorm and BatchNormAct2d are, LayerNormMLP and NormalizingFlow are not."""
    return isinstance(owner, _NORMS) or (not is_layer(owner) and any(map(_is_called_norm, _class_words(owner))))


def _is_called_norm(named: list[str]) -> bool:
    places = [place for place, word in enumerate(named) if word in _NORM_WORDS]
    return bool(places) and LAYER_WORDS.isdisjoint(named[places[-1] + 1 :])


def _class_words(owner: nn.Module) -> list[list[str]]:
    return [words(cls.__name__) for cls in type(owner).__mro__]


def class_words(owner: nn.Module) -> set[str]:
    """The words of a module's class and of those that it derives from."""
    return {word for named in _class_words(owner) for word in named} - {"module", "object"}


@dataclass(frozen=True)
class Tree:
    """The modules of a model by path, and what their places say of them."""

    root: nn.Module

    @cached_property
    def all(self) -> list[tuple[tuple[str, ...], nn.Module]]:
        """Every module with its cleaned path, wrappers too, in order."""
        return list(walk(self.root))

    @cached_property
    def modules(self) -> dict[tuple[str, ...], nn.Module]:
        """Every module by its cleaned path; where modules share one, the innermost."""
        return dict(self.all)

    @cached_property
    def _places(self) -> dict[tuple[str, ...], int]:
        return {path: place for place, path in enumerate(self.modules)}

    def inside(self, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], nn.Module]]:
        """A module and all in it, in order."""
        following = itertools.islice(self.modules.items(), self._places[path], None)
        return list(itertools.takewhile(lambda item: item[0][: len(path)] == path, following))

    def children(self, path: tuple[str, ...]) -> dict[str, nn.Module]:
        """The modules right in a module, by name."""
        return {name: child for name, child in self.modules[path]._modules.items() if child is not None}

    def in_block(self, path: tuple[str, ...], start: int = 0) -> bool:
        """Whether a module is in one of several like blocks, such as the layers of a transformer.

        Args:
            path: The module's.
            start: How many parts of the path are known not to lead into one.
        """
        return any(self._is_block(path[:end]) for end in range(start + 1, len(path)))

    def _is_block(self, path: tuple[str, ...]) -> bool:
        container, block = self.modules[path[:-1]], self.modules[path]
        if next(block.children(), None) is None:
            return False
        if isinstance(container, nn.ModuleList):
            return True
        twins = (child for child in container.children() if type(child) is type(block) and child is not block)
        return isinstance(container, nn.Sequential) and any(_labels(twin) == _labels(block) for twin in twins)


def _labels(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(remove_duplicate=False)]


_PEFT = {"base_layer", "original_module"}
_ADAPTED = re.compile(r"^(modules_to_save|lora_(embedding_)?[AB])$")
_LORA = re.compile(r"^lora_[ab]$", re.IGNORECASE)


def role_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """A layer's path without what peft adds to it, adapters' names too: what the layer is in the model."""
    kept: list[str] = []
    parts = iter(path)
    for part in parts:
        if _ADAPTED.match(part):
            next(parts, None)
        elif part not in _PEFT:
            kept.append(part)
    return tuple(kept)


def is_lora(path: tuple[str, ...], label: str) -> bool:
    """Whether a parameter is the A or B of a low-rank adapter (peft, litgpt, torchtune, loralib)."""
    return any(_LORA.match(part) for part in (*path, *label.split(".")))
