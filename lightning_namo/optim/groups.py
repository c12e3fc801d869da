"""Parameter groups of two kinds, matrices and AdamW's: their keys, checks and state."""

from __future__ import annotations

import copy
import itertools
import numbers
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lightning_namo.checkpoint.flat_form import fill_empty, flat_form, plain_form, sync_statistics
from lightning_namo.checkpoint.numbering import number_by_module
from lightning_namo.checkpoint.parameter_state import ParameterState
from lightning_namo.checkpoint.reading import STRUCTURE, check_states, laid_out, read
from lightning_namo.checkpoint.warm_start import warm_start_states
from lightning_namo.optim.adamw import adamw_state, check_memory
from lightning_namo.optim.formulas import bias_correction
from lightning_namo.optim.ranges import ADAMW_KEYS, RANGES, Range, check, check_keys, check_ranges, unknown_keys
from lightning_namo.polar.coefficients import newton_schulz_polynomials
from lightning_namo.routing.names import parameter_label
from lightning_namo.routing.split import ParameterGroups
from lightning_namo.sharding.discovery import holds_fsdp1, region_of
from lightning_namo.sharding.layout import Layout, ShardRegion
from lightning_namo.sharding.local import local_tensor

Params: TypeAlias = Iterable[Any] | ParameterGroups


# Keys of matrix groups that states and checkpoints of older versions may lack, and what absence means in a state.
ADDED_KEYS: dict[str, Any] = {"transposed": False, "blocks": 1, "momentum_dtype": None}

_numbers = itertools.count()  # of the optimizers of this process, copies too, in the order in which they are built


