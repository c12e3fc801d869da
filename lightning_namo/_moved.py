"""Modules as they were called before the package had folders: what users wrote then goes on working, with a warning."""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "base": ("optim.engine",),
    "callbacks": ("integration.optimizer_callback", "integration.preemption"),
    "clipping": ("integration.clipping", "integration.lightning_clipping"),
    "consolidate": ("checkpoint.consolidate",),
    "estimate": ("planning.cost_model",),
    "factory": ("integration.build", "integration.configure"),
    "forecast": ("planning.models", "planning.report"),
    "grid": ("planning.simulated_mesh",),
    "optimizers": ("optim.namo", "optim.muon"),
    "orthogonalize": ("polar.coefficients", "polar.iteration_dtype", "polar.cost", "polar.orthogonalize"),
    "param_groups": ("routing.names", "routing.reasons", "routing.split"),
    "regions": ("sharding.layout", "sharding.local"),  # in optimizers that were saved by torch.save(optimizer)
    "run_card": ("integration.run_card",),
    "schedules": ("optim.schedules",),
    "sweep": ("cli.sweep",),
    "gpt2.corpus": ("gpt2.data.corpus",),
    "gpt2.documents": ("gpt2.data.documents",),
    "gpt2.encoding": ("gpt2.data.encoding",),
    "gpt2.loaders": ("gpt2.data.loaders",),
    "gpt2.openwebtext": ("gpt2.data.openwebtext",),
    "gpt2.prepare": ("gpt2.data.encoding", "gpt2.data.prepare"),
    "gpt2.streaming": ("gpt2.data.streaming",),
    "gpt2.trained": ("gpt2.load",),
}
"""From a former module to where its names are now, both below `lightning_namo`, importers last."""

RENAMED = {"Grid": "SimulatedMesh", "Block": "Rectangle", "Span": "FlatRange"}
"""Names that were given up."""


class _Moved(ModuleType):
    """A former module: it has what moved, and warns who takes it from there."""

    def __getattr__(self, name: str) -> Any:
        new_name = RENAMED.get(name, name)
        for place in () if name.startswith("__") else MOVED[self.__name__.removeprefix("lightning_namo.")]:
            module = importlib.import_module(f"lightning_namo.{place}")
            if hasattr(module, new_name):
                warnings.warn(
                    f"{self.__name__}.{name} is {module.__name__}.{new_name} now, and will not be found here for ever.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, new_name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def install() -> None:
    """Let Python find the former modules. Nothing is imported before a name is taken from one."""
    for name in (f"lightning_namo.{former}" for former in MOVED):
        module = sys.modules.setdefault(name, _Moved(name, "A module that has moved."))
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)


def find(package: str, name: str) -> ModuleType:
    """A former module as an attribute of its package.

    Raises:
        AttributeError: There was none of that name.
    """
    if f"{package}.{name}".removeprefix("lightning_namo.") in MOVED:
        return sys.modules[f"{package}.{name}"]
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
