"""A trained GPT-2 as a folder that `transformers` loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_namo.arguments import COUNT, check_ranges, or_none
from lightning_namo.atomic_io import check_output, replacing
from lightning_namo.checkpoint.consolidate import find_checkpoint
from lightning_namo.gpt2.data.encoding import END_OF_TEXT
from lightning_namo.gpt2.load import EMBEDDING, HEAD, Vocabulary, find_vocabulary, load_network
from lightning_namo.gpt2.model import GPT2
from lightning_namo.progress import progress_bar

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Weights of a block that transformers keeps as `(in, out)`, in its Conv1D."""

SPECIAL = ("bos_token", "eos_token", "unk_token")
"""What transformers' GPT-2 has one token for."""


def export(
    ckpt_path: str,
    out_dir: str,
    data_dir: str | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint of a GPT2Module as a folder for `GPT2LMHeadModel.from_pretrained` of transformers.

    The logits are the same. The tokenizer is written too where it is known: from `data_dir`, or by the config.yaml that
    `lightning-namo fit` left with the checkpoint.

    Args:
        ckpt_path: Checkpoint of one device, DDP, FSDP or ModelParallelStrategy, one file or sharded (a folder); or the
            folder of a run, whose last checkpoint it is then.
        out_dir: Folder to write.
        data_dir: Folder with the run's tokenizer.json.
        vocab_size: Tokens in the vocabulary without its padding, for token files without a tokenizer.json; rows of
            the embedding beyond it are left out.
        overwrite: Whether to replace the folder, if it is one of an earlier export.

    Returns:
        The folder, its files, the number of parameters, the vocabulary's size, and whether there is a tokenizer.

    Raises:
        ValueError: transformers is missing, no checkpoint of a GPT2Module at `ckpt_path`, something at `out_dir`
            already, or a tokenizer that cannot be the run's.
    """
    check_ranges(locals(), "export", {"vocab_size": or_none(COUNT)})
    transformers = _transformers()
    source, target = find_checkpoint(Path(ckpt_path)), Path(out_dir)
    check_output(target, overwrite)
    if target.exists() and not _is_export(target):
        raise ValueError(f"Expected to overwrite the folder of an earlier export. Got {target}, which is not one.")
    network = load_network(source)
    vocabulary = find_vocabulary(source, network.config.vocab_size, data_dir, vocab_size)
    with progress_bar("Exporting", "step", total=2) as bar, replacing(target) as temporary:
        model = to_transformers(network, vocabulary)
        bar.update()
        with _without_its_bars(transformers):
            model.save_pretrained(temporary)
        if vocabulary.tokenizer is not None:
            special = {} if vocabulary.end is None else dict.fromkeys(SPECIAL, END_OF_TEXT)
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=vocabulary.tokenizer, model_max_length=network.config.block_size, **special
            ).save_pretrained(temporary)
        bar.update()
    return {
        "out_dir": str(target),
        "files": sorted(file.name for file in target.iterdir()),
        "parameters": model.num_parameters(),
        "vocab_size": vocabulary.size,
        "tokenizer": vocabulary.tokenizer is not None,
    }


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"Expected transformers to be installed: pip install 'lightning-namo[export]'. Got {error}."
        ) from error
    return transformers


@contextmanager
def _without_its_bars(transformers: Any) -> Iterator[None]:
    """Keep transformers from showing progress, which it does also where there is no terminal."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _is_export(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not any(entry.is_dir() for entry in folder.iterdir())


def to_transformers(network: GPT2, vocabulary: Vocabulary) -> Any:
    """Build the `GPT2LMHeadModel` with a network's weights.

    Args:
        network: The network.
        vocabulary: What its ids mean; rows of the embedding beyond its size are left out.

    Returns:
        The model, in the precision of the network, for inference.
    """
    config, transformers = network.config, _transformers()
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary.size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu",  # the exact one, as here; the default is the approximation by tanh
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=vocabulary.end,
            eos_token_id=vocabulary.end,
        )
    ).to(network.lm_head.weight.dtype)
    # What only transformers has are the biases.
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if name.endswith(".bias")}
    for name, weight in network.state_dict().items():
        if name in (EMBEDDING, HEAD):
            weight = weight[: vocabulary.size]
        weights[name] = weight.T if name.endswith(TRANSPOSED) else weight
    model.load_state_dict(weights)
    return model.eval()