class GroupedOptimizer(Optimizer):
    """Parameter groups and state of the optimizers; `OrthogonalizedOptimizer` adds the step.

    Parameter groups with ``orthogonalize=False`` are AdamW's. The others hold matrices: parameters of two or more
    dimensions, flattened from dimension 1, with output features as rows unless the group says ``transposed=True``,
    stacked by rows if it says ``blocks=k`` or ``blocks=[rows, ...]``. Any hyper-parameter can be set by group.

    State of a matrix: ``momentum_buffer`` like the parameter, in ``momentum_dtype``; ``step``; ``skipped``, the number
    of steps that skipped it because its gradient was not finite or present on some ranks only; and what the subclass
    adds. Statistics are float32, or float64 for float64 parameters.

    ``lr`` of a group, and ``weight_decay`` of one of matrices, may be tensors, so that a captured step follows a
    schedule (the other's is read from the device by torch's AdamW).

    Attributes:
        adopt_state: Whether `load_state_dict` takes over what it can from another optimizer's state dict.
        has_adopted: Whether it did.
        adamw_follows: Whether the learning rate of AdamW groups is that of the matrices, for want of another.

    Args:
        params: What `split_parameters` returns, or torch's usual iterables and groups.
        defaults: Hyper-parameters of matrix groups; those with the prefix ``adamw_`` are of AdamW groups: lr (None:
            that of the matrices), weight_decay, betas, eps.

    Raises:
        ValueError: For hyper-parameters out of range, parameters that are not matrices, or no matrix at all.
        TypeError: For a module in place of parameters.
    """

    per_column: ClassVar[bool] = False  # whether statistics are kept by column
    adaptive: ClassVar[bool] = False  # whether the step size is NAMO's, from ||N|| and a v of the whole matrix
    ranges: ClassVar[Mapping[str, Range]] = RANGES
    adopt_state: bool = False
    has_adopted: bool = False
    adamw_follows: bool = False
    _adamw_skipped: Tensor | None = None
    _warned: bool = False
    _prepared: Any = None  # what the step has prepared for these groups

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        if isinstance(params, nn.Module):
            raise TypeError(
                f"{type(self).__name__}: expected groups of parameters but got a module, {type(params).__name__}. "
                f"{_how_to_build(type(self).__name__)}"
            )
        matrix_defaults = {key: value for key, value in defaults.items() if not key.startswith("adamw_")}
        check_ranges({key: _plain(value) for key, value in matrix_defaults.items()}, type(self).__name__, self.ranges)
        self._number = next(_numbers)
        self._matrix_defaults = {"transposed": False, "blocks": 1, **matrix_defaults}
        self.adamw_follows = defaults["adamw_lr"] is None
        adamw_defaults = {key: defaults[f"adamw_{key}"] for key in ("lr", "weight_decay", "betas", "eps")}
        if self.adamw_follows:
            adamw_defaults["lr"] = defaults["lr"]
        self._adamw_defaults = _adamw_group({key: _plain(value) for key, value in adamw_defaults.items()})
        self._templates: dict[Tensor, tuple[str, dict[str, Any]]] = {}
        self._regions: dict[Tensor, tuple[tuple[int, ...], ShardRegion]] = {}
        self._module: Callable[[], torch.nn.Module | None] = _no_module
        if isinstance(params, ParameterGroups):
            self._templates = {p: (params.names[p], keys) for p, keys in params.templates.items()}
            self._regions = dict(params.regions.items())
            self._module = params.module
        super().__init__(cast(Any, params), {key: defaults[key] for key in ("lr", "weight_decay", "momentum")})
        if (module := self._module()) is not None:
            number_by_module(self, module)
        if not any(group["orthogonalize"] and group["params"] for group in self.param_groups):
            raise ValueError(
                f"Expected at least one matrix to orthogonalize but no parameter group of {type(self).__name__} has "
                "one. Use torch.optim.AdamW, or see how split_parameters(module) routes the parameters."
            )

    # ------------------------------------------------------------------ parameter groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one without ``orthogonalize`` is routed as `split_parameters` routed its parameters.

        Args:
            param_group: As torch's; ``orthogonalize=False`` for AdamW, ``name`` for curves.

        Raises:
            ValueError: For hyper-parameters out of range or parameters that are not matrices; nothing is added then.
        """
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("Expected parameters in an order that is the same on all ranks but got a set.")
        params = [params] if isinstance(params, Tensor) else list(params)
        bare = [p[1] if isinstance(p, tuple) else p for p in params]
        if "orthogonalize" not in param_group and bare and all(p in self._templates for p in bare):
            self._add_routed(bare, param_group)
            return
        is_matrix = param_group.get("orthogonalize", True)
        check_ranges({"orthogonalize": is_matrix}, type(self).__name__)
        algorithm = type(self).__name__ if is_matrix else "AdamW"
        check_keys(param_group, algorithm, self._keys(is_matrix), self._keys(not is_matrix))
        group = {
            **(self._matrix_defaults if is_matrix else self._adamw_defaults),
            **param_group,
            "orthogonalize": is_matrix,
            **({"algorithm": type(self).__name__} if is_matrix else {}),
        }
        group = {**{key: _plain(value) for key, value in group.items() if key != "params"}, "params": params}
        if "betas" in param_group and not {"momentum", "beta2"}.isdisjoint(param_group):
            raise ValueError("AdamW: expected betas, or momentum and beta2, but got both in one group. Take betas.")
        group.setdefault("name", "matrices" if is_matrix else "adamw")
        if is_matrix:
            self._validate(group)
        else:
            group = _adamw_group(group)
        if isinstance(group.get("blocks"), tuple):
            group["blocks"] = list(group["blocks"])  # as checkpoints have it
        if "lr" not in param_group:
            group["lr"] = group["lr"] * self._multiplier()
        taken = {other["name"] for other in self.param_groups}
        name = group["name"]
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        group["name"] = next(n for n in names if n not in taken)
        for index, parameter in enumerate(bare):
            label = params[index][0] if isinstance(params[index], tuple) else f"parameter {index}"
            if isinstance(parameter, Tensor):
                check_memory(label, parameter)
            if is_matrix:
                self._layout(label, parameter, group)
        super().add_param_group(group)
        _drop_duplicates(self.param_groups[-1])
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = self._initial_state(parameter, self.param_groups[-1])

    def set_lr(self, lr: float) -> None:
        """Change the learning rate as if the optimizer were built with ``lr``; before a schedule is attached.

        Groups with a learning rate of their own keep it, and AdamW's do where ``adamw_lr`` was given.
        """
        check_ranges({"lr": _plain(lr)}, type(self).__name__, self.ranges)
        old, kinds = self._matrix_defaults["lr"], (True, False) if self.adamw_follows else (True,)
        for group in self.param_groups:
            if group["orthogonalize"] in kinds and group["lr"] == old:
                group["lr"] = _plain(lr)
        for is_matrix in kinds:
            (self._matrix_defaults if is_matrix else self._adamw_defaults)["lr"] = _plain(lr)
        self.defaults["lr"] = _plain(lr)

    def _keys(self, is_matrix: bool) -> set[str]:
        """The hyper-parameters of groups of matrices, or of AdamW."""
        return set(self._matrix_defaults) if is_matrix else ADAMW_KEYS

    def _multiplier(self) -> float | Tensor:
        """What a schedule multiplies learning rates by now."""
        for group in self.param_groups:
            if group.get("initial_lr"):
                return cast("float | Tensor", group["lr"] / group["initial_lr"])
        return 1.0

    def _add_routed(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Add a group of mixed parameters, split as the optimizer's were when it was built; all of it or nothing."""
        named = bool(self.param_groups) and "param_names" in self.param_groups[0]
        routed: dict[str, dict[str, Any]] = {}
        for parameter in params:
            label, template = self._templates[parameter]
            target = routed.setdefault(template["name"], {**group, **template, "params": []})
            target["params"].append((label, parameter) if named else parameter)
        kinds = {target["orthogonalize"] for target in routed.values()}
        for target in routed.values():
            if len(kinds) == 2:  # each takes its own hyper-parameters
                for key in unknown_keys(list(target), self._keys(target["orthogonalize"])):
                    if key in self._keys(not target["orthogonalize"]):
                        del target[key]
            if not target["orthogonalize"] and "lr" in group and self._matrix_defaults["lr"]:
                target["lr"] = group["lr"] * self._adamw_defaults["lr"] / self._matrix_defaults["lr"]
        before = len(self.param_groups)
        try:
            for target in sorted(routed.values(), key=lambda target: target["orthogonalize"]):
                self.add_param_group(target)  # matrices last: BackboneFinetuning drives the last group's lr
        except Exception:
            for added in self.param_groups[before:]:
                for parameter in added["params"]:
                    del self.state[parameter]
            del self.param_groups[before:]
            raise

    def _validate(self, group: dict[str, Any]) -> None:
        """Raise for hyper-parameters of a matrix group that are out of range."""
        check_ranges(group, type(self).__name__, self.ranges)
        newton_schulz_polynomials(group["ns_coefficients"], group["ns_steps"])
        if not isinstance(group["ns_coefficients"], str):  # plain containers only: groups go into checkpoints
            polynomials = newton_schulz_polynomials(group["ns_coefficients"], group["ns_steps"])
            group["ns_coefficients"] = [list(triple) for triple in polynomials]

    def _layout(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Layout:
        """The layout of a parameter's shard; raises if it is no real matrix or its blocks do not fit."""
        name = parameter_label(name, self._module())
        shape, region = self._regions.get(parameter) or region_of(parameter, name)
        if len(shape) < 2:
            raise ValueError(
                f"Expected matrices (at least 2 dimensions) to orthogonalize but {name} has shape {shape}. "
                f"{_how_to_build(type(self).__name__)} Or put it into a group with orthogonalize=False (AdamW)."
            )
        if parameter.is_complex():
            raise ValueError(f"Expected real matrices but {name} is {parameter.dtype}. Route it to AdamW (adamw=...).")
        layout = Layout.of(shape, region, transposed=group["transposed"], blocks=group["blocks"], name=name)
        if local_tensor(parameter).numel() != region.numel:
            raise ValueError(
                f"Expected {name} to hold {region.numel} of its {shape} elements here but it holds "
                f"{local_tensor(parameter).numel()}. Build the optimizer after the model is wrapped and sharded."
            )
        return layout

    # ------------------------------------------------------------------ state

    def _initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if not group["orthogonalize"]:
            return adamw_state(parameter)
        dtype = statistics_dtype(parameter)
        return {
            "momentum_buffer": torch.zeros_like(parameter, dtype=_momentum_dtype(group)),
            "step": torch.zeros((), dtype=dtype, device=parameter.device),
            "skipped": torch.zeros((), dtype=dtype, device=parameter.device),
            **self._extra_state(parameter, self._layout("a parameter", parameter, group), dtype),
        }

    def _extra_state(self, parameter: Tensor, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a subclass keeps besides momentum."""
        return {}

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
                    dtypes["momentum_buffer"] = _momentum_dtype(group) or parameter.dtype
                for key, value in self.state[parameter].items():
                    if isinstance(value, Tensor):
                        self.state[parameter][key] = value.to(parameter.device, dtypes.get(key, value.dtype))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; under FSDP1 in the form that FSDP1 can gather (`lightning_namo.checkpoint`)."""
        self._fill_state()
        state_dict = super().state_dict()
        if holds_fsdp1(self._module()):
            ids = [i for group in state_dict["param_groups"] for i in group["params"]]
            state_dict["state"] = {
                i: flat_form(parameter) for i, parameter in zip(ids, self._parameter_states(), strict=True)
            }
        return state_dict

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
                per_column = self.per_column if self.adaptive and group["orthogonalize"] else None
                parameters.append(
                    ParameterState(name, parameter, group, self.state[parameter], shape, region, per_column)
                )
        return parameters

    def _read(
        self, state_dict: dict[str, Any], parameters: list[ParameterState]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Groups and states of this optimizer's own kind, checked."""
        cls = type(self).__name__
        saved = read(state_dict, parameters, self.param_groups, cls)
        states = [plain_form(state, parameter) for state, parameter in zip(saved.states, parameters, strict=True)]
        if holds_fsdp1(self._module()):
            fill_empty(states, parameters)
        check_states(states, parameters, cls)
        groups = []
        for theirs, own in zip(saved.groups, self.param_groups, strict=True):
            self._check_group(theirs, own)
            structure = {key: own[key] for key in ("name", *STRUCTURE, *ADDED_KEYS) if key in own}
            groups.append({**structure, **theirs})
        return groups, laid_out(states, parameters)

    def _check_group(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        """Raise for hyper-parameters of a checkpoint that are missing or out of range."""
        validate, defaults = _validate_adamw, self._adamw_defaults
        if own["orthogonalize"]:
            validate, defaults = self._validate, self._matrix_defaults
        missing = sorted(defaults.keys() - ADDED_KEYS.keys() - saved.keys())
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
        hyper = ("_matrix_defaults", "_adamw_defaults", "_templates", "_regions", "bucket_bytes", "adopt_state")
        own = (*hyper, "adamw_follows", "_adamw_skipped")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own if key in self.__dict__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, which calls it on load, too: a state that lacks what newer versions have gets their defaults."""
        super().__setstate__(state)
        self._prepared = None
        for group in self.param_groups:
            if group.setdefault("orthogonalize", True):
                group.update({key: value for key, value in ADDED_KEYS.items() if key not in group})
        own = self.__dict__
        if "_number" not in own:
            self._number = next(_numbers)
        for key, value in {"_module": _no_module, "_templates": {}, "_regions": {}}.items():
            own.setdefault(key, value)
        for key, is_matrix in {"_matrix_defaults": True, "_adamw_defaults": False}.items():
            if key not in own:
                own[key] = self._first_hyper_parameters(is_matrix)
        own["_matrix_defaults"] = {**ADDED_KEYS, **own["_matrix_defaults"]}

    def _first_hyper_parameters(self, is_matrix: bool) -> dict[str, Any]:
        """Those of the first group of matrices or of AdamW, as defaults of an optimizer whose state lacks them."""
        adamw = {"lr": self.defaults["lr"], "weight_decay": 0.0, "momentum": 0.9, "beta2": 0.95, "eps": 1e-8}
        group = next((group for group in self.param_groups if group["orthogonalize"] == is_matrix), adamw)
        keys = set(group) - {"params", "param_names", "name", "orthogonalize", "algorithm", "initial_lr", *ADDED_KEYS}
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

    def _warn_of_ungrouped(self) -> None:
        """Warn, once, of parameters that were frozen when the optimizer was built and now have a gradient."""
        if self._warned or len(self._templates) <= len(self.state):
            return
        for parameter, (name, _) in self._templates.items():
            if parameter.grad is not None and parameter not in self.state:
                self._warned = True
                label = parameter_label(name, self._module())
                warnings.warn(
                    f"{label} has a gradient but is in no group of {type(self).__name__}: it was frozen when the "
                    "optimizer was built, and is not trained. Call optimizer.add_param_group({'params': [...]}).",
                    stacklevel=3,
                )
                return


def _no_module() -> None:
    return None


def _merged(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A saved group for the optimizer's own parameters, which it holds in their order and in its own dtypes."""
    kept = ("params", "param_names", "momentum_dtype", *STRUCTURE)
    loaded = {key: value for key, value in saved.items() if key not in ("params", "param_names")}
    return {**copy.deepcopy(loaded), **{key: own[key] for key in kept if key in own}}


def _plain(value: Any) -> Any:
    """Numbers as Python's own: subclasses (jsonargparse, numpy) do not load from a checkpoint with weights_only."""
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, Tensor):  # groups are scheduled apart; a number has no dimensions
        return value.clone().reshape(()) if value.numel() == 1 else value.clone()
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _drop_duplicates(group: dict[str, Any]) -> None:
    """Keep the first of each parameter that a group lists more than once, of which torch has warned."""
    params, names = group["params"], group.get("param_names")
    kept = sorted({parameter: index for index, parameter in reversed(list(enumerate(params)))}.values())
    group["params"] = [params[index] for index in kept]
    if names is not None:
        group["param_names"] = [names[index] for index in kept]


def named_parameters(group: dict[str, Any]) -> Iterator[tuple[Tensor, str]]:
    """The parameters of a group with their names."""
    return zip(group["params"], parameter_names(group), strict=True)


def parameter_names(group: dict[str, Any]) -> list[str]:
    """Parameter names of a group; numbers where torch was given none."""
    return cast("list[str]", group.get("param_names")) or [
        f"{group['name']}[{index}]" for index in range(len(group["params"]))
    ]


def _momentum_dtype(group: dict[str, Any]) -> torch.dtype | None:
    """None: the parameter's. Groups of older checkpoints have no such key."""
    name = group.get("momentum_dtype")
    return None if name is None else cast(torch.dtype, getattr(torch, name))


def statistics_dtype(parameter: Tensor) -> torch.dtype:
    """float32, or float64 for float64 parameters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _how_to_build(algorithm: str) -> str:
    """How to get from a module to its optimizer."""
    return (
        f"Use build_optimizer(module, {algorithm}), or with Lightning optimize_with({algorithm}) or OptimizerCallback, "
        "in place of module.parameters() or LightningCLI's --optimizer: they split the parameters with "
        "split_parameters(module)."
    )


def _adamw_group(group: dict[str, Any]) -> dict[str, Any]:
    """A group of AdamW, checked, with the names that the optimizer has for torch's ``betas``."""
    _validate_adamw(group)
    own = {key: value for key, value in group.items() if key != "betas"}
    return {**own, "momentum": group["betas"][0], "beta2": group["betas"][1]} if "betas" in group else own


def _validate_adamw(group: dict[str, Any]) -> None:
    check_ranges(group, "AdamW")


def hyper_parameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among the arguments of a constructor, ``locals()``."""
    return {key: value for key, value in arguments.items() if key not in ("self", "params", "__class__")}
