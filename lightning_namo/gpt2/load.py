"""What a checkpoint of a GPT-2 holds: the network, and what its token ids mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from tokenizers import Tokenizer
from torch import Tensor

from lightning_namo.checkpoint.consolidate import read_checkpoint
from lightning_namo.gpt2.data.corpus import load_speeches
from lightning_namo.gpt2.data.encoding import END_OF_TEXT, load_tokenizer, train_tokenizer
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.data.prepare import SPEECHES_VOCAB_SIZE
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.routing.names import clean_name

EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"  # tied: one parameter

POSITIONS = "transformer.wpe.weight"
GPT2_TOKENS = 50257
"""Tokens in OpenAI's vocabulary for GPT-2."""


def load_network(path: Path) -> GPT2:
    """Build the network of a checkpoint of `GPT2Module`, of one file or sharded.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Returns:
        The network on the CPU, in the precision of the checkpoint, ready for inference.

    Raises:
        ValueError: No checkpoint, a damaged one, or one of another module.
    """
    checkpoint = read_checkpoint(path, optimizers=False)
    hyper, names = checkpoint.get("hyper_parameters", {}), [field.name for field in fields(GPT2Config)]
    if missing := [name for name in names if name not in hyper]:
        raise ValueError(f"Expected a checkpoint of a GPT2Module. Got {path} without the hyperparameter {missing[0]}.")
    with torch.device("meta"):
        network = GPT2(GPT2Config(**{name: hyper[name] for name in names}))
    weights = _own_names(checkpoint["state_dict"])
    _check(weights, network.state_dict(), path)
    network.load_state_dict(weights, assign=True)
    network.lm_head.weight = network.transformer.get_parameter("wte.weight")  # assigning parted them
    return network.eval()


def _own_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the network's names, without those of what is around it ("model", wrappers)."""
    weights = {clean_name(name): weight for name, weight in state_dict.items()}
    prefix = next((name.removesuffix(POSITIONS) for name in weights if f".{name}".endswith(f".{POSITIONS}")), "")
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    for one, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if one in weights:
            weights.setdefault(other, weights[one])
    return weights


def _check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless the weights are those of a GPT-2."""
    wrong = f"Expected the weights of a GPT2Module. Got {path}"
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{wrong} without {missing[0]}.")
    if unknown := [name for name in weights if name not in expected]:
        raise ValueError(f"{wrong} with {unknown[0]} besides.")
    for name, tensor in expected.items():
        if (shape := tuple(weights[name].shape)) != tuple(tensor.shape):
            raise ValueError(f"{wrong} with {name} of shape {shape}; its hyperparameters say {tuple(tensor.shape)}.")
    if not torch.equal(weights[EMBEDDING], weights[HEAD]):
        raise ValueError(f"{wrong} with a head that is not tied to the embedding.")


@dataclass(frozen=True)
class Vocabulary:
    """What the token ids of a network mean.

    Attributes:
        size: Tokens, without those that only pad the network's vocabulary.
        tokenizer: Between text and ids; None where it is not known, or GPT-2's.
    """

    size: int
    tokenizer: Tokenizer | None

    @property
    def is_gpt2(self) -> bool:
        """Whether it is OpenAI's for GPT-2, which no other vocabulary without a tokenizer.json is as large as."""
        return self.tokenizer is None and self.size == GPT2_TOKENS

    @property
    def end(self) -> int | None:
        """The token that ends a document, if there is one."""
        if self.tokenizer is not None:
            return self.tokenizer.token_to_id(END_OF_TEXT)
        return GPT2_TOKENS - 1 if self.is_gpt2 else None


def find_vocabulary(
    path: Path, network_size: int, data_dir: str | None = None, vocab_size: int | None = None
) -> Vocabulary:
    """Find the vocabulary that a network was trained with.

    Args:
        path: The checkpoint, in whose folder, or the one above, `lightning-namo fit` leaves a config.yaml that
            says what the run's data were.
        network_size: Tokens in the network's vocabulary.
        data_dir: Folder of the data; None takes what config.yaml says.
        vocab_size: Tokens in the vocabulary, where there is no tokenizer; None takes what config.yaml says, and else
            the network's.

    Raises:
        ValueError: No tokenizer in `data_dir`, unless there is `vocab_size`; a tokenizer of another size than
            `vocab_size`, or of more tokens than the network has.
    """
    data: dict[str, Any] | None = _data_section(path) if data_dir is None else {"data_dir": data_dir}
    tokenizer = None if data is None else _tokenizer(data.get("data_dir"))
    if tokenizer is not None:
        size = tokenizer.get_vocab_size()
    elif data_dir is not None and vocab_size is None:
        raise ValueError(f"Expected data_dir to have a tokenizer.json. Got {data_dir}.")
    else:
        size = int(vocab_size or (data or {}).get("vocab_size") or network_size)
    if vocab_size not in (None, size):
        raise ValueError(f"Expected vocab_size to be that of the tokenizer, {size}. Got {vocab_size}.")
    if size > network_size:
        raise ValueError(
            f"Expected a vocabulary of at most {network_size} tokens, as the network has. Got {size}, of another run."
        )
    return Vocabulary(size, tokenizer)


def _data_section(path: Path) -> dict[str, Any] | None:
    """The arguments of the TextDataModule that a run was made with, if its config.yaml is there."""
    for folder in path.resolve().parents[:2]:
        if (file := folder / "config.yaml").is_file():
            try:
                config = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"Expected the config of a run in {file}, or --data_dir. Got {error}.") from error
            data = config.get("data") if isinstance(config, dict) else None
            if isinstance(data, dict) and str(data.get("class_path")).endswith(TextDataModule.__name__):
                return data.get("init_args") or {}
    return None


def _tokenizer(data_dir: str | None) -> Tokenizer | None:
    """The tokenizer of a data folder; of the embedded corpus without one (None), trained again, always the same."""
    if data_dir is None:
        return train_tokenizer(load_speeches()[0], SPEECHES_VOCAB_SIZE)
    file = Path(data_dir) / "tokenizer.json"
    return load_tokenizer(file) if file.is_file() else None
