"""Checks of the command line's input before anything is built or written: what its parser lets pass."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import inspect
import math
import os
import pickle
import pydoc
import socket
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.data.streaming import StreamingTextDataModule
from lightning_namo.gpt2.model import GPT2Config
from lightning_namo.gpt2.module import GPT2Module
from lightning_namo.integration.build import make_optimizer
from lightning_namo.integration.optimizer_callback import OptimizerCallback
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.optim.schedules import WarmupStableDecay
from lightning_namo.routing.split import ROUTING, split_parameters

_REFUSALS = (ArithmeticError, RuntimeError, TypeError, ValueError)  # what constructors raise for their arguments
_KEYWORDS = ("last", "best", "hpc", "registry")  # Lightning's, in place of the path of a checkpoint
_SHARDED = ("meta.pt", ".metadata", "checkpoint")  # in the folder of a checkpoint of FSDP, FSDP2 or DeepSpeed


def check_config(config: str) -> None:
    """Refuse a config that is no text or no mapping, that names a key twice, or an optimizer that does not exist.

    YAML's other errors are left to the parser, which names the line.

    Args:
        config: A file, or YAML.

    Raises:
        ValueError: If it is such a one.
    """
    is_file = os.path.isfile(config)
    name = config if is_file else "the config on the command line"
    try:
        if is_file:
            with open(config, encoding="utf-8") as file:
                text = file.read()
        root = yaml.compose(text if is_file else config, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {name} to be a text in UTF-8. Got: {error}") from error
    except RecursionError as error:
        raise ValueError(f"Expected {name} to be nested less deeply.") from error
    except yaml.YAMLError:
        return
    if is_file and not isinstance(root, yaml.MappingNode):
        got = "an empty file" if root is None else f"{root.value!r:.60}"
        raise ValueError(f"Expected {name} to be a mapping of sections (model:, data:, optim:, trainer:). Got {got}.")
    seen: set[Any] = set()  # aliases lead to the same node again
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, yaml.CollectionNode) or node in seen:
            continue
        seen.add(node)
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, count in keys.items():
                if count > 1:
                    raise ValueError(
                        f"Expected each key of {name} once. Got {key!r} {count} times in the mapping that begins in "
                        f"line {node.start_mark.line + 1}."
                    )
        nodes += [child for pair in node.value for child in (pair if isinstance(pair, tuple) else (pair,))]
    _check_optimizer_name(_scalar(root, "optim", "optimizer") or _scalar(root, "optim", "optimizer", "class_path"))


def _scalar(node: Any, *keys: str) -> str | None:
    """The text that stands at nested keys, if it is such."""
    for key in keys:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        node = next((value for name, value in pairs if name.value == key), None)
    return node.value if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str" else None


def check_is_described(sections: Namespace) -> None:
    """Refuse to train what nobody asked for: a GPT-2 and a text with all of their defaults, without an end.

    Raises:
        ValueError: With what to name.
    """
    model, data = sections.model, sections.data
    sizes = {field.name: field.default for field in dataclasses.fields(GPT2Config)}
    described = (
        pydoc.locate(model.class_path) is not GPT2Module
        or any(model.init_args[name] != default for name, default in sizes.items())
        or pydoc.locate(data.class_path) not in (TextDataModule, StreamingTextDataModule)
        or data.init_args.data_dir is not None
    )
    limits = [sections.trainer.get(key) for key in ("max_steps", "max_epochs", "max_time", "fast_dev_run")]
    if not described and all(limit is None or limit is False or limit == -1 for limit in limits):
        raise ValueError(
            "Expected a recipe or a model to train, as --config quickstart or --model my_package.MyModule. Got a GPT-2 "
            "and a text with all of their defaults, and no limit. `lightning-namo recipes` lists what can be run, and "
            "the layers to put over it; --trainer.max_steps is a limit."
        )


def _check_optimizer_name(name: str | None) -> None:
    """Refuse a name of ours or of torch.optim, or a short one, that is no optimizer's."""
    if not name or os.path.exists(name):
        return
    module, _, short = name.rpartition(".")
    found: dict[str, type[Any]] = {cls.__name__: cls for cls in _subclasses(Optimizer)} | {"Optimizer": Optimizer}
    if module in ("lightning_namo", "torch.optim"):
        found = {key: cls for key, cls in found.items() if cls.__module__.startswith(module)}
    if short in found or module not in ("", "lightning_namo", "torch.optim"):
        return
    lowered = {key.lower(): key for key in found}
    nearest = [lowered[key] for key in difflib.get_close_matches(short.lower(), lowered, n=3, cutoff=0.3)]
    raise ValueError(
        f"Expected --optim.optimizer to be an optimizer. Got {name!r:.80}, which does not exist"
        f"{'. Nearest: ' + ', '.join(nearest) if nearest else ''}. Those of your own are named by their module, as "
        "my_package.MyOptimizer."
    )


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    subclasses: list[type[Any]] = cls.__subclasses__()
    for subclass in subclasses:
        if not subclass.__name__.startswith("_"):
            yield subclass
        yield from _subclasses(subclass)


