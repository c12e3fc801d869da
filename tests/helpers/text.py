"""Texts and token files, for the tests of gpt2.data."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from lightning_namo.gpt2.data.encoding import Encoder
from lightning_namo.gpt2.data.loaders import TrainLoader

TEXT = "The state of the union is strong. " * 40
unhurried = settings(deadline=None)


def write_tokens(path: Path, count: int) -> Path:
    np.arange(count, dtype="<u2").tofile(path)
    return path


def global_order(loaders: list[TrainLoader], batches: int) -> list[int]:
    """The windows of the next batches of all ranks, global batch by global batch; a window starts with its index."""
    block_size = loaders[0].dataset.block_size
    iterators = [iter(loader) for loader in loaders]
    order: list[int] = []
    for _ in range(batches):
        for iterator in iterators:
            order += (next(iterator)[0][:, 0] // block_size).tolist()
    return order


UNICODE = "Résumé: naïve “quotes”, 日本語, עברית, 🚀👩‍🚀\r\n\ttabs\x00 and  nulls   "
TEXTS = [f"Document {n}: {UNICODE} It's the {n}th of them.\n\n" + "We'll see. " * (n % 7) for n in range(60)]


def ids_of(encoder: Encoder, text: str) -> list[int]:
    return np.frombuffer(b"".join(ids for _, ids in encoder.encode(text)), dtype="<u2").tolist()


def tokens_in(folder: Path, name: str) -> list[int]:
    return np.fromfile(folder / f"{name}.bin", dtype="<u2").tolist()


def write_jsonl(path: Path, texts: list[str | None]) -> None:
    path.with_suffix(".jsonl").write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in texts))


def write_parquet(path: Path, texts: list[str | None], group: int = 4) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"meta": [{"url": "x"}] * len(texts), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path.with_suffix(".parquet"), row_group_size=group)
