"""Text from a trained GPT-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_namo.arguments import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, check_ranges, or_none
from lightning_namo.checkpoint.consolidate import find_checkpoint
from lightning_namo.gpt2.load import GPT2_TOKENS, Vocabulary, find_vocabulary, load_network
from lightning_namo.gpt2.model import sample

SAMPLE_RANGES = {
    "max_new_tokens": COUNT,
    "sample_tokens": COUNT_OR_ZERO,
    "temperature": NOT_NEGATIVE,
    "top_k": or_none(COUNT),
    "seed": COUNT_OR_ZERO,
    "vocab_size": or_none(COUNT),
}


def generate(
    ckpt_path: str,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    data_dir: str | None = None,
    vocab_size: int | None = None,
) -> str:
    """Continue a text with the network of a checkpoint of a GPT2Module, on the CPU.

    Args:
        ckpt_path: Checkpoint of one device, DDP, FSDP or ModelParallelStrategy, one file or sharded (a folder); or the
            folder of a run, whose last checkpoint it is then.
        prompt: Text to continue; if it is empty, a new document.
        max_new_tokens: Tokens to add, at most: the end of the document is the end.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw from this many of the likeliest tokens only; null for all.
        seed: Seed of the draws.
        data_dir: Folder with the run's tokenizer.json; null takes the data that the run's config.yaml names, which
            `lightning-namo fit` leaves with the checkpoint.
        vocab_size: Tokens in the vocabulary of token files without a tokenizer.json: 50257 takes GPT-2's, which needs
            tiktoken.

    Returns:
        The prompt and its continuation.

    Raises:
        ValueError: Numbers out of range, no checkpoint of a GPT2Module at `ckpt_path`, or no tokenizer that can be the
            run's.
    """
    check_ranges(locals(), "generate", SAMPLE_RANGES)
    path = find_checkpoint(Path(ckpt_path))
    network = load_network(path).float()
    vocabulary = find_vocabulary(path, network.config.vocab_size, data_dir, vocab_size)
    (encode, decode), end = _codec(vocabulary, path), vocabulary.end
    begin = encode(prompt)
    if not begin and end is None:
        raise ValueError("Expected a prompt, as the tokenizer has no token that starts a document. Got an empty one.")

    def logits(idx: Tensor) -> Tensor:
        return network(idx)[..., : vocabulary.size]  # type: ignore[no-any-return]  # what pads it means nothing

    idx = torch.tensor([begin or [end]])
    ids = sample(
        logits,
        idx,
        max_new_tokens,
        block_size=network.config.block_size,
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(seed),
    )[0, idx.shape[1] :].tolist()
    return decode(begin + (ids[: ids.index(end)] if end in ids else ids))


def _codec(vocabulary: Vocabulary, path: Path) -> tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]:
    """How to turn text into ids, and ids into text."""
    tokenizer = vocabulary.tokenizer
    if tokenizer is not None:
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode
    if not vocabulary.is_gpt2:
        raise ValueError(
            f"Expected the tokenizer of the run. Got none: there is no config.yaml with {path}, or the data that it "
            f"names are gone. Pass --data_dir FOLDER_WITH_TOKENIZER_JSON, or --vocab_size {GPT2_TOKENS} for GPT-2's."
        )
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # not installed, or its files can neither be found nor downloaded
        raise ValueError(
            f"Expected GPT-2's tokenizer of tiktoken: pip install 'lightning-namo[data]'; it downloads its files once. "
            f"Got {type(error).__name__}: {error}"
        ) from error
    return encoding.encode_ordinary, encoding.decode
