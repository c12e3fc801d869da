"""Parameter groups of two kinds, matrices and AdamW's: their keys, ranges and defaults."""

from __future__ import annotations

import functools
import inspect
import itertools
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lightning_namo.arguments import UNIT, Range, check, check_ranges
from lightning_namo.checkpoint.numbering import number_by_module
from lightning_namo.optim.adamw import check_memory
from lightning_namo.optim.ranges import ADAMW_KEYS, RANGES, MomentumDtype, check_keys, unknown_keys
from lightning_namo.polar.coefficients import Coefficients, newton_schulz_polynomials
from lightning_namo.polar.orthogonalize import Method
from lightning_namo.routing.names import parameter_label
from lightning_namo.routing.split import ParameterGroups
from lightning_namo.sharding.batch import BatchLayout, Box, layout_of
from lightning_namo.sharding.discovery import region_of
from lightning_namo.sharding.layout import Layout, ShardRegion
from lightning_namo.sharding.local import local_tensor

Params: TypeAlias = Iterable[Any] | ParameterGroups
NUMBERS = itertools.count()  # of the optimizers of this process, copies too, in the order in which they are built
ENGINE_KEYS: Mapping[str, tuple[Any, Any]] = {  # type and default of what a rule does not read: every class takes them
    "ns_steps": (int, 5),
    "ns_coefficients": (Coefficients, "quintic"),
    "orthogonalizer": (Method, "newton_schulz"),
    "shape_scale": (float | None, 0.2),
    "momentum_dtype": (MomentumDtype | None, None),
    "adamw_lr": (float | None, None),
    "adamw_betas": (tuple[float, float], (0.9, 0.95)),
    "adamw_eps": (float, 1e-8),
    "adamw_weight_decay": (float, 0.0),
}
# What a constructor that does not mention them is given where nobody gives any: command lines pass defaults on, and the
# class's own value is to stand then. None of shape_scale is a value, s = 1.
_NOT_GIVEN: Mapping[str, Any] = {**dict.fromkeys(ENGINE_KEYS), "shape_scale": ENGINE_KEYS["shape_scale"][1]}


