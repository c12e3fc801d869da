"""What a step costs by counts, which need no clock: kernels, bytes and Python calls, held at what they are today.

A step on the meta device dispatches the operations of one on an accelerator, at least a kernel each. What grew is told
by name against tests/data/counts.json, which `python -m tests.optim.test_counts` writes anew after a meant change.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_namo
from lightning_namo import NAMO, build_optimizer
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from tests.helpers.iteration import iterating_in
from tests.helpers.paths import ROOT
from tests.helpers.rules import BUILT_IN

HELD = ROOT / "tests" / "data" / "counts.json"
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
NO_KERNELS = {"empty", "promote_types", "_record_function_enter_new", "_record_function_exit"}
ON_A_CPU = "one matrix on a CPU"
Counts = dict[str, Counter[str]]


class Operations(TorchDispatchMode):
    """Kernels by name, views left out, and the bytes of what all but matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNELS:
            self.kernels[name] += kernels_of(name, args)
            if name not in PRODUCTS:
                read = {key: value for key, value in (kwargs or {}).items() if key != "out"}  # it is in the result
                written = args[0] if out is None else out  # torch's foreach functions return nothing in place
                leaves = tree_leaves((args, read, written))
                self.bytes[name] += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return out


def kernels_of(name: str, args: Any) -> int:
    """One, or for a call over lists of unlike tensors, which torch takes one by one, one for each."""
    if not name.startswith("_foreach"):
        return 1
    lists = [arg for arg in args if isinstance(arg, list | tuple)]
    shapes = {tensor.shape for tensors in lists for tensor in tensors}
    dtypes = {tensor.dtype for tensors in lists for tensor in tensors}
    return 1 if len(shapes) == len(dtypes) == 1 else len(lists[0])


def matrices(cls: type[OrthogonalizedOptimizer], count: int, device: str = "meta") -> OrthogonalizedOptimizer:
    shape = (256, 1024) if device == "meta" else (64, 128)
    return cls([nn.Parameter(torch.ones(shape, device=device)) for _ in range(count)])


def gpt2(cls: type[OrthogonalizedOptimizer], **sizes: int) -> OrthogonalizedOptimizer:
    with torch.device("meta"):
        small = {"vocab_size": 512, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 64}
        return build_optimizer(GPT2(GPT2Config(**small | sizes, bias=True)), cls)


CASES: dict[str, Callable[[type[OrthogonalizedOptimizer]], OrthogonalizedOptimizer]] = {
    "one matrix": lambda cls: matrices(cls, 1),
    "12 equal matrices": lambda cls: matrices(cls, 12),
    "a small GPT-2": gpt2,
}


def with_gradients(optimizer: OrthogonalizedOptimizer) -> OrthogonalizedOptimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    return optimizer


def operations(optimizer: OrthogonalizedOptimizer) -> Operations:
    """Of the second step; in bfloat16, whatever the machine's own is."""
    with iterating_in("bfloat16"):
        with_gradients(optimizer).step()
        with Operations() as counted:
            optimizer.step()
    return counted


