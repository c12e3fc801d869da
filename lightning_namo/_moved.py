"""Modules as they were called before the package had folders: what users wrote then goes on working, with a warning."""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "adamw": ("optim.adamw",),
    "adoption": ("checkpoint.warm_start",),
    "agreement": ("sharding.agreement",),
    "base": ("optim.engine",),
    "callbacks": ("integration.optimizer_callback", "integration.preemption"),
    "checks": ("cli.validation",),
    "clipping": ("integration.clipping", "integration.lightning_clipping"),
    "consolidate": ("atomic_io", "checkpoint.consolidate"),
    "estimate": ("planning.traffic", "planning.memory", "planning.cost_model"),
    "exchange": ("sharding.process_group", "sharding.publication", "sharding.exchange"),
    "factory": ("integration.build", "integration.configure"),
    "forecast": ("planning.models", "planning.report"),
    "grid": ("planning.simulated_mesh",),
    "grouped": ("optim.groups", "optim.state"),
    "optimizers": ("optim.namo", "optim.muon"),
    "orthogonalize": ("polar.coefficients", "polar.iteration_dtype", "polar.cost", "polar.orthogonalize"),
    "param_groups": ("routing.names", "routing.candidates", "routing.split"),
    "plan": ("sharding.assignment",),
    "ranges": ("optim.ranges",),
    "regions": ("sharding.layout", "sharding.local", "sharding.discovery"),
    "rules": ("optim.formulas",),
    "run_card": ("integration.run_card",),
    "schedules": ("optim.schedules",),
    "sweep": ("cli.sweep",),
    "trained_module": ("optim.trained_module",),
    "gpt2.corpus": ("gpt2.data.corpus",),
    "gpt2.documents": ("gpt2.data.documents",),
    "gpt2.encoding": ("gpt2.data.encoding",),
    "gpt2.files": ("atomic_io",),
    "gpt2.loaders": ("gpt2.data.loaders",),
    "gpt2.openwebtext": ("gpt2.data.openwebtext",),
    "gpt2.parts": ("gpt2.data.tokenize",),
    "gpt2.prepare": ("gpt2.data.encoding", "gpt2.data.prepare"),
    "gpt2.streaming": ("gpt2.data.streaming",),
    "gpt2.trained": ("gpt2.load",),
}
"""From a former module to where its names are now, both below `lightning_namo`, importers last."""

RENAMED = {
    "grid.Grid": "SimulatedMesh",
    "regions.Block": "Rectangle",  # in optimizers that were saved by torch.save(optimizer)
    "regions.Region": "ShardRegion",
    "regions.Span": "FlatRange",
}
"""Names that were given up, and what they are called now."""


class _Moved(ModuleType):
    """A former module: it has what moved, and warns who takes it from there."""

    def __getattr__(self, name: str) -> Any:
        former = self.__name__.removeprefix("lightning_namo.")
        if name == "__all__":  # for ``import *``
            return [new for place in MOVED[former] for new in _names(place)]
        new_name = RENAMED.get(f"{former}.{name}", name)
        for place in () if name.startswith("__") else MOVED[former]:
            module = importlib.import_module(f"lightning_namo.{place}")
            if hasattr(module, new_name):
                warnings.warn(
                    f"{self.__name__}.{name} is {module.__name__}.{new_name} now. The former name will be removed.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, new_name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _names(place: str) -> list[str]:
    """The public names that a module defines."""
    module = importlib.import_module(f"lightning_namo.{place}")
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    return sorted(name for name in own if not name.startswith("_"))


def install() -> None:
    """Let Python find the former modules. Nothing is imported before a name is taken from one."""
    for former, places in MOVED.items():
        name, now = f"lightning_namo.{former}", " and ".join(f"lightning_namo.{place}" for place in places)
        module = sys.modules.setdefault(name, _Moved(name, f"Moved to {now}."))
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)


def find(package: str, name: str) -> ModuleType:
    """A former module as an attribute of its package.

    Raises:
        AttributeError: There was none of that name.
    """
    if f"{package}.{name}".removeprefix("lightning_namo.") in MOVED:
        return sys.modules[f"{package}.{name}"]
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
