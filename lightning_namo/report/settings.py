"""Settings of runs: read from what Lightning writes beside the event files, and what differs between runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml  # type: ignore[import-untyped]

Settings: TypeAlias = dict[str, Any]  # by dotted key

FILES = ("config.yaml", "hparams.yaml")  # LightningCLI's, and a TensorBoardLogger's
_OF_FOLDERS = ("trainer.logger", "trainer.default_root_dir", "ckpt_path", "dirpath", "_instantiator")
_RATES, _SEEDS = ("lr", "learning_rate"), ("seed", "seed_everything")


def read_settings(folder: Path) -> tuple[Settings, str | None]:
    """The settings in a run's folder, and what is wrong with their file; none if there is no file."""
    complaint = None
    for path in (folder / name for name in FILES):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            complaint = complaint or f"{path.name}: {' '.join(str(error).split())[:120]}."
            continue
        if isinstance(content, dict) and content:
            return dict(_flatten(content)), complaint
    return {}, complaint


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Takes tuples, paths and the like, as hparams.yaml has them, for what they are made of; runs nothing."""


def _parts(loader: Any, suffix: str, node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else node.value


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _parts)


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key; a class stands at the key of its arguments, by its short name."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = _by_class(value)
    if isinstance(value, dict) and value:
        for name, item in value.items():
            if name == "class_path":
                yield key, _short(item)
            elif name == "init_args":
                yield from _flatten(item, key) if item else ()
            else:
                yield from _flatten(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _short(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]


def _by_class(items: list[Any]) -> dict[str, Any]:
    """Items of a list, as callbacks, by the name of their class, or by their number where that is not theirs alone."""
    names = [_short(item["class_path"]) if isinstance(item, dict) and "class_path" in item else "" for item in items]
    return {
        name if name and names.count(name) == 1 else str(number): item
        for number, (name, item) in enumerate(zip(names, items, strict=True))
    }


def as_text(value: Any) -> str:
    """A setting, as it is shown."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def of_run(settings: Settings) -> Settings:
    """Settings without those that say where files are."""
    return {
        key: value
        for key, value in settings.items()
        if not key.startswith(_OF_FOLDERS) and key.rpartition(".")[2] not in _OF_FOLDERS
    }


def differing(all_settings: Sequence[Settings]) -> list[str]:
    """Keys whose values differ between runs.

    A run that lacks a key does not differ by that if there is a key above, which says it: the argument is of a class
    that the run does not have.
    """
    kept = [of_run(settings) for settings in all_settings]
    with_settings = [settings for settings in kept if settings]
    found, keys = [], dict.fromkeys(key for settings in kept for key in settings)
    for key in keys:
        values = {as_text(settings[key]) for settings in with_settings if key in settings}
        is_argument = any(key[:i] in keys for i, letter in enumerate(key) if letter == ".")
        lacking = any(key not in settings for settings in with_settings) and not is_argument
        if len(values) + lacking > 1:
            found.append(key)
    return found


def of_optimizer(settings: Settings) -> list[str]:
    """Keys of the optimizer; all keys if none is named so."""
    keys = list(of_run(settings))
    named = [key for key in keys if "optimizer" in key.split(".")]
    return named or [key for key in keys if key.startswith("model") or is_rate(key)] or keys


def shortened(keys: Sequence[str]) -> dict[str, str]:
    """Each key by as few of its last parts as tell it apart."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found[key] = next(e for e in ends if e == key or sum(f".{k}".endswith(f".{e}") for k in keys) == 1)
    return found


def is_rate(key: str) -> bool:
    """Whether it is a learning rate."""
    return key.rpartition(".")[2] in _RATES


def is_seed(key: str) -> bool:
    """Whether it is a seed."""
    return key.rpartition(".")[2] in _SEEDS
