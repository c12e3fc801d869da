"""The signal fraction that NAMO reads from its averages, beside a direct measurement, layer by layer.

    python examples/benchmarks/noise_scale.py --out noise_scale.csv

Trains the quickstart's GPT-2. At some moments the training pauses: at those weights, at those of the step before, and
at those of half as many and of as many steps before as the momentum averages over, the gradients of many batches are
taken, and from batches of two sizes |G|^2 and tr(Sigma) (arXiv 1812.06162, appendix A.1). Printed for each moment, in
percent of the squared norm of a gradient:

    reads   what the optimizer's averages give (below zero: gradients of neighbouring steps oppose each other)
    error   its standard error
    direct  of the same batch size, from the paused batches
    cos 1   between the true gradients now and a step before, and so on: all are 1 where the signal is as constant as
            the reading takes it to be
"""

import argparse
import csv
from collections import defaultdict
from itertools import chain, islice, repeat

import torch
from torch import Tensor, nn

from lightning_namo import NAMO, NAMOD, WarmupStableDecay, build_optimizer, clip_gradients
from lightning_namo.gpt2.data.loaders import TrainLoader
from lightning_namo.gpt2.data.module import TextDataModule
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.telemetry.noise import Averages, SignalFraction
from lightning_namo.telemetry.noise_metric import GradientNoiseScale

BATCH, BLOCK, MOMENTUM, BETA2 = 16, 128, 0.95, 0.99


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    tokens, targets = batch
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()


def measured(model: nn.Module, weights: list[Tensor], batches: list, big: int) -> tuple[Tensor, list[Tensor]]:
    """The signal fractions of batches, and halves of them averaged: two independent estimates of the true gradient."""
    metric, halves = GradientNoiseScale(len(weights)), [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    small_sq, sums = torch.zeros(len(weights)), [torch.zeros_like(w) for w in weights]
    for number, batch in enumerate(batches, start=1):
        model.zero_grad()
        backward(model, batch)
        for i, weight in enumerate(weights):
            small_sq[i] += weight.grad.square().sum() / big
            sums[i] += weight.grad / big
            halves[number > len(batches) // 2][i] += weight.grad
        if number % big == 0:
            big_sq = torch.stack([total.square().sum() for total in sums])
            metric.update(small_sq=small_sq, big_sq=big_sq, small=BATCH, big=BATCH * big)
            small_sq, sums = torch.zeros_like(small_sq), [torch.zeros_like(w) for w in weights]
    model.zero_grad()
    return metric.signal_fraction(BATCH), [
        torch.stack([h.flatten() for h in (a, b)]) for a, b in zip(*halves, strict=True)
    ]


def cosine(now: Tensor, then: Tensor) -> float:
    """Of the true gradients, from two independent estimates of either: their noise has no part in it."""
    product = (now @ then.T).mean()
    return float(product / ((now[0] @ now[1]) * (then[0] @ then[1])).clamp(min=1e-30).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=["NAMO", "NAMOD"], default="NAMOD")
    parser.add_argument("--lr", type=float, default=0.009)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--moments", type=int, nargs="+", default=[40, 160, 300])
    parser.add_argument("--batches", type=int, default=128, help="of each measurement")
    parser.add_argument("--big", type=int, default=64, help="batches in a big one; it divides --batches")
    parser.add_argument("--out", help="a CSV file of all layers")
    args = parser.parse_args()

    torch.manual_seed(0)
    data = TextDataModule(block_size=BLOCK, batch_size=BATCH)
    data.prepare_data()
    data.setup("fit")
    vocabulary = -(-data.vocab_size // 64) * 64
    model = GPT2(GPT2Config(vocab_size=vocabulary, block_size=BLOCK, n_layer=4, n_head=4, n_embd=128))
    optimizer = build_optimizer(model, {"NAMO": NAMO, "NAMOD": NAMOD}[args.optimizer], lr=args.lr)
    scheduler = WarmupStableDecay(warmup=0.05, decay=0.3)(optimizer, total_steps=args.steps)
    optimizer.keeps_readings = True
    lags = (1, round(0.5 / (1 - MOMENTUM)), round(1 / (1 - MOMENTUM)))
    signals = defaultdict(lambda: SignalFraction(Averages(MOMENTUM, True, BETA2)))
    names = [name for group in optimizer.param_groups if group["orthogonalize"] for name in group["param_names"]]
    weights = [dict(model.named_parameters())[name] for name in names]
    others = chain.from_iterable(repeat(TrainLoader(data.train_windows, BATCH, seed=1)))  # pass after pass
    gradients, rows = {}, []
    for step, batch in zip(range(1, args.steps + 1), TrainLoader(data.train_windows, BATCH, seed=0), strict=False):
        optimizer.zero_grad()
        backward(model, batch)
        clip_gradients(model, max_norm=1.0)
        optimizer.step()
        scheduler.step()
        if step % 5 == 0:
            for name, value in optimizer.readings()["signal_fraction"].items():
                signals[name].add(step, value.item())
        if any(step + lag in args.moments for lag in (0, *lags)):
            direct, gradients[step] = measured(model, weights, list(islice(others, args.batches)), args.big)
        if step in args.moments:
            for i, name in enumerate(names):
                row = {"step": step, "matrix": name, "reads": signals[name].last, "error": signals[name].error()}
                row["direct"] = direct[i].item()
                row |= {f"cos {lag}": cosine(gradients[step][i], gradients[step - lag][i]) for lag in lags}
                rows.append(row)
    print(f"{args.optimizer}, {args.steps} steps, {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'step':>4}  {'matrix':34}", *(f"{key:>7}" for key in list(rows[0])[2:]))
    for row in rows:
        numbers = [100 * value for value in list(row.values())[2:5]] + list(row.values())[5:]
        print(f"{row['step']:4}  {row['matrix']:34}", *(f"{value:7.2f}" for value in numbers))
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
