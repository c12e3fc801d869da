"""What every rank of the equivalence tests does: train under a layout, gather, count what was sent."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_namo import build_optimizer
from lightning_namo.testing.layouts import (
    LAYOUTS,
    gathered_state,
    gathered_weights,
    new_module,
    prescribed_gradients,
)
from tests.helpers.iteration import iterating_in
from tests.helpers.rules import RULES

VARIANTS = {  # name: (dtype, orthogonalizer, dtype of the iteration, whether the accelerators' path is taken)
    "float64-exact": (torch.float64, "svd", None, None),
    "float32-exact": (torch.float32, "svd", None, None),
    "float32-batched": (torch.float32, "svd", None, True),
    "bfloat16-iteration": (torch.float32, "newton_schulz", "bfloat16", None),
    "bfloat16-batched": (torch.float32, "newton_schulz", "bfloat16", True),
    "float32-iteration": (torch.float32, "newton_schulz", "float32", None),
}
STEPS = 3


@dataclass
class Wire:
    """Collectives of the steps after the first, and bytes sent to other ranks."""

    calls: list[str] = field(default_factory=list)
    exchanged: int = 0
    summed: int = 0


@contextlib.contextmanager
def counted(wire: Wire) -> Iterator[None]:
    """Count what the package sends, by wrapping torch.distributed's functions (they still run)."""
    all_to_all, all_reduce, all_gather = dist.all_to_all_single, dist.all_reduce, dist.all_gather_object
    rank = dist.get_rank() if dist.is_initialized() else 0

    def counting_all_to_all(out: Tensor, inp: Tensor, outs: list[int], ins: list[int], **kw: Any) -> Any:
        wire.calls.append("all_to_all")
        assert ins[rank] == 0, "a rank sends nothing to itself"
        wire.exchanged += sum(ins) * inp.element_size()
        return all_to_all(out, inp, outs, ins, **kw)

    def counting_all_reduce(tensor: Tensor, **kw: Any) -> Any:
        wire.calls.append("all_reduce")
        wire.summed += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, **kw)

    def counting_all_gather(*args: Any, **kw: Any) -> Any:
        wire.calls.append("all_gather_object")
        return all_gather(*args, **kw)

    dist.all_to_all_single, dist.all_reduce = counting_all_to_all, counting_all_reduce
    dist.all_gather_object = counting_all_gather
    try:
        yield
    finally:
        dist.all_to_all_single, dist.all_reduce, dist.all_gather_object = all_to_all, all_reduce, all_gather


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.").removeprefix("_forward_module.")


def local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def train(
    module: nn.Module,
    algorithm: str,
    orthogonalizer: str,
    blocks: Any,
    backward: Callable[[int], None],
    wire: Wire,
    batched: bool | None = None,
) -> Any:
    """Take steps; ``backward`` makes the gradients of a step."""
    routing = {"blocks": blocks, "heads": "matrix", "first_layers": "matrix"}
    optimizer = build_optimizer(module, RULES[algorithm], **routing, lr=0.05, orthogonalizer=orthogonalizer)
    optimizer.bucket_bytes, optimizer.batched = 1500, batched  # several buckets, so that they overlap
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(step)
        with counted(wire) if step else contextlib.nullcontext():
            optimizer.step()
    return optimizer


def expected_results(variant: str) -> dict[Any, Any]:
    """What one process, without a process group, makes of every algorithm and module."""
    dtype, orthogonalizer, iteration, _ = VARIANTS[variant]
    results = {}
    for kind in {kind for kind, _ in LAYOUTS.values()}:
        for algorithm in RULES:
            module = new_module(kind, dtype)
            grads = [prescribed_gradients(module, step) for step in range(STEPS)]

            def backward(step: int, module: nn.Module = module, grads: list[Any] = grads) -> None:
                module(grads[step]).backward()

            with iterating_in(iteration):
                optimizer = train(module, algorithm, orthogonalizer, kind.blocks, backward, Wire())
            results[algorithm, kind.__name__] = gathered_weights(module), gathered_state(optimizer)
    return results


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0 or torch.equal(actual, expected):
        return 0.0
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


class Backward:
    """The gradients of a wrapped module's steps. They do not depend on its weights: only the first run makes them."""

    def __init__(self, module: nn.Module, grads: list[Any]) -> None:
        self.module, self.grads = module, grads
        self.made: list[list[tuple[Tensor | None, Tensor | None]]] = []

    def __call__(self, step: int) -> None:
        if step == len(self.made):
            self.module(self.grads[step]).backward()
            grads = [p.grad for p in self.module.parameters()]
            self.made.append([(grad, None if grad is None else local(grad).clone()) for grad in grads])
        for parameter, (grad, value) in zip(self.module.parameters(), self.made[step], strict=True):
            if grad is not None:
                local(grad).copy_(value)  # steps may have changed it
            parameter.grad = grad


def compare_layouts(
    rank: int, dtype: torch.dtype, layouts: list[str], expected: dict[str, Any]
) -> dict[Any, dict[str, Any]]:
    """For each variant, algorithm and layout: relative errors of weights and state, what was sent, a checksum."""
    answers = {}
    for layout in layouts:
        kind, wrap = LAYOUTS[layout]
        plain = new_module(kind, dtype)
        grads = [prescribed_gradients(plain, step) for step in range(STEPS)]
        module = wrap(plain)
        start = [local(p.detach()).clone() for p in module.parameters()]
        backward = Backward(module, grads)
        for variant, algorithm in itertools.product(expected, RULES):
            _, orthogonalizer, iteration, batched = VARIANTS[variant]
            with torch.no_grad():
                for parameter, value in zip(module.parameters(), start, strict=True):
                    local(parameter).copy_(value)
            wire = Wire()
            with iterating_in(iteration):
                optimizer = train(module, algorithm, orthogonalizer, kind.blocks, backward, wire, batched)
            weights, state = gathered_weights(module), gathered_state(optimizer)
            wanted_weights, wanted_state = expected[variant][algorithm, kind.__name__]
            assert weights.keys() == wanted_weights.keys()
            assert state.keys() == wanted_state.keys()
            answers[variant, algorithm, layout] = {
                "weights": max(relative_error(weights[name], wanted_weights[name]) for name in weights),
                "state": max(relative_error(state[n][k], wanted_state[n][k]) for n in state for k in wanted_state[n]),
                "replicas": {name: value.double().sum().item().hex() for name, value in weights.items()},
                "wire": wire,
                "elements": sum(e.count * e.layout.stored[0] * e.layout.stored[1] for e in optimizer._prepare()[0]),
            }
    return answers
