"""GPT-2 with Fabric, FSDP2 and NAMO-D on the embedded corpus.

    python examples/train_fabric.py --devices 2 --steps 20

The order matters: shard the model, build the optimizer over the sharded parameters, then set the optimizer up. The
other order would train nothing, and is refused at the first step.
"""

import argparse
import gc

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_namo import NAMOD, WarmupStableDecay, build_optimizer
from lightning_namo.gpt2.data.loaders import TrainLoader
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.model import GPT2, GPT2Config


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accelerator", default="auto")
    args = parser.parse_args()

    strategy = ModelParallelStrategy(
        parallelize_fn=parallelize, data_parallel_size=args.devices, tensor_parallel_size=1
    )
    fabric = Fabric(accelerator=args.accelerator, devices=args.devices, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0)

    data = TextDataModule(block_size=128, batch_size=8)
    if fabric.is_global_zero:
        data.prepare_data()
    fabric.barrier()
    data.setup("fit")
    loader = TrainLoader(data.train_windows, 8, seed=0, replicas=fabric.world_size, rank=fabric.global_rank)

    model = GPT2(GPT2Config(vocab_size=data.vocab_size, block_size=128, n_layer=4, n_head=4, n_embd=128))
    model = fabric.setup_module(model)
    optimizer = build_optimizer(model, NAMOD, lr=0.009)
    scheduler = WarmupStableDecay(warmup=0.2, decay=0.3)(optimizer, total_steps=args.steps)
    optimizer = fabric.setup_optimizers(optimizer)

    for step, (tokens, targets) in zip(range(args.steps), loader, strict=False):
        tokens, targets = fabric.to_device((tokens, targets))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 5 == 0 or step == args.steps - 1:
            fabric.print(f"step {step:4d}  loss {fabric.all_reduce(loss.detach()):.4f}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
    gc.collect()  # sharded modules refer to the process group in cycles: gloo aborts at random unless they go before it