class GroupedOptimizer(Optimizer):
    """Parameter groups of the optimizers; `StatefulOptimizer` adds the state, `OrthogonalizedOptimizer` the step.

    Parameter groups with ``orthogonalize=False`` are AdamW's. The others hold matrices: parameters of two or more
    dimensions, flattened from dimension 1, with output features as rows unless the group says ``transposed=True``,
    stacked by rows if it says ``blocks=k`` or ``blocks=[rows, ...]``. Any hyper-parameter can be set by group.

    ``lr`` of a group, and ``weight_decay`` of one of matrices, may be tensors, so that a captured step follows a
    schedule (the other's is read from the device by torch's AdamW).

    Attributes:
        ranges: Of the class: what the hyper-parameters may be that it adds to those that all rules know.
        fixed: Of the class: hyper-parameters by which its states change their meaning, and what a group means that
            lacks them; see `StatefulOptimizer`.
        adamw_follows: Whether the learning rate of AdamW groups is that of the matrices, for want of another.

    Args:
        params: What `split_parameters` returns, or torch's usual iterables and groups.
        defaults: Hyper-parameters of matrix groups; those with the prefix ``adamw_`` are of AdamW groups: lr (None:
            that of the matrices), weight_decay, betas, eps.

    Raises:
        ValueError: For hyper-parameters out of range, parameters that are not matrices, or no matrix at all.
        TypeError: For a module in place of parameters.
    """

    ranges: ClassVar[Mapping[str, Range]] = RANGES
    fixed: ClassVar[Mapping[str, Any]] = {}
    adamw_follows: bool = False
    _warned: bool = False
    _engine_keys: Mapping[str, Any] = {}  # given to the constructor of a class that has others

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Add the ranges of the base classes to its own, and the engine's keys to the constructor's signature."""
        super().__init_subclass__(**kwargs)
        bases = list(reversed(cls.__mro__))
        cls.ranges = {key: of for base in bases for key, of in vars(base).get("ranges", {}).items()}
        cls.fixed = {key: of for base in bases for key, of in vars(base).get("fixed", {}).items()}
        for key, of in cls.ranges.items():
            check(isinstance(of, Range), cls.__name__, f"ranges[{key!r}]", "a lightning_namo.arguments.Range", repr(of))
        if cls.__init__ is not GroupedOptimizer.__init__ and not hasattr(cls.__init__, "takes_engine_keys"):
            cls.__init__ = _with_engine_keys(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        if isinstance(params, nn.Module):
            raise TypeError(
                f"{type(self).__name__}: expected groups of parameters but got a module, {type(params).__name__}. "
                f"{_how_to_build(type(self).__name__)}"
            )
        if missing := [key for key in ("lr", "momentum", "weight_decay") if key not in defaults]:
            raise ValueError(
                f"{type(self).__name__}: expected super().__init__ to be given {', '.join(missing)}, too, which "
                "torch's schedulers and Lightning's monitors read (0.0 for none)."
            )
        of_engine = {key: default for key, (_, default) in ENGINE_KEYS.items()}
        defaults = {**of_engine, **defaults, **self._engine_keys}
        check_ranges({key: plain_value(value) for key, value in defaults.items()}, type(self).__name__, self.ranges)
        matrix_defaults = {key: value for key, value in defaults.items() if not key.startswith("adamw_")}
        self._number = next(NUMBERS)
        self._matrix_defaults = {"transposed": False, "blocks": 1, "batched": False, **matrix_defaults}
        self.adamw_follows = defaults["adamw_lr"] is None
        adamw_defaults = {key: defaults[f"adamw_{key}"] for key in ("lr", "weight_decay", "betas", "eps")}
        if self.adamw_follows:
            adamw_defaults["lr"] = defaults["lr"]
        self._adamw_defaults = _adamw_group({key: plain_value(value) for key, value in adamw_defaults.items()})
        self._templates: dict[Tensor, tuple[str, dict[str, Any]]] = {}
        self._regions: dict[Tensor, tuple[tuple[int, ...], ShardRegion | Box]] = {}
        self._module: Callable[[], torch.nn.Module | None] = no_module
        if isinstance(params, ParameterGroups):
            self._templates = {p: (params.names[p], keys) for p, keys in params.templates.items()}
            self._regions = dict(params.regions.items())
            self._module = params.module
        super().__init__(cast(Any, params), {key: defaults[key] for key in ("lr", "weight_decay", "momentum")})
        if (module := self._module()) is not None:
            number_by_module(self, module)
        waits = any(keys["orthogonalize"] for _, keys in self._templates.values())  # for matrices that are frozen yet
        if not waits and not any(group["orthogonalize"] and group["params"] for group in self.param_groups):
            raise ValueError(
                f"Expected at least one matrix to orthogonalize but no parameter group of {type(self).__name__} has "
                "one. Use torch.optim.AdamW, or unfreeze layers, or name matrices in orthogonalize=..."
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
        check_ranges({"orthogonalize": is_matrix}, type(self).__name__, self.ranges)
        algorithm = type(self).__name__ if is_matrix else "AdamW"
        check_keys(param_group, algorithm, self._keys(is_matrix), self._keys(not is_matrix))
        group = {
            **(self._matrix_defaults if is_matrix else self._adamw_defaults),
            **param_group,
            "orthogonalize": is_matrix,
            **({"algorithm": type(self).__name__} if is_matrix else {}),
        }
        group = {**{key: plain_value(value) for key, value in group.items() if key != "params"}, "params": params}
        if "betas" in param_group and not {"momentum", "beta2"}.isdisjoint(param_group):
            raise ValueError("AdamW: expected betas, or momentum and beta2, but got both in one group. Take betas.")
        group.setdefault("name", "matrices" if is_matrix else "adamw")
        if is_matrix:
            self._validate(group)
        else:
            group = _adamw_group(group)
        for key, absent in self._absent.items():
            if is_matrix and group[key] == absent:
                del group[key]  # as checkpoints of before have none
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
        self._add_state(self.param_groups[-1])

    @property
    def _absent(self) -> dict[str, Any]:
        """Keys that say what the states of a matrix group mean, and what a group means that lacks them."""
        return {"batched": False, **self.fixed}

    def _add_state(self, group: dict[str, Any]) -> None:
        """Make the state of the parameters of a new group."""

    def set_lr(self, lr: float) -> None:
        """Change the learning rate as if the optimizer were built with ``lr``; before a schedule is attached.

        Groups with a learning rate of their own keep it, and AdamW's do where ``adamw_lr`` was given.
        """
        check_ranges({"lr": plain_value(lr)}, type(self).__name__, self.ranges)
        old, kinds = self._matrix_defaults["lr"], (True, False) if self.adamw_follows else (True,)
        for group in self.param_groups:
            if group["orthogonalize"] in kinds and group["lr"] == old:
                group["lr"] = plain_value(lr)
        for is_matrix in kinds:
            (self._matrix_defaults if is_matrix else self._adamw_defaults)["lr"] = plain_value(lr)
        self.defaults["lr"] = plain_value(lr)

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

    def _layout(self, name: str, parameter: Tensor, group: dict[str, Any]) -> Layout | BatchLayout:
        """The layout of a parameter's shard; raises if it is no real matrix or its blocks do not fit."""
        name = parameter_label(name, self._module())
        shape, region = self._regions.get(parameter) or region_of(parameter, name)
        if len(shape) < 2:
            raise ValueError(
                f"Expected matrices (at least 2 dimensions) to orthogonalize but {name} has shape {shape}. "
                f"{_how_to_build(type(self).__name__)} Or put it into a group with orthogonalize=False (AdamW)."
            )
        if parameter.is_complex():
            raise ValueError(
                f"Expected real matrices but {name} is {parameter.dtype}. Put it into a group with orthogonalize=False."
            )
        keys = {"transposed": group["transposed"], "blocks": group["blocks"]}
        layout = layout_of(shape, region, batched=group.get("batched", False), name=name, **keys)
        if isinstance(layout, BatchLayout) and not local_tensor(parameter).is_contiguous():
            raise ValueError(
                f"Expected {name} {shape}, a batch of matrices, to be contiguous in memory. Make it so "
                "(parameter.data = parameter.data.contiguous()) before the optimizer is built."
            )
        if local_tensor(parameter).numel() != region.numel:
            raise ValueError(
                f"Expected {name} to hold {region.numel} of its {shape} elements here but it holds "
                f"{local_tensor(parameter).numel()}. Build the optimizer after the model is wrapped and sharded."
            )
        return layout

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