def check_sections(sections: Namespace) -> None:
    """Refuse what no constructor of the sections can mean, and the parser lets pass.

    That are nulls, no section at all, and hyper-parameters out of the ranges of the optimizer's class.

    Raises:
        ValueError: With the name of the option.
    """
    for key in ("trainer", "optim", "model", "data"):
        if not isinstance(sections.get(key), Namespace):
            raise ValueError(
                f"Expected options under {key}:. Got {sections.get(key)!r}: give it some, or leave it out."
            )
    for key in ("optimizer", *ROUTING, "adopt_state"):
        if sections.optim.get(key) is None and key != "blocks":
            raise ValueError(f"Expected --optim.{key} to have a value. Got null.")
    for key in ("optimizer", "schedule"):
        section = sections.optim.get(key)
        for option in _nulls(section) if isinstance(section, Namespace) else ():
            raise ValueError(f"Expected --optim.{key}.{option} to have a value. Got null.")
    for option, value, expected in _out_of_range(sections.optim.optimizer):
        raise ValueError(f"Expected --optim.optimizer.{option} to be {expected}. Got {value!r}.")
    blocks = sections.optim.get("blocks")
    for glob in blocks if isinstance(blocks, dict) else ():
        if not isinstance(glob, str):
            raise ValueError(f"Expected the keys of --optim.blocks to be globs over parameter names. Got {glob!r}.")


def _nulls(section: Namespace) -> Iterator[str]:
    """Arguments that are None, of a class that has another default and says nothing of None."""
    named = "class_path" in section  # WarmupStableDecay need not be
    cls: Any = pydoc.locate(section.class_path) if named else WarmupStableDecay
    parameters = inspect.signature(cls).parameters
    for option, value in ((section.get("init_args") or {}) if named else section).items():
        parameter = parameters.get(option)
        if value is None and parameter is not None and parameter.default is not None:
            annotation = str(parameter.annotation)
            if "None" not in annotation and "Optional" not in annotation:
                yield option


def _out_of_range(section: Namespace) -> Iterator[tuple[str, Any, str]]:
    """Arguments of one of this package's optimizers, or of one's own, that its ranges do not have."""
    cls = pydoc.locate(section.class_path)
    if isinstance(cls, type) and issubclass(cls, OrthogonalizedOptimizer):
        for option, value in (section.get("init_args") or {}).items():
            if option in cls.ranges and value is not None and not cls.ranges[option].has(value):
                yield option, value, cls.ranges[option].expected


def check_data(model: LightningModule, data: LightningDataModule) -> None:
    """Refuse to train a module on the recipes' text where it has training data of its own.

    Raises:
        ValueError: That says how to name data.
    """
    if isinstance(data, TextDataModule) and is_overridden("train_dataloader", model):
        raise ValueError(
            f"Expected one source of training data, but {type(model).__name__} has a train_dataloader and --data is "
            "TextDataModule, as by default. Move the loaders into a LightningDataModule and name it: "
            "--data my_package.MyData."
        )


