"""Names of parameters: their words, without what wrappers add to them, and with the class of their module."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from lightning_namo.sharding.discovery import is_fsdp2

_DATA_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


# Where torch.compile, FSDP1 and activation checkpointing, and where Fabric keep the module that they wrap.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

_WRAPPED |= {"_forward_module", "_original_module"}

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+[a-z]*")


def words(name: str) -> list[str]:
    """The words of a name, in lower case: of LayerNormMLP layer, norm, mlp; of rel_pos_h rel, pos, h."""
    return [word.lower() for word in _WORD.findall(name.replace("MoE", "Moe"))]


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
    return f"{name} of {class_name(module)}"


def class_name(module: nn.Module) -> str:
    """The name of a module's class, not of the one that FSDP2 made of it."""
    cls = type(module)
    return (cls.__mro__[2] if is_fsdp2(module) else cls).__name__


def _wraps(module: nn.Module, name: str) -> bool:
    """Whether a module only wraps its child of that name."""
    return name in _WRAPPED or (name == "module" and isinstance(module, _DATA_PARALLEL))


def walk(module: nn.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Every module with its cleaned path, in the order of the module; a shared one at each of its paths."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, path if _wraps(module, name) else (*path, name))
