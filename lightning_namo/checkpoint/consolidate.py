"""Checkpoints as one file: sharded ones are read and written as such, without starting processes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from tqdm.utils import CallbackIOWrapper

from lightning_namo.atomic_io import check_output, replacing
from lightning_namo.progress import progress_bar

SHARDED = (".metadata", "meta.pt")
"""Files of a sharded checkpoint beside the shards: torch's index of them, and everything that is not sharded."""


def consolidate(ckpt_path: str, out: str, overwrite: bool = False) -> dict[str, Any]:
    """Write a sharded checkpoint (of FSDP or ModelParallelStrategy) as one file, which every strategy resumes.

    All of it has to fit into memory. The index of a sharded checkpoint is a pickle, which may run code when it is
    read: open only those that you trust.

    Args:
        ckpt_path: Folder of the sharded checkpoint.
        out: File to write.
        overwrite: Whether to replace the file, if there is one.

    Returns:
        The file, its size in bytes, the step, and the numbers of tensors and optimizers.

    Raises:
        ValueError: No sharded checkpoint at `ckpt_path`, or something at `out` already.
    """
    source, target = Path(ckpt_path), Path(out)
    check_output(target, overwrite)
    if target.is_dir():
        raise ValueError(f"Expected a file to write to. Got {target}, which is a folder.")
    if source.is_file():
        raise ValueError(f"Expected a sharded checkpoint, which is a folder. Got {source}, which is one file already.")
    checkpoint = read_checkpoint(source)
    size = sum(file.stat().st_size for file in source.iterdir())
    with (
        replacing(target) as temporary,
        temporary.open("wb") as file,
        progress_bar(f"Writing {target.name}", "B", size) as bar,
    ):
        torch.save(checkpoint, CallbackIOWrapper(bar.update, file, "write"))
    return {
        "out": str(target),
        "bytes": target.stat().st_size,
        "global_step": checkpoint.get("global_step"),
        "tensors": len(checkpoint["state_dict"]),
        "optimizers": len(checkpoint["optimizer_states"]),
    }


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that was written last in the folder of a run or below it; any other path as it is."""
    if not path.is_dir() or (path / SHARDED[0]).is_file():
        return path
    written = {
        found: (found / SHARDED[0] if found.is_dir() else found).stat().st_mtime_ns
        for found in path.rglob("*.ckpt")
        if found.is_file() or (found / SHARDED[0]).is_file()
    }
    return max(written, key=written.__getitem__, default=path)


def read_checkpoint(path: Path, *, optimizers: bool = True) -> dict[str, Any]:
    """Read a checkpoint of Lightning of any strategy, in the form that it has on one device.

    Optimizer states of a sharded checkpoint keep the names of parameters as ids. Lightning numbers them by their
    order in the module, which a checkpoint does not tell (of a tied or a frozen parameter and a buffer it has only
    names); it takes names as well, under every strategy.

    Args:
        path: A file, or the folder of a sharded checkpoint.
        optimizers: Whether to read the states of optimizers from a folder, too; in a file they are not read before
            they are used.

    Returns:
        The checkpoint, with tensors on the CPU.

    Raises:
        ValueError: There is none, or it is damaged or from elsewhere.
    """
    if not path.exists():
        raise ValueError(f"Expected a checkpoint. Got {path}, which does not exist.")
    missing = [name for name in SHARDED if not (path / name).is_file()] if path.is_dir() else []
    if missing:
        raise ValueError(
            f"Expected a checkpoint: a file, or a folder with {missing[0]} or with checkpoints (*.ckpt) below it. Got "
            f"the folder {path}."
        )
    try:
        checkpoint = _read_folder(path, optimizers) if path.is_dir() else _load(path, mmap=True)
    except (Exception, CheckpointException) as error:  # torch raises errors of all kinds at bytes that it did not write
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = (str(cause) or type(cause).__name__).strip().splitlines()[0]
        raise ValueError(f"Expected a checkpoint of Lightning. Got {path}, which cannot be read: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(checkpoint):
        keys = f"the keys {sorted(map(str, checkpoint))[:5]}" if isinstance(checkpoint, dict) else type(checkpoint)
        raise ValueError(f"Expected a checkpoint of Lightning, with state_dict. Got {path} with {keys}.")
    return checkpoint


def _load(file: Path, *, mmap: bool = False) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def _read_folder(folder: Path, optimizers: bool) -> dict[str, Any]:
    """Put the shards together, and the result to the rest, as Lightning's strategies take it apart."""
    reader = FileSystemReader(folder)
    metadata = reader.read_metadata()
    paths: Mapping[str, Sequence[str | int]] = metadata.planner_data
    flat: dict[str, Any] = dict.fromkeys(
        name for name, path in paths.items() if optimizers or path[0] in ("model", "state_dict")
    )
    for name in flat:
        entry = metadata.state_dict_metadata[name]
        if isinstance(entry, TensorStorageMetadata):
            flat[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    size = sum(value.nbytes for value in flat.values() if isinstance(value, torch.Tensor))
    with warnings.catch_warnings(), progress_bar(f"Reading {folder.name}", "B", size) as bar:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked
        load(flat, storage_reader=reader, planner=_Planner(bar), no_dist=True)
    parts = _nested({paths[name]: value for name, value in flat.items()})
    checkpoint: dict[str, Any] = _load(folder / "meta.pt")
    checkpoint["state_dict"] = parts.pop("model" if "model" in parts else "state_dict")  # FSDP1's name, and FSDP2's
    indices = sorted(int(name.removeprefix("optimizer_")) for name in parts if re.fullmatch(r"optimizer_\d+", name))
    # An optimizer without state has no entry under "state": empty dictionaries are not saved.
    checkpoint["optimizer_states"] = [{"state": {}, **parts[f"optimizer_{index}"]} for index in indices]
    return checkpoint


class _Planner(DefaultLoadPlanner):
    """torch's, which unpickles whatever is no tensor, without running code from it; with a progress bar of bytes."""

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self._bar = bar

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self._bar.update(tensor.nbytes)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _nested(flat: Mapping[Sequence[str | int], Any]) -> dict[str, Any]:
    """Undo what torch.distributed.checkpoint does to dictionaries and lists: paths in place of nesting."""
    root: dict[Any, Any] = {}
    for path, value in flat.items():
        place = root
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return {key: _with_lists(value) for key, value in root.items()}


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    values = {key: _with_lists(value) for key, value in tree.items()}
    return [values[i] for i in sorted(values)] if all(isinstance(key, int) for key in values) else values