def calls(step: Callable[[], object]) -> Counter[str]:
    """Calls of the package's functions; without lambdas and comprehensions, which differ by Python."""
    counted: Counter[str] = Counter()
    root = Path(lightning_namo.__file__).parent

    def profile(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and root in path.parents and not frame.f_code.co_name.startswith("<"):
            counted[f"{path.relative_to(root)}:{frame.f_code.co_qualname}"] += 1

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return counted


def count(cls: type[OrthogonalizedOptimizer], case: str) -> Counts:
    if case == ON_A_CPU:
        optimizer = with_gradients(matrices(cls, 1, "cpu"))
        with iterating_in("bfloat16"):
            optimizer.step()
            return {"calls": calls(optimizer.step)}
    counted = operations(CASES[case](cls))
    return {"kernels": counted.kernels, "bytes": counted.bytes}


@pytest.mark.parametrize("case", [*CASES, ON_A_CPU])
@pytest.mark.parametrize("cls", BUILT_IN)
def test_a_step_takes_no_more_kernels_bytes_and_calls_than_are_held(
    cls: type[OrthogonalizedOptimizer], case: str
) -> None:
    # Per element of one matrix and of 12: 114 and 190 bytes for NAMO; 54 and 54 for torch.optim.Muon, which checks
    # nothing and in which each matrix has kernels of its own (25 a matrix).
    held = json.loads(HELD.read_text(encoding="utf-8"))[f"{cls.__name__}, {case}"]
    for kind, counted in count(cls, case).items():
        before = Counter(held[kind])
        told = f"{counted.total():,} {kind} in a step of {cls.__name__}, {case}: {before.total():,} are held. "
        more, less = dict(counted - before), dict(before - counted)
        assert counted.total() <= before.total(), f"{told}More: {more}. Less: {less}"
        if kind == "calls":
            files, files_before = ({name.partition(":")[0] for name in names} for names in (counted, before))
            assert len(counted) <= len(before), f"{told}New functions: {sorted(more)}"
            assert len(files) <= len(files_before), f"{told}New files: {sorted(files - files_before)}"


@pytest.mark.slow
@pytest.mark.parametrize("cls", BUILT_IN)
def test_kernels_do_not_grow_with_elements_layers_or_equal_matrices(cls: type[OrthogonalizedOptimizer]) -> None:
    small, one = operations(gpt2(cls)).kernels, operations(matrices(cls, 12)).kernels
    for change in ({"vocab_size": 4096}, {"block_size": 256}, {"n_layer": 4}):
        counted = operations(gpt2(cls, **change)).kernels
        if "n_layer" in change:  # of AdamW's gradients, all unlike
            counted["_foreach_norm"] = small["_foreach_norm"]
        assert counted == small, f"{change}: more {counted - small}, less {small - counted}"
    counted = operations(matrices(cls, 24)).kernels  # gradients and weights are read and written where they are
    assert counted.total() <= one.total() + 12 * 3, f"24 matrices for 12: more {counted - one}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "sizes"),
    [
        (400, {"n_layer": 12, "n_head": 12, "n_embd": 768}),
        (900, {"n_layer": 36, "n_head": 20, "n_embd": 1280}),
    ],
)
def test_namo_on_gpt2_keeps_to_the_kernels_and_bytes_that_an_accelerator_needs(
    kernels: int, sizes: dict[str, int]
) -> None:
    # 54 bytes are torch.optim.Muon's; 20 are two norms and 12 the choice between gradient and momentum, and N is
    # written in bfloat16 at once.
    with torch.device("meta"):
        model = GPT2(GPT2Config(vocab_size=50304, block_size=1024, **sizes, bias=False))
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in f".{name}"]
    assert len(hidden) == 4 * sizes["n_layer"]
    counted = operations(NAMO(hidden))
    assert counted.kernels.total() <= kernels, counted.kernels
    assert counted.bytes.total() <= 78.1 * sum(p.numel() for p in hidden), counted.bytes


@pytest.mark.parametrize("cls", BUILT_IN)
def test_the_second_step_and_later_ones_make_no_plan(cls: type[OrthogonalizedOptimizer]) -> None:
    optimizer, made, plans = with_gradients(matrices(cls, 2, "cpu")), [], []
    for _ in range(3):
        made.append(calls(optimizer.step)["sharding/assignment.py:assign"])
        plans.append(optimizer._prepare())
    assert made == [1, 0, 0]
    assert plans[0] is plans[1] is plans[2]


@pytest.mark.parametrize("cls", BUILT_IN)
def test_nothing_is_read_from_the_device(cls: type[OrthogonalizedOptimizer]) -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device="meta").item()
    optimizer = with_gradients(gpt2(cls))
    for _ in range(3):
        optimizer.step()


if __name__ == "__main__":
    names = [(cls, case) for cls in BUILT_IN for case in (*CASES, ON_A_CPU)]
    lines = [f'"{cls.__name__}, {case}": {json.dumps(count(cls, case), sort_keys=True)}' for cls, case in names]
    HELD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
