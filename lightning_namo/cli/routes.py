"""`lightning-namo routes`: where the parameters of a class or of a recipe's model go, and why, without training."""

from __future__ import annotations

import functools
import pydoc
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from lightning_namo.integration.optimizer_callback import OptimizerCallback
from lightning_namo.planning.models import build_model
from lightning_namo.routing.split import route_parameters


def routes(
    model: Callable[[], LightningModule] | str,
    arguments: dict[str, Any] | None = None,
    json: bool = False,
    optim: OptimizerCallback | None = None,
    data: LightningDataModule | None = None,
    trainer: Callable[[], Trainer] | None = None,
) -> str:
    """Say for every parameter of a model where it goes, why, and how sure that is.

    The model is built without memory where its constructor allows for that, and not trained.

    Args:
        model: A config of `fit` (YAML), whose model and section `optim` count; or the path of a module's class, or of a
            function that makes one.
        arguments: Of the class or function; of a class of transformers, those of its configuration.
        json: Whether to print JSON in place of a table.
        optim: The routing: --optim.adamw GLOB, --optim.blocks auto, --optim.heads matrix and the like.
        data: The recipe's.
        trainer: The recipe's; it counts for nothing.

    Returns:
        The table, or with `json` a list with name, shape, group, confidence and reason of every parameter.

    Raises:
        ValueError: No such class, one that is no module, or arguments that are not its own; globs as
            `split_parameters`.
    """
    make = _named(model) if isinstance(model, str) else model
    module = _built(functools.partial(make, **(arguments or {})), data, str(model))
    groups = route_parameters(module, **(optim or OptimizerCallback()).routing)
    return groups.to_json() if json else str(groups)


def _named(path: str) -> Callable[..., nn.Module]:
    """The class or function of that path; one of transformers made from the arguments of its configuration."""
    found: Any = pydoc.locate(path)
    if not callable(found):
        reason = "which cannot be imported" if found is None else f"which is a {type(found).__name__}"
        raise ValueError(
            f"Expected a config (YAML), a module's class or a function that makes one. Got {path!r}, {reason}. "
            "Modules are looked for in the current folder, too."
        )
    configuration = getattr(found, "config_class", None)
    if configuration is None:
        return found  # type: ignore[no-any-return]

    def make(**arguments: Any) -> nn.Module:
        unknown = [name for name in arguments if not hasattr(configuration(), name)]  # it would take them silently
        if unknown:
            raise ValueError(f"{configuration.__name__} has no {', '.join(unknown)}")
        return found(configuration(**arguments))  # type: ignore[no-any-return]

    return make


def _built(make: Callable[[], nn.Module], data: LightningDataModule | None, name: str) -> nn.Module:
    try:
        try:
            module = build_model(make, data).module
        except (NotImplementedError, RuntimeError):  # a constructor that looks at the numbers of a tensor
            module = make()
            if isinstance(module, LightningModule):
                module.configure_model()
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected --arguments with which {name} can be made, as '{{width: 8}}'. Got: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"Expected {name} to make a module. Got {module!r:.80}.")
    return module
