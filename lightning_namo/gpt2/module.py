"""GPT-2 as a LightningModule: loss, perplexity, FLOPs. The optimizer comes from a callback."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric

from lightning_namo.arguments import COUNT, check_ranges
from lightning_namo.gpt2.data.loaders import IGNORED, Batch
from lightning_namo.gpt2.data.module import TextDataModule, data_parallel
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.parallel import shard
from lightning_namo.integration.lightning_clipping import ClipsGradients
from lightning_namo.sharding.process_group import mean_over_ranks

VOCABULARY_MULTIPLE = 64
"""A GPT-2's vocabulary is the data's, rounded up to a multiple of this, which matrix products are faster on."""


def follow_data(config: GPT2Config, data: TextDataModule) -> GPT2Config:
    """Set vocabulary and block size, where they have their defaults, to what the data need."""
    default = GPT2Config()
    if config.block_size == default.block_size:
        config = replace(config, block_size=data.block_size)
    if config.vocab_size == default.vocab_size:
        config = replace(config, vocab_size=-(-data.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
    return config


class GPT2Module(ClipsGradients):
    """Trains a `GPT2` on the cross-entropy of the next token.

    It logs `train/loss` of a micro-batch, over all ranks, and `val/loss` and `val/perplexity` over the whole
    validation set. There is no `configure_optimizers` here: add an `OptimizerCallback`, or define it in a subclass.

    Under Lightning's ModelParallelStrategy (or `MeshStrategy`) the network is sharded, block by block, with FSDP2, and
    divided over the tensor-parallel ranks. Other strategies need nothing from here.

    Args:
        vocab_size: Tokens in the vocabulary, V; the data module knows how many its tokenizer has.
        block_size: The longest sequence, in tokens.
        n_layer: Transformer blocks.
        n_head: Attention heads in each block; divides `n_embd`.
        n_embd: Channels, C.
        bias: Whether linear layers and layer norms have a bias.
        dropout: Probability of dropping an activation in training, in [0, 1).
        activation_checkpointing: Whether blocks keep only their inputs for the backward pass, and compute the rest
            again: less memory, about a third more time.
        compile: Whether to compile each block with `torch.compile`.
        replicas: Copies of the sharded network under ModelParallelStrategy (HSDP), a divisor of the data-parallel
            ranks; each copy is sharded over neighbouring ranks.
        gather_bf16: Whether, under ModelParallelStrategy with precision bf16-mixed, shards are cast to bfloat16
            before they are gathered: half the bytes. Activations between layers are bfloat16, too. False gathers
            float32 and leaves casting to autocast, as on one device.

    Raises:
        ValueError: A size below 1 or a dropout out of range, `n_head` does not divide `n_embd`, or, when the network is
            built, `replicas` or the tensor-parallel ranks do not divide what they should.
    """

    model: GPT2

    def __init__(
        self,
        vocab_size: int = 50304,
        block_size: int = 1024,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        bias: bool = False,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
        compile: bool = False,
        replicas: int = 1,
        gather_bf16: bool = True,
    ) -> None:
        super().__init__()
        # The shape only: a checkpoint loads whatever way its run was divided.
        check_ranges({"replicas": replicas}, "GPT2Module", {"replicas": COUNT})
        self.save_hyperparameters(ignore=["activation_checkpointing", "compile", "replicas", "gather_bf16"])
        self.config = GPT2Config(vocab_size, block_size, n_layer, n_head, n_embd, bias, dropout)
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile
        self.replicas = replicas
        self.gather_bf16 = gather_bf16
        self._batch_size = 0

    def configure_model(self) -> None:
        """Build the network once; strategies that shard call this again before validation or testing."""
        if "model" in self._modules:
            return
        self.model = GPT2(self.config, activation_checkpointing=self.activation_checkpointing)
        if self.device_mesh is not None:
            self._shard()
        elif self.replicas > 1:
            raise ValueError(f"Expected replicas of 1 without a ModelParallelStrategy. Got {self.replicas}.")
        if self.compile_blocks:
            for block in self.model.transformer["h"].children():
                block.compile()

    def _shard(self) -> None:
        mesh = self.device_mesh
        assert mesh is not None
        if self.compile_blocks and self.activation_checkpointing and mesh["tensor_parallel"].size() > 1:
            raise ValueError(  # an assertion of torch 2.13: a DeviceMesh is among the saved tensors
                "Expected compile or activation_checkpointing, not both, where tensor_parallel_size is above 1: torch "
                "cannot combine them there. Got both."
            )
        bf16 = self.gather_bf16 and self.trainer.precision == "bf16-mixed"
        shard(self.model, mesh, replicas=self.replicas, bf16=bf16)

    def forward(self, idx: Tensor) -> Tensor:
        """Map token ids `(B, T)` to logits `(B, T, V)`."""
        return self.model(idx)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy, in nats per token, of inputs and targets `(B, T)`."""
        inputs, targets = batch
        self._batch_size = inputs.shape[0]
        total, count = cross_entropy(self(inputs), targets)
        loss = total / count.clamp(min=1)
        self.log("train/loss", mean_over_ranks(loss.detach().clone()), prog_bar=True)  # sync_dist has a barrier
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the mean over the validation set.

        A metric made here and kept in a tuple is no submodule: one that is filled in from the meta device would have an
        uninitialized state.
        """
        self._val_loss = (MeanMetric(nan_strategy=math.nan).to(self.device),)  # a NaN is told

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the mean over tokens."""
        inputs, targets = batch
        total, count = cross_entropy(self(inputs), targets)
        self._val_loss[0].update(total / count.clamp(min=1), count)

    def on_validation_epoch_end(self) -> None:
        """Log the mean cross-entropy (nats per token) and the perplexity, which is exp of that mean, over all ranks."""
        loss = self._val_loss[0].compute()
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp()}, prog_bar=True, sync_dist=True)

    @property
    def flops_per_batch(self) -> int:
        """FLOPs of the last batch, forward and backward, on this device; ThroughputMonitor reads it."""
        replicas, _ = data_parallel(self.trainer)
        sharers = self.trainer.world_size // replicas  # ranks on the same batch: tensor parallelism
        return training_flops(self.config) * self._batch_size // sharers


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy over the tokens that count.

    Args:
        logits: Logits, `(B, T, V)`.
        targets: Ids of the next tokens, `(B, T)`, with `IGNORED` where there is none.

    Returns:
        The sum in nats, `()` in float32 or better, and the number of tokens, `()`.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (targets != IGNORED).sum()


@lru_cache
def training_flops(config: GPT2Config) -> int:
    """Measure the FLOPs of a forward and a backward pass over one window of `block_size` tokens.

    Matrix products only, a multiply and an add being two; attention is counted in full, though half of it is
    masked.
    """
    # ThroughputMonitor asks from within inference mode, where nothing can be differentiated.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        model = GPT2(config)
        idx = torch.zeros(1, config.block_size, dtype=torch.long)
        return measure_flops(model, lambda: model(idx), torch.Tensor.sum)
