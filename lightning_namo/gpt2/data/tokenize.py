"""Documents as ids, part by part: each part by one of several processes, and kept when a run is interrupted."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_namo.atomic_io import blocks, read_json, replacing, write_json
from lightning_namo.gpt2.data.documents import Span, Split, read
from lightning_namo.gpt2.data.encoding import Encoder
from lightning_namo.progress import progress_bar

PART = 2**25  # bytes of text in a part, at least
NAMES = ("train", "val")
TEMPORARY = ".*"  # files that an interrupted process left


@dataclass(frozen=True)
class Part:
    """Consecutive documents that one process encodes.

    Attributes:
        number: Its place among the parts.
        first: Number of its first document.
        spans: Where the documents are.
    """

    number: int
    first: int
    spans: tuple[Span, ...]

    @property
    def documents(self) -> int:
        """How many there are."""
        return sum(span.documents for span in self.spans)

    @property
    def size(self) -> int:
        """Bytes of text, about."""
        return sum(span.size for span in self.spans)


def gather_parts(spans: Iterable[Span]) -> list[Part]:
    """Gather spans into parts, which depend on the files only, not on who encodes them."""
    parts: list[Part] = []
    first, size, gathered = 0, 0, list[Span]()
    for span in spans:
        gathered.append(span)
        size += span.size
        if size >= PART:
            parts.append(Part(len(parts), first, tuple(gathered)))
            first, size, gathered = first + parts[-1].documents, 0, []
    if gathered:
        parts.append(Part(len(parts), first, tuple(gathered)))
    return parts


@dataclass(frozen=True)
class Job:
    """What a process needs to encode any part.

    A part becomes `NUMBER.train` and `NUMBER.val`, and last `NUMBER.json`, the mark of a finished part.

    Attributes:
        folder: Folder of the parts.
        encoder: From text to ids.
        split: Which documents are held out.
        text_key: Key or column of the text.
    """

    folder: Path
    encoder: Encoder
    split: Split
    text_key: str

    def encode(self, part: Part) -> Iterator[float]:
        """Encode a part, yielding the sizes of what is done. Blank documents of .parquet files are left out."""
        paths = {name: self.path(part, name) for name in NAMES}
        documents = dict.fromkeys(NAMES, 0)
        with contextlib.ExitStack() as stack:
            temporary = {name: stack.enter_context(replacing(path)) for name, path in paths.items()}
            files = {name: stack.enter_context(path.open("wb")) for name, path in temporary.items()}
            for number, (size, text) in enumerate(read(part.spans, self.text_key), start=part.first):
                for name, share in self.split.divide(number, text) if text.strip() else ():
                    documents[name] += 1
                    for characters, ids in self.encoder.encode(share):
                        files[name].write(ids)
                        yield size * characters / len(text)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        write_json(self.path(part, "json"), {"documents": documents, "bytes": sizes})

    def path(self, part: Part, suffix: str) -> Path:
        """A file of a part."""
        return self.folder / f"{part.number:06d}.{suffix}"

    def finished(self, part: Part) -> dict[str, Any] | None:
        """What a part's mark says, if there is one and the files are as long as it says."""
        mark: dict[str, Any] | None = read_json(self.path(part, "json"))
        paths = {name: self.path(part, name) for name in NAMES}
        whole = mark and all(path.is_file() and path.stat().st_size == mark["bytes"][n] for n, path in paths.items())
        return mark if whole else None

    def ids(self, parts: Iterable[Part], name: str) -> Iterator[bytes]:
        """Yield the ids of finished parts, in the order of the documents."""
        for part in parts:
            yield from blocks(self.path(part, name))


def open_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Make the folder of the parts, or take up one of the same manifest; parts of another are removed."""
    if is_folder_of(folder, manifest):
        _remove(folder, (TEMPORARY,))
        return
    if (folder / "manifest.json").exists():
        print(f"The parts in {folder} are of other files or settings: all are made anew.", file=sys.stderr)
    clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", manifest)


def is_folder_of(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether the folder has parts of this manifest."""
    return bool(read_json(folder / "manifest.json") == manifest)


def clear(folder: Path) -> None:
    """Remove a folder of parts; what else somebody put there stays."""
    _remove(
        folder,
        ("manifest.json", "tokenizer.json", "job.pickle", "[0-9]*.train", "[0-9]*.val", "[0-9]*.json", TEMPORARY),
    )
    with contextlib.suppress(OSError):  # not there, or not empty
        folder.rmdir()


def _remove(folder: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def encode_parts(job: Job, parts: Iterable[Part], num_proc: int) -> dict[str, int]:
    """Encode the parts that are not there yet, with a progress bar.

    Args:
        job: How, and where to.
        parts: All parts.
        num_proc: Processes; 1 is this one.

    Returns:
        The number of documents under "train" and "val".

    Raises:
        RuntimeError: A process was killed. The finished parts are kept.
    """
    parts = list(parts)
    waiting = [part for part in parts if job.finished(part) is None]
    total, left = (sum(part.size for part in some) for some in (parts, waiting))
    one_by_one = itertools.chain.from_iterable(map(job.encode, waiting))
    with progress_bar("Encoding", "B", total, initial=total - left) as bar:
        for size in _in_processes(job, waiting, num_proc) if num_proc > 1 else one_by_one:
            bar.update(size)
    marks = [job.finished(part) for part in parts]
    return {name: sum(mark["documents"][name] for mark in marks if mark) for name in NAMES}


def _in_processes(job: Job, parts: list[Part], num_proc: int) -> Iterator[float]:
    # Spawned, not forked: tokenizers and pyarrow have threads, which do not survive a fork. The job goes by a file, as
    # what does not fit into a pipe keeps each process from being started until the one before has imported torch.
    file = job.folder / "job.pickle"
    with replacing(file) as temporary:
        temporary.write_bytes(pickle.dumps(job))
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _start, (file,))
    try:
        waiting = {pool.submit(_encode, part) for part in parts}
        while waiting:
            done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            yield sum(future.result() for future in done)  # also of none, so that the bar goes on with its time
    except BrokenProcessPool as error:
        raise RuntimeError(
            "Expected all processes to finish. One of them was killed, perhaps for lack of memory: the same command"
            " goes on with what is finished; a smaller --num_proc needs less memory."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_job: Job


def _start(file: Path) -> None:
    """Take a job in a new process, which ends when its parent does, however that ends."""
    global _job
    _job = pickle.loads(file.read_bytes())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent lets it finish its part
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(part: Part) -> float:
    return sum(_job.encode(part))
