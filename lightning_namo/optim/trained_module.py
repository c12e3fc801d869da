"""The module whose parameters an optimizer trains: notices when its parameters are replaced."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lightning_namo.routing.names import parameter_label
from lightning_namo.sharding.discovery import reshard


class TrainedModule:
    """A module and an optimizer's parameters in it.

    Args:
        module: As the strategy left it.
        names: Of the optimizer's parameters, for messages.

    Raises:
        RuntimeError: If a parameter is not the module's.
    """

    def __init__(self, module: nn.Module, names: Mapping[Tensor, str]) -> None:
        self._module, self._names = weakref.ref(module), names
        units = list(module.modules())
        self._fsdp2 = weakref.WeakSet(unit for unit in units if isinstance(unit, FSDPModule))
        self._ddp = weakref.WeakSet(unit for unit in units if isinstance(unit, DistributedDataParallel))
        self._fsdp1 = any(isinstance(unit, FullyShardedDataParallel) for unit in units)
        self._missing: set[Tensor] = set()
        self._gone: set[Tensor] = set()
        self._paths: list[tuple[Tensor, list[str]]] = []
        self._next = 0
        self._compare(module)

    def refuse_join(self) -> None:
        """Raise a RuntimeError in DDP's Join, where not all ranks take every step."""
        if any(unit._join_config.enable for unit in self._ddp):
            raise RuntimeError(
                "Expected all ranks to take every step, but the model runs in DistributedDataParallel's join(), in "
                "which ranks may end earlier: the orthogonalization is shared out over all of them. Leave join() out "
                "and give all ranks the same number of batches (DistributedSampler, or drop the last ones)."
            )

    def check(self, missing: set[Tensor]) -> None:
        """Raise if a parameter was replaced; call it before each step.

        Parameters without a gradient are looked for where they were not already missing in the step before, and of
        all others one in each step: what was replaced has no gradient any more, or keeps an old one.

        Args:
            missing: Parameters that have no gradient now.

        Raises:
            RuntimeError: If another one stands in the place of a parameter. One that is gone is warned of, once.
        """
        module = self._module()
        if module is None:
            return
        for unit in self._fsdp2:  # else its next forward pass would take the weights of before this step
            unit.reshard()
        if self._fsdp1:
            return  # it registers plain tensors and parameters in turn, of the same identity
        if missing - self._missing or not self._is_in_place(module):
            self._compare(module)
        self._missing = missing

    def _is_in_place(self, module: nn.Module) -> bool:
        """Whether one parameter, another one each time, is where it was found."""
        parameter, path = self._paths[self._next % len(self._paths)]
        self._next += 1
        return _at(module, path) is parameter

    def _compare(self, module: nn.Module) -> None:
        reshard(module)
        found: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        paths = dict(self._paths)
        for parameter, name in self._names.items():
            if parameter not in found:
                label = parameter_label(name, module)
                if parameter in paths and _at(module, paths[parameter]) is None and not found.keys().isdisjoint(paths):
                    if parameter not in self._gone:
                        warnings.warn(f"{label} is gone from the module, and trains nothing any more.", stacklevel=6)
                    self._gone.add(parameter)
                    continue
                raise RuntimeError(
                    f"Expected the optimizer's parameters to be the module's, but {label} no longer is: "
                    "the module was sharded or replaced after the optimizer was built (or materialized from the meta "
                    "device, or a parameter or layer of it was replaced), and training would change nothing. Shard "
                    "first (Fabric: setup_module) and materialize, then build the optimizer (build_optimizer), then "
                    "setup_optimizers; build it anew after replacing a parameter. DeepSpeed and other strategies that "
                    "replace the parameters are not supported."
                )
        self._paths = [(p, found[p].split(".")) for p in self._names if p in found]


def _at(module: nn.Module, path: list[str]) -> object:
    """What stands at a path of attributes; None if nothing does."""
    place: object = module
    for part in path:
        place = getattr(place, part, None)
    return place
