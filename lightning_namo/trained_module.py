"""The module whose parameters an optimizer trains: notices when they are its parameters no longer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lightning_namo.param_groups import parameter_label
from lightning_namo.regions import reshard


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
        self._paths: list[tuple[list[str], Tensor]] = []
        self._next = 0
        self._compare(module)

    def check(self, missing: set[Tensor]) -> None:
        """Raise if a parameter was replaced since; call it before each step.

        Parameters without a gradient are looked for where they were not already missing in the step before, and of
        all others one in each step: what was replaced has no gradient any more, or keeps an old one.

        Args:
            missing: Parameters that have no gradient now.

        Raises:
            RuntimeError: If a parameter is not the module's any more, or the module runs in DDP's Join.
        """
        module = self._module()
        if module is None:
            return
        for unit in self._fsdp2:  # else its next forward pass would take the weights of before this step
            unit.reshard()
        if any(unit._join_config.enable for unit in self._ddp):
            raise RuntimeError(
                "Expected all ranks to take every step, but the model runs in DistributedDataParallel's join(), in "
                "which ranks may end earlier: the orthogonalization is shared out over all of them. Leave join() out "
                "and give all ranks the same number of batches (DistributedSampler, or drop the last ones)."
            )
        if self._fsdp1:
            return  # it registers plain tensors and parameters in turn, of the same identity
        if missing - self._missing or not self._is_in_place(module):
            self._compare(module)
        self._missing = missing

    def _is_in_place(self, module: nn.Module) -> bool:
        """Whether one parameter, another one each time, is where it was found."""
        path, parameter = self._paths[self._next % len(self._paths)]
        self._next += 1
        owner: nn.Module | None = module
        for part in path[:-1]:
            owner = None if owner is None else owner._modules.get(part)
        return owner is not None and owner._parameters.get(path[-1]) is parameter

    def _compare(self, module: nn.Module) -> None:
        reshard(module)
        found: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        for parameter, name in self._names.items():
            if parameter not in found:
                label = parameter_label(name, module)
                raise RuntimeError(
                    f"Expected the optimizer's parameters to be the module's, but {label} no longer is: "
                    "the module was sharded or replaced after the optimizer was built (or materialized from the meta "
                    "device, or a parameter or layer of it was replaced), and training would change nothing. Shard "
                    "first (Fabric: setup_module) and materialize, then build the optimizer (build_optimizer), then "
                    "setup_optimizers; build it anew after replacing a parameter. DeepSpeed and other strategies that "
                    "replace the parameters are not supported."
                )
        self._paths = [(found[p].split("."), p) for p in self._names]
