"""OpenWebText (Gokaslan and Cohen 2019), which GPT-2s are compared on, as token files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_namo.arguments import check_ranges
from lightning_namo.gpt2.data.documents import open_parquet
from lightning_namo.gpt2.data.encoding import GPT2, load_encoder
from lightning_namo.gpt2.data.prepare import RANGES, prepare_files

REPOSITORY = "Skylion007/openwebtext"
REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"
"""Commit with all documents in parquet files; the branch refs/convert/parquet moves, and has had a part of them."""

FILES = "plain_text/train-*-of-00080.parquet"
DOCUMENTS = 8_013_769


def openwebtext(
    out_dir: str = "data/openwebtext",
    num_proc: int = 8,
    val_fraction: float = 0.0005,
    seed: int = 2357,
    tokenizer: str = GPT2,
) -> dict[str, Any]:
    """Turn OpenWebText into token files to train on, with GPT-2's ids: 9.04e9 tokens, as nanoGPT's prepare.py.

    It takes 24 GB in the cache of Hugging Face's hub for the documents and 36 GB in `out_dir`, of which 18 GB are left.
    The same command goes on with an interrupted download and an interrupted run.

    Args:
        out_dir: Folder for train.bin, val.bin, tokenizer.json and meta.json; made if it is not there.
        num_proc: Processes that encode. The files do not depend on it.
        val_fraction: Fraction of the documents held out for validation, in (0, 1).
        seed: Seed of the choice of the documents held out.
        tokenizer: "gpt2", which is downloaded once; or as for `lightning-namo prepare`.

    Returns:
        What meta.json says: the vocabulary, the numbers of tokens and documents, SHA-256 of the files, the source.

    Raises:
        ValueError: Numbers out of range; what cannot be downloaded, or is not whole.
    """
    check_ranges(locals(), "prepare openwebtext", RANGES)
    encoder = load_encoder(tokenizer)  # before 24 GB are downloaded
    files = download(out_dir, val_fraction, seed)
    check_complete(files)
    return prepare_files(
        files,
        Path(out_dir),
        text_key="text",
        tokenizer=encoder,
        val_fraction=val_fraction,
        seed=seed,
        num_proc=num_proc,
        origin={"dataset": REPOSITORY, "revision": REVISION},
    )


def download(out_dir: str, val_fraction: float, seed: int) -> list[Path]:
    """Return OpenWebText's parquet files from the hub's cache, and what is not there from the hub."""
    from huggingface_hub import snapshot_download  # comes with tokenizers
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):  # the hub's own is shown where there is no terminal, too
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{"disable": None, **options})  # type: ignore[no-untyped-call]

    try:
        folder = snapshot_download(
            REPOSITORY, repo_type="dataset", revision=REVISION, allow_patterns=FILES, tqdm_class=Bar
        )
    except Exception as error:  # the hub's, the HTTP client's and the system's have no class in common
        raise ValueError(
            f"Expected {FILES} of https://huggingface.co/datasets/{REPOSITORY}, revision {REVISION[:8]}. Could not"
            f" reach the hub: {type(error).__name__}. Download them elsewhere and use `lightning-namo prepare --inputs+"
            f" FOLDER --tokenizer gpt2 --val_fraction {val_fraction} --seed {seed} --out_dir {out_dir}`."
        ) from error
    return sorted(Path(folder).glob(FILES))


def check_complete(files: list[Path]) -> None:
    """Refuse files without all documents: without network, the hub takes what its cache has of them."""
    documents = sum(open_parquet(file).metadata.num_rows for file in files)
    if documents != DOCUMENTS:
        raise ValueError(
            f"Expected the {DOCUMENTS:,} documents of OpenWebText. Got {documents:,} in {len(files)} files: the"
            " download is not complete, the same command goes on with it."
        )
