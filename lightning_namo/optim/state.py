"""The state of the optimizers: made, cast, saved, loaded and pickled; and the count of skipped steps."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_namo.arguments import check
from lightning_namo.checkpoint.flat_form import fill_empty, flat_form, plain_form, sync_statistics
from lightning_namo.checkpoint.parameter_state import ParameterState
from lightning_namo.checkpoint.reading import STRUCTURE, check_states, laid_out, read
from lightning_namo.checkpoint.warm_start import OWN_MOMENTUM, warm_start_states
from lightning_namo.optim.adamw import adamw_state
from lightning_namo.optim.formulas import bias_correction
from lightning_namo.optim.groups import (
    NUMBERS,
    GroupedOptimizer,
    no_module,
    parameter_names,
    plain_value,
    validate_adamw,
)
from lightning_namo.optim.rule import Matrices
from lightning_namo.optim.stack import STATE_KINDS, StateKind, momentum_dtype, statistics_dtype
from lightning_namo.sharding.discovery import holds_fsdp1, region_of
from lightning_namo.sharding.local import local_tensor

# Keys of matrix groups that states and checkpoints of older versions may lack, and what absence means in a state.
ADDED_KEYS: dict[str, Any] = {"transposed": False, "blocks": 1, "momentum_dtype": None}
# Names that states of a rule cannot have: x has them, or the state of every matrix, or AdamW's.
RESERVED = {"momentum_buffer", "skipped", "exp_avg", "exp_avg_sq", *(name for name in dir(Matrices) if name[0] != "_")}


class StatefulOptimizer(GroupedOptimizer):
    """State of the optimizers; `OrthogonalizedOptimizer` adds the step.

    State of a matrix: ``momentum_buffer`` like the parameter, in ``momentum_dtype``; ``step``; ``skipped``, the number
    of steps that skipped it because its gradient was not finite or present on some ranks only; and what the subclass
    adds. Statistics are float32, or float64 for float64 parameters.

    Attributes:
        fixed: Of the class: hyper-parameters by which its states change their meaning, so that a checkpoint goes on
            with its own only, and what a checkpoint has that lacks them.
        adopt_state: Whether `load_state_dict` takes over what it can from another optimizer's state dict.
        has_adopted: Whether it did.
    """

    state: Any = {}  # of the class: kinds of states that the subclass adds, by name; of an optimizer: as torch's

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the names and kinds of the states."""
        super().__init_subclass__(**kwargs)
        for name, kind in cls.state.items():
            check(kind in STATE_KINDS, cls.__name__, f"the kind of state {name!r}", f"one of {STATE_KINDS}", repr(kind))
            taken = name in RESERVED or name.startswith("_") or not name.isidentifier()
            check(
                not taken, cls.__name__, "the name of a state", "one that x and AdamW's state do not have", repr(name)
            )

    adopt_state: bool = False
    has_adopted: bool = False
    _adamw_skipped: Tensor | None = None
    _prepared: Any = None  # what the step has prepared for these groups

    @property
    def _added(self) -> dict[str, Any]:
        """Keys of matrix groups that states and checkpoints of older versions may lack, and what absence means."""
        return {**ADDED_KEYS, **self._absent}

    def _add_state(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            self.state[parameter] = self._initial_state(parameter, group)

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if not group["orthogonalize"]:
            return adamw_state(parameter)
        dtype, layout = statistics_dtype(parameter), self._layout("a parameter", parameter, group)
        return {
            "momentum_buffer": torch.zeros_like(parameter, dtype=momentum_dtype(group)),
            "step": torch.zeros((), dtype=dtype, device=parameter.device),
            "skipped": torch.zeros((), dtype=dtype, device=parameter.device),
            **{
                key: torch.zeros_like(parameter, dtype=dtype)
                if kind == "element"
                else torch.zeros(layout.statistic_shape(kind), dtype=dtype, device=parameter.device)
                for key, kind in self._kinds.items()
            },
        }

    @property
    def _kinds(self) -> dict[str, StateKind]:
        """The kinds of the states that the subclass adds to the momentum."""
        kinds: dict[str, StateKind] = type(self).state
        return kinds

    def _fill_state(self) -> None:
        """Give parameters that have no state a fresh one.

        The user has cleared the state, or changed the groups without `add_param_group` (as BackboneFinetuning does
        when it restores the groups of a resumed run), or given memory to parameters of the meta device.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if not state or (state["step"].is_meta and not parameter.is_meta):
                    self.state[parameter] = self._initial_state(parameter, group)

    def _follow_parameters(self) -> None:
        """Give the state the devices and dtypes that it would have if it were made now: parameters may be cast."""
        for group in self.param_groups:
            for parameter in group["params"]:
                dtypes = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.dtype)
                if group["orthogonalize"]:
                    dtypes = dict.fromkeys(self.state[parameter], statistics_dtype(parameter))
                    dtypes["momentum_buffer"] = momentum_dtype(group) or parameter.dtype
                for key, value in self.state[parameter].items():
                    if isinstance(value, Tensor):
                        self.state[parameter][key] = value.to(parameter.device, dtypes.get(key, value.dtype))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; under FSDP1 in the form that FSDP1 can gather (`lightning_namo.checkpoint`)."""
        states = self._parameter_states()
        is_flat = holds_fsdp1(self._module())
        saved = [flat_form(parameter, self._kinds) if is_flat else parameter.state for parameter in states]
        own, self.state = self.state, defaultdict(dict)
        try:  # torch's gives what is in the attribute to its hooks
            for parameter, state in zip(states, saved, strict=True):
                self.state[parameter.tensor] = {key: _of_its_own(value) for key, value in state.items()}
            state_dict = super().state_dict()
        finally:
            self.state = own
        for group in state_dict.get("param_groups", ()):
            self._name_algorithm(group)
        return state_dict

    def _name_algorithm(self, group: dict[str, Any]) -> None:
        """Say in a group to be saved what its states mean.

        In a key that every group has, since torch.distributed.checkpoint reads no others of a checkpoint.
        """
        if group["orthogonalize"]:
            words = [
                f"{key}={group[key]!r}" for key, absent in self._absent.items() if group.get(key, absent) != absent
            ]
            words += [OWN_MOMENTUM] * self._has_own_momentum(group)
            group["algorithm"] = ", ".join([type(self).__name__, *words])

    def _has_own_momentum(self, group: dict[str, Any]) -> bool:
        """Whether the momentum of a group of matrices is an average of something else than gradients."""
        return False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but by the parameters' names where there are any, and with the dtypes of this optimizer's state.

        (torch casts to the parameter's dtype: statistics stay float32, the momentum its ``momentum_dtype``.)

        State of a parameter's shape is laid out like the parameter, in memory and over the ranks: it may have been
        saved whole, as FSDP1 cuts it, or as DTensors of any mesh whose processes are there.

        Collective under FSDP1, with ``adopt_state``, and where a state is a DTensor of another layout.

        Args:
            state_dict: Of an optimizer of the same class over the same parameters, saved under any strategy; with
                ``adopt_state`` of any optimizer over them that has a momentum.

        Raises:
            ValueError: If it is of another algorithm, model or routing, or incomplete; nothing is loaded then.
        """
        state_dict = state_dict.copy()  # hooks may change it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        parameters, module, has_adopted = self._parameter_states(), self._module(), False
        try:
            groups, states = self._read(state_dict, parameters)
        except ValueError as error:
            if not self.adopt_state:
                raise
            groups = self.param_groups
            states = warm_start_states(state_dict, parameters, module, type(self).__name__, str(error), bias_correction)
            self._start_from([state for state in states if "momentum_buffer" in state])
            has_adopted = True
        if holds_fsdp1(module):
            sync_statistics(states, parameters)
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for loaded, parameter in zip(states, parameters, strict=True):
            state[parameter.tensor] = {key: value.to(parameter.state[key].dtype) for key, value in loaded.items()}
        merged = [_merged(theirs, own) for theirs, own in zip(groups, self.param_groups, strict=True)]
        self.__setstate__({"state": state, "param_groups": merged})
        self.has_adopted = has_adopted
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _parameter_states(self) -> list[ParameterState]:
        """The parameters, in the order of the groups."""
        self._fill_state()
        parameters = []
        for group in self.param_groups:
            for name, parameter in zip(parameter_names(group), group["params"], strict=True):
                shape, region = self._regions.get(parameter) or region_of(parameter, name)
                kinds = self._kinds if group["orthogonalize"] else {}
                parameters.append(ParameterState(name, parameter, group, self.state[parameter], shape, region, kinds))
        return parameters

    def _read(
        self, state_dict: dict[str, Any], parameters: list[ParameterState]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Groups and states of this optimizer's own kind, checked."""
        cls = type(self).__name__
        saved = read(state_dict, parameters, self.param_groups, cls, self._absent, self._name_algorithm)
        states = [plain_form(state, parameter) for state, parameter in zip(saved.states, parameters, strict=True)]
        if holds_fsdp1(self._module()):
            fill_empty(states, parameters)
        check_states(states, parameters, cls)
        groups = []
        for theirs, own in zip(saved.groups, self.param_groups, strict=True):
            self._check_group(theirs, own)
            structure = {key: own[key] for key in ("name", *STRUCTURE, *self._added) if key in own}
            plain = {key: plain_value(value) for key, value in theirs.items()}
            named = {"algorithm": own["algorithm"]} if "algorithm" in own else {}
            groups.append({**structure, **plain, **named})
        return groups, laid_out(states, parameters)

    def _check_group(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        """Raise for hyper-parameters of a checkpoint that are missing or out of range."""
        validate, defaults = validate_adamw, self._adamw_defaults
        if own["orthogonalize"]:
            validate, defaults = self._validate, self._matrix_defaults
        missing = sorted(defaults.keys() - self._added.keys() - saved.keys())
        try:
            check(not missing, type(self).__name__, ", ".join(missing), "in the checkpoint", "nothing")
            validate({**own, **saved})
        except ValueError as error:
            raise ValueError(
                f"{error} That is of group {own['name']!r}. Take another checkpoint, or pass adopt_state=True to take "
                "over its momentum and start the rest anew. Nothing was loaded."
            ) from None

    def _start_from(self, states: list[dict[str, Any]]) -> None:
        """Give matrices, in their order, whose momentum came from elsewhere, the state to go on with it."""

    def __getstate__(self) -> dict[str, Any]:
        hyper = ("_matrix_defaults", "_adamw_defaults", "_templates", "_regions", "adamw_follows")
        own = (*hyper, "bucket_bytes", "batched", "adopt_state", "_adamw_skipped")
        state = super().__getstate__()
        of_parameters = {p: {key: _of_its_own(v) for key, v in of_p.items()} for p, of_p in self.state.items()}
        state["state"] = defaultdict(dict, of_parameters)
        return {**state, **{key: self.__dict__[key] for key in own if key in self.__dict__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, which calls it on load, too: a state that lacks what newer versions have gets their defaults."""
        super().__setstate__(state)
        self._prepared = None
        for group in self.param_groups:
            if group.setdefault("orthogonalize", True):
                group.update({key: value for key, value in ADDED_KEYS.items() if key not in group})
        own = self.__dict__
        if "_number" not in own:
            self._number = next(NUMBERS)
        for key, value in {"_module": no_module, "_templates": {}, "_regions": {}}.items():
            own.setdefault(key, value)
        for key, is_matrix in {"_matrix_defaults": True, "_adamw_defaults": False}.items():
            if key not in own:
                own[key] = self._first_hyper_parameters(is_matrix)
        own["_matrix_defaults"] = {**self._added, **own["_matrix_defaults"]}

    def _first_hyper_parameters(self, is_matrix: bool) -> dict[str, Any]:
        """Those of the first group of matrices or of AdamW, as defaults of an optimizer whose state lacks them."""
        adamw = {"lr": self.defaults["lr"], "weight_decay": 0.0, "momentum": 0.9, "beta2": 0.95, "eps": 1e-8}
        group = next((group for group in self.param_groups if group["orthogonalize"] == is_matrix), adamw)
        keys = set(group) - {"params", "param_names", "name", "orthogonalize", "algorithm", "initial_lr", *self._added}
        return {**{key: group[key] for key in keys}, "lr": group.get("initial_lr", group["lr"])}

    def skipped_steps(self) -> int:
        """How often a matrix, or an AdamW group, was skipped (reads the device).

        It is skipped where a gradient is not finite, or is present on some ranks only. Matrices count in their state,
        AdamW groups since the optimizer was built.
        """
        counts = [state["skipped"] for state in self.state.values() if "skipped" in state]
        if self._adamw_skipped is not None:
            counts.append(self._adamw_skipped)
        return int(torch.stack([count.float() for count in counts]).sum().item()) if counts else 0

    def _count_adamw(self, skipped: Sequence[Tensor]) -> None:
        for flag in skipped:
            count = (flag > 0).float()
            self._adamw_skipped = count if self._adamw_skipped is None else self._adamw_skipped + count


def _merged(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A saved group for the optimizer's own parameters, which it holds in their order and in its own dtypes."""
    kept = ("params", "param_names", "momentum_dtype", *STRUCTURE)
    loaded = {key: value for key, value in saved.items() if key not in ("params", "param_names")}
    return {**copy.deepcopy(loaded), **{key: own[key] for key in kept if key in own}}


def _of_its_own(value: Any) -> Any:
    """A view of a stack as a tensor that is saved at its own size."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    local = local_tensor(value)
    return value if local.untyped_storage().nbytes() == local.nbytes else value.clone()