def check_optimizer(optim: OptimizerCallback) -> None:
    """Build the optimizer, and the schedule where it needs no run, on a matrix and a vector.

    Raises:
        ValueError: For what their constructors refuse, and for hyper-parameters that are not finite.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # else the network would start from other numbers than under DDP
            layer = nn.Linear(2, 2)
        optimizer = make_optimizer(split_parameters(layer), optim.optimizer, optim.adopt_state)
    except _REFUSALS as error:
        raise ValueError(f"Expected --optim.optimizer to make an optimizer. Got: {error}") from error
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params" and not all(math.isfinite(number) for number in _numbers(value)):
                raise ValueError(f"Expected --optim.optimizer to get finite numbers. Got {key}={value}.")
    if optim.schedule is None or (isinstance(optim.schedule, WarmupStableDecay) and optim.schedule.needs_total_steps):
        return
    try:
        optim.schedule(optimizer)
    except _REFUSALS as error:
        raise ValueError(f"Expected --optim.schedule to make a schedule. Got: {error}") from error


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)


def check_port(trainer: Trainer) -> None:
    """Refuse a port for the processes to meet at that is taken: found out later, it leaves the others waiting.

    torchrun looks for itself: its agents meet there before they start any process.

    Raises:
        ValueError: On the first process, with the port.
    """
    environment = trainer.strategy.cluster_environment if isinstance(trainer.strategy, ParallelStrategy) else None
    if environment is None or isinstance(environment, TorchElasticEnvironment):
        return
    if trainer.world_size == 1 or trainer.global_rank > 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", environment.main_port))  # without listening, which the others would take for the first one
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise ValueError(
                f"Expected port {environment.main_port}, where the processes are to meet, to be free. Got one that "
                "another process listens on: set MASTER_PORT to another or, on one node, leave it out; if it is an "
                "earlier run's, wait for that to end."
            ) from error


def check_routing(optim: OptimizerCallback, module: LightningModule) -> None:
    """Route the parameters, where the module has them before its hooks: a glob that matches nothing is an error.

    Raises:
        ValueError: As `split_parameters`.
    """
    network: nn.Module = module
    if type(module) is GPT2Module:
        with torch.device("meta"):  # only names and shapes
            network = GPT2Module(**dataclasses.asdict(module.config))
            network.configure_model()
    elif is_overridden("configure_model", module) or is_overridden("setup", module):
        return
    split_parameters(network, **optim.routing)


def check_checkpoint(path: str | os.PathLike[str] | None) -> None:
    """Refuse a path that holds no checkpoint, or half of one.

    Args:
        path: A file, a folder, an address or one of Lightning's keywords; None: nothing is to be loaded.

    Raises:
        ValueError: With the path and what is wrong with it.
    """
    if path is None or "://" in str(path) or str(path).partition(":")[0] in _KEYWORDS:
        return
    expected = f"Expected --ckpt_path to be a whole checkpoint of Lightning. Got {path}"
    if not os.path.exists(path):
        raise ValueError(f"{expected}, which does not exist.")
    if os.path.isdir(path):
        if not _any_in(path, _SHARDED):
            raise ValueError(f"{expected}, a folder without {', '.join(_SHARDED[:-1])} or {_SHARDED[-1]}.")
        return
    is_zip = zipfile.is_zipfile(path)
    try:
        checkpoint = torch.load(path, map_location="meta", mmap=is_zip, weights_only=True)
    except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        if is_zip and isinstance(error, pickle.UnpicklingError):
            return  # objects of the user's own: --weights_only says whether they are loaded
        reason = f"of {os.path.getsize(path)} bytes: {type(error).__name__}"
        raise ValueError(f"{expected}, cut short or another kind of file ({reason}).") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{expected}, which has no state_dict in it.")


def _any_in(folder: str | os.PathLike[str], names: Iterable[str]) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in names)
