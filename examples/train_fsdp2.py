"""GPT-2 with plain PyTorch, FSDP2 and NAMO on the embedded corpus.

torchrun --nproc_per_node 2 examples/train_fsdp2.py --steps 20
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_namo import NAMO, WarmupStableDecay, build_optimizer
from lightning_namo.gpt2.data.loaders import TrainLoader
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.model import GPT2, GPT2Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(
        accelerator.type if accelerator else "cpu", int(os.environ["LOCAL_RANK"]) if accelerator else 0
    )
    if accelerator:
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()

    data = TextDataModule(block_size=128, batch_size=8)
    if rank == 0:
        data.prepare_data()
    dist.barrier()
    data.setup("fit")
    loader = TrainLoader(data.train_windows, 8, seed=0, replicas=world_size, rank=rank)

    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=data.vocab_size, block_size=128, n_layer=4, n_head=4, n_embd=128)).to(device)
    mesh = init_device_mesh(device.type, (world_size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = build_optimizer(model, NAMO, lr=0.012)  # after sharding: the parameters are others before
    scheduler = WarmupStableDecay(warmup=0.2, decay=0.3)(optimizer, total_steps=args.steps)

    for step, (tokens, targets) in zip(range(args.steps), loader, strict=False):
        logits = model(tokens.to(device))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 5 == 0 or step == args.steps - 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:4d}  loss {mean.item() / world_size:.4f}", flush=True)


if __name__ == "__main__":
    main()
    gc.collect()  # sharded modules refer to the process group in cycles: gloo aborts at random unless they go before it
    dist.destroy_process_group()