def _with_engine_keys(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that takes the hyper-parameters of the engine, too, for a class that does not mention them."""
    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    lacking = {} if takes_all else {key: of for key, of in ENGINE_KEYS.items() if key not in signature.parameters}

    @functools.wraps(init)
    def with_engine_keys(self: GroupedOptimizer, *args: Any, **kwargs: Any) -> None:
        given = {key: kwargs.pop(key) for key in lacking if key in kwargs}
        given = {key: value for key, value in given.items() if value != _NOT_GIVEN[key]}
        self._engine_keys = {**given, **self._engine_keys}
        mentioned = self._engine_keys.keys() & signature.parameters.keys()  # of a subclass that does not
        mentioned -= signature.bind_partial(self, *args, **kwargs).arguments.keys()
        init(self, *args, **kwargs, **{key: self._engine_keys[key] for key in mentioned})

    added = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=_NOT_GIVEN[key], annotation=kind | None)
        for key, (kind, _) in lacking.items()
    ]
    if lacking:
        with_engine_keys.__signature__ = signature.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    with_engine_keys.__annotations__ = {**init.__annotations__, **{p.name: p.annotation for p in added}}
    with_engine_keys.takes_engine_keys = True  # type: ignore[attr-defined]
    return with_engine_keys


def no_module() -> None:
    """In place of a weak reference to a module, where there is none."""
    return None


def plain_value(value: Any) -> Any:
    """Numbers as Python's own: subclasses (jsonargparse, numpy) do not load from a checkpoint with weights_only."""
    if isinstance(value, (list, tuple)):
        return type(value)(plain_value(item) for item in value)
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


def _how_to_build(algorithm: str) -> str:
    """How to get from a module to its optimizer."""
    return (
        f"Use build_optimizer(module, {algorithm}), or with Lightning optimize_with({algorithm}) or OptimizerCallback, "
        "in place of module.parameters() or LightningCLI's --optimizer: they split the parameters with "
        "split_parameters(module)."
    )


def _adamw_group(group: dict[str, Any]) -> dict[str, Any]:
    """A group of AdamW, checked, with the names that the optimizer has for torch's ``betas``."""
    validate_adamw(group)
    own = {key: value for key, value in group.items() if key != "betas"}
    return {**own, "momentum": group["betas"][0], "beta2": group["betas"][1]} if "betas" in group else own


def validate_adamw(group: dict[str, Any]) -> None:
    """Raise for hyper-parameters of an AdamW group that are out of range."""
    names = {"momentum": "betas[0]", "beta2": "betas[1]"}
    ranges = {**RANGES, **dict.fromkeys(names.values(), UNIT)}
    check_ranges({names.get(key, key): value for key, value in group.items()}, "AdamW", ranges)


def hyper_parameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among the arguments of a constructor, ``locals()``."""
    return {key: value for key, value in arguments.items() if key not in ("self", "params", "__class__")}
