"""The estimate of a step on many ranks equals what real ranks plan, hold and send; and what the command line says."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_namo import NAMO, NAMOD, AdaMuon, build_optimizer
from lightning_namo.cli import main
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.parallel import shard
from lightning_namo.optim.engine import OrthogonalizedOptimizer
from lightning_namo.planning.cost_model import Estimate, estimate, overlapped
from lightning_namo.planning.models import MODELS, build_model
from lightning_namo.planning.simulated_mesh import LAYOUTS as NAMES
from lightning_namo.planning.simulated_mesh import SimulatedMesh, chunk
from lightning_namo.sharding.local import local_tensor
from tests.distributed.test_memory import bucket, peak_of_a_step, size
from tests.helpers.forked import run_python
from tests.helpers.iteration import ITERATIONS, iterating_in
from tests.helpers.launch import run_ranks
from tests.helpers.layouts import LAYOUTS
from tests.helpers.worker import Wire, counted, new_module

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
ALGORITHMS = {"namo": NAMO, "namo_d": NAMOD, "adamuon": AdaMuon}
PLAIN = [(layout, "namo") for layout in ("ddp", "fsdp2-even", "fsdp2-uneven", "hsdp", "fsdp2+tp")]
PLAIN += [("fsdp2-uneven", "namo_d"), ("fsdp2+tp", "adamuon")]  # other statistics and state
SHARDED = {2: ((2, 1), (1, 2)), 3: ((3, 1),), 4: ((2, 1), (1, 2), (2, 2))}  # replicas and tensor ranks of a GPT-2
WORLD_SIZES = [pytest.param(size, marks=[pytest.mark.slow] * (size > 2)) for size in SHARDED]
DIVIDED = {"*.tall.*": 0, "*.fused.*": 0, "*.wide.layer.weight": 1, "*.few.layer.weight": 1}


def gpt2() -> GPT2:
    """A GPT-2 whose 10 and 30 rows divide unevenly, the same on all ranks."""
    torch.manual_seed(0)
    return GPT2(GPT2Config(vocab_size=33, block_size=8, n_layer=2, n_head=2, n_embd=10, bias=True))


def optimizer_of(module: nn.Module, algorithm: str, blocks: Any = None) -> OrthogonalizedOptimizer:
    optimizer = build_optimizer(module, ALGORITHMS[algorithm], blocks=blocks)
    optimizer.bucket_bytes = 1500
    return optimizer


def facts_of(module: nn.Module, algorithm: str, blocks: Any) -> dict[str, Any]:
    """What one real rank plans, sends and holds."""
    optimizer = optimizer_of(module, algorithm, blocks)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the plan
    wire = Wire()
    with counted(wire):
        optimizer.step()
    exchange = optimizer._prepare()[2]
    state = [local_tensor(value) for held in optimizer.state.values() for value in held.values()]
    return {
        "assignment": exchange.assignment,
        "bytes_sent": exchange.bytes_sent,
        "wire": wire,
        "parameters": sum(local_tensor(p).nbytes for p in module.parameters()),
        "state": sum(value.nbytes for value in state),
    }


def real_ranks(rank: int, sharded: tuple[tuple[int, int], ...]) -> dict[Any, Any]:
    facts: dict[Any, Any] = {}
    for layout, algorithm in PLAIN:
        kind, wrap = LAYOUTS[layout]
        facts[layout, algorithm] = facts_of(wrap(new_module(kind, torch.float32)), algorithm, kind.blocks)
    world_size = torch.distributed.get_world_size()
    for replicas, tensor in sharded:
        module = gpt2()
        mesh = init_device_mesh(
            "cpu", (world_size // tensor, tensor), mesh_dim_names=("data_parallel", "tensor_parallel")
        )
        shard(module, mesh, replicas=replicas)
        facts[replicas, tensor] = facts_of(module, "namo", None)
    for iteration in ITERATIONS:
        facts["peak", iteration] = peak_of_a_step(rank, 24, iteration)
    return facts


@functools.cache
def real(world_size: int) -> list[dict[Any, Any]]:
    return run_ranks(real_ranks, world_size, SHARDED[world_size], timeout=200)


def grid_of(layout: str, ranks: int) -> SimulatedMesh:
    two = 2 if ranks % 2 == 0 else 1  # as in tests.helpers.layouts
    sizes = {"ddp": (ranks, 1, 1), "hsdp": (ranks // two, two, 1), "fsdp2+tp": (1, ranks // two, two)}
    return SimulatedMesh(*sizes.get(layout, (1, ranks, 1)))


def check(result: Estimate, ranks: list[dict[str, Any]]) -> None:
    for rank, facts in zip(result.ranks, ranks, strict=True):
        assert facts["assignment"] == result.assignment
        assert facts["bytes_sent"] == facts["wire"].exchanged == rank.sent
        assert facts["wire"].summed == result.reduced
        assert facts["wire"].calls.count("all_to_all") == result.all_to_alls
        assert facts["wire"].calls.count("all_reduce") == result.all_reduces
        assert (facts["parameters"], facts["state"]) == (rank.parameters, rank.state)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("layout", "algorithm"), PLAIN)
def test_plan_bytes_and_state_are_those_of_real_ranks(layout: str, algorithm: str, world_size: int) -> None:
    kind, _ = LAYOUTS[layout]
    with torch.device("meta"):
        optimizer = optimizer_of(kind(), algorithm, kind.blocks)
    result = estimate(optimizer, grid_of(layout, world_size), divided=DIVIDED)
    check(result, [facts[layout, algorithm] for facts in real(world_size)])


@pytest.mark.parametrize(
    ("world_size", "replicas", "tensor"),
    [
        pytest.param(world_size, *sizes, marks=[pytest.mark.slow] * (world_size > 2))
        for world_size, cases in SHARDED.items()
        for sizes in cases
    ],
)
def test_a_sharded_gpt2_is_as_estimated(world_size: int, replicas: int, tensor: int) -> None:
    with torch.device("meta"):
        optimizer = optimizer_of(gpt2(), "namo")
    result = estimate(optimizer, SimulatedMesh(replicas, world_size // replicas // tensor, tensor))
    check(result, [facts[replicas, tensor] for facts in real(world_size)])


def square_matrices(iteration: str) -> OrthogonalizedOptimizer:
    with torch.device("meta"):
        optimizer = NAMO([nn.Parameter(torch.empty(size(iteration), size(iteration))) for _ in range(24)])
    optimizer.bucket_bytes = bucket(iteration)
    return optimizer


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("iteration", ITERATIONS)
def test_peak_buffers_are_within_a_tenth_of_measured_ones(iteration: str, world_size: int) -> None:
    result = estimate(
        square_matrices(iteration), SimulatedMesh.of("fsdp2", world_size), dtype=getattr(torch, iteration)
    )
    expected = max(rank.buffers for rank in result.ranks)
    assert expected == pytest.approx(max(facts["peak", iteration] for facts in real(world_size)), rel=0.1)


def test_buffers_are_those_of_the_iteration_that_the_environment_sets_and_of_bfloat16_by_default() -> None:
    grid, optimizer = SimulatedMesh.of("fsdp2", 2), square_matrices("float32")
    given = {name: estimate(optimizer, grid, dtype=getattr(torch, name)).ranks for name in ITERATIONS}
    assert given["float32"] != given["bfloat16"]
    for name, expected in ((None, "bfloat16"), *zip(ITERATIONS, ITERATIONS, strict=True)):
        with iterating_in(name):
            assert estimate(optimizer, grid).ranks == given[expected]


@pytest.mark.parametrize("length", [0, 1, 3, 7, 8, 19, 23])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_chunks_are_those_of_torch_chunk(length: int, parts: int) -> None:
    expected = [part.tolist() for part in torch.arange(length).chunk(parts)] if length else []
    expected += [[]] * (parts - len(expected))
    assert [list(range(*chunk(length, parts, place))) for place in range(parts)] == expected


def test_nothing_of_70_billion_parameters_takes_memory_and_1024_ranks_are_planned_in_seconds() -> None:
    module = build_model("llama_70b").module
    optimizer = build_optimizer(module, NAMO)
    result = estimate(optimizer, SimulatedMesh.of("fsdp2", 1024), tokens_per_step=4 * 2**20)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert all(value.is_meta for state in optimizer.state.values() for value in state.values())
    assert result.elements == 68_976_648_192  # of the published model
    assert len(result.matrices) == 560
    assert result.busiest == result.bound
    assert sum(rank.sent for rank in result.ranks) == sum(rank.received for rank in result.ranks)
    assert sum(rank.sent for rank in result.ranks) <= 1024 * result.formula


@pytest.mark.parametrize(("model", "elements"), [("gpt2_small", 124_373_760), ("llama_7b", 6_738_415_616)])
def test_models_by_name_have_the_published_sizes(model: str, elements: int) -> None:
    assert sum(parameter.numel() for parameter in build_model(model).module.parameters()) == elements


def test_communication_hides_behind_the_work_on_other_buckets() -> None:
    assert overlapped([1], [5], [1]) == 7  # nothing to hide behind
    # Buckets arrive and leave while others are worked on: what is left is the first way in and the last way back.
    assert overlapped([1, 1, 1], [5, 5, 5], [1, 1, 1]) == 17
    assert overlapped([4, 4, 4], [0, 0, 0], [4, 4, 4]) == 24  # nothing to hide it


# ---------------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def layers(*names: str) -> Iterator[str]:
    return (f"--config={CONFIGS / name}.yaml" for name in names)


def as_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    main(["plan", "--json=true", *options])
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("layout", NAMES)
def test_the_table_names_the_bound_the_formula_and_the_time(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--ranks=16", f"--layout={layout}"])
    out = capsys.readouterr().out
    assert out.startswith(f"NAMO for gpt2_small on 16 ranks, {layout}: ")
    assert "Computed, not measured." in out
    assert re.search(r"busiest rank +\S+ +1\.0\d\d of the bound max\(total/R, largest\)", out)
    assert re.search(r"formula +19\.9 MB +2 \(R-1\)/R \* elements/R \* itemsize", out)
    assert re.search(r"step +[\d.]+ ms +overlapped; [\d.]+ ms if not", out)
    assert re.search(r"share of training +[\d.]+% +passes [\d.]+ ms \(491,520 tokens", out)


def test_owners_lists_every_matrix_with_its_rank(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--ranks=4", "--owners=true"])
    assert len(re.findall(r"^[0-3] +transformer\.h\.\S+ +\(\d+, \d+\)$", capsys.readouterr().out, re.MULTILINE)) == 48


@pytest.mark.parametrize(
    ("names", "grid", "tokens"),
    [
        (("quickstart",), (8, 1, 1), 8 * 16 * 128),  # "auto" is DDP on several devices
        (("quickstart", "strategy/fsdp2"), (1, 8, 1), 8 * 16 * 128),
        (("quickstart", "strategy/hsdp"), (2, 4, 1), 8 * 16 * 128),
        (("quickstart", "strategy/fsdp2_tp", "optim/muon"), (1, 4, 2), 4 * 16 * 128),
    ],
)
def test_layers_of_configs_give_the_model_of_fit_and_its_strategy(
    names: tuple[str, ...],
    grid: tuple[int, int, int],
    tokens: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = as_json(capsys, "--ranks=8", "--owners=true", *layers(*names))
    assert tuple(result["grid"].values()) == grid
    assert result["training_seconds"] == pytest.approx(6 * result["elements"] * tokens / (8 * 0.4 * 989e12))

    models: list[Any] = []

    @functools.wraps(pl.Trainer.fit)  # the command line reads the signature
    def record(trainer: pl.Trainer, model: Any, **_: Any) -> None:
        models.append(model)

    monkeypatch.setattr(pl.Trainer, "fit", record)
    main(["fit", *layers("quickstart"), "--trainer.logger=false", "--trainer.accelerator=cpu"])
    models[0].configure_model()
    parameters = dict(models[0].named_parameters())
    assert result["elements"] == sum(parameter.numel() for parameter in parameters.values())
    assert result["owners"].keys() <= parameters.keys()


def test_options_overrule_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    result = as_json(capsys, "--ranks=8", *layers("quickstart", "strategy/hsdp"), "--layout=fsdp2", "--model.n_layer=2")
    assert result["grid"] == {"replicas": 1, "shards": 8, "tensor": 1}
    assert result["matrices"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout=zero",), "Expected layout to be one of ddp, fsdp2, hsdp, fsdp2_tp. Got 'zero'."),
        (("--layout=hsdp", "--replicas=3"), r"Expected replicas \* tensor to divide the 8 ranks. Got 3 \* 1 = 3."),
        (("--layout=ddp", "--replicas=2"), "Expected replicas with hsdp or fsdp2_tp only. Got 2 with ddp."),
        (("--layout=fsdp2", "--tensor=2"), "Expected tensor with fsdp2_tp only. Got 2 with fsdp2."),
        (("--layout=fsdp2_tp", "--tensor=8"), "Expected tensor, 8, to divide the attention heads. Got 12 heads."),
        (("--model=gpt5",), "Expected model to be a LightningModule's class or one of gpt2_small, .* Got 'gpt5'."),
        ((*layers("quickstart", "strategy/fsdp1"),), r"Expected a recipe with DDP or .* Got FSDPStrategy; with FSDP"),
        ((*layers("quickstart", "optim/adamw"),), "Expected NAMO, NAMOD, Muon or AdaMuon, .* Got AdamW."),
        (
            ("--model=tests.planning.test_cost_model.Vectors",),
            "Expected a trainable matrix to orthogonalize in Vectors",
        ),
        (
            ("--model=tests.planning.test_cost_model.Matrix", "--layout=fsdp2_tp"),
            "Expected a model that 2 tensor-parallel ranks",
        ),
    ],
)
def test_wrong_input_ends_with_one_message(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--ranks=8", *options])
    assert stop.value.code == 2
    assert re.search(f"error: {message}", capsys.readouterr().err)


class Vectors(pl.LightningModule):
    """A model without matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)


class Matrix(pl.LightningModule):
    """A model that tensor parallelism knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


# ---------------------------------------------------------------------- the page


def test_the_tables_in_the_docs_are_what_the_script_writes() -> None:
    script = str(ROOT / "examples" / "benchmarks" / "scale_notes.py")
    done = run_python([script, "--models", "gpt2_small", "--ranks", "8", "64"])
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| gpt2_small")]
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert len(rows) == 4
    assert all(row in page for row in rows)
    assert all(f"| {model} |" in page for model in MODELS)
