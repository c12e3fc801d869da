"""Checkpoints of two processes: exported with the same logits, and made one file that every run resumes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch.strategies import Strategy
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_namo import NAMOD, OptimizerCallback
from lightning_namo.checkpoint.consolidate import consolidate, read_checkpoint
from lightning_namo.gpt2.export import export
from lightning_namo.gpt2.generate import generate
from lightning_namo.gpt2.load import load_network
from lightning_namo.gpt2.module import GPT2Module
from tests.helpers import toy
from tests.helpers.launch import run_ranks
from tests.helpers.resuming import checkpoint, run_cases
from tests.helpers.strategies import CPUFSDPStrategy, FullFSDPStrategy, model_parallel
from tests.helpers.worker import relative_error

STRATEGIES: dict[str, Callable[[], str | Strategy]] = {
    "ddp": lambda: "ddp",
    "fsdp1": lambda: FullFSDPStrategy(state_dict_type="full"),
    "fsdp1 sharded": lambda: CPUFSDPStrategy(state_dict_type="sharded"),
    "fsdp2": lambda: model_parallel(2, 1, False),
    "fsdp2 sharded": lambda: model_parallel(2, 1, True),
    "tp sharded": lambda: model_parallel(1, 2, True),
}
FAST = "fsdp2 sharded"
SHARDED = [name for name in STRATEGIES if "sharded" in name]
IDS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
SAVED_AT, STEPS = 2, 4


def train(strategy: str | Strategy, devices: int, folder: Path, name: str, resume: Path | None = None) -> Tensor:
    """Train a GPT-2 with the same batch everywhere, saving on the way; the logits after the last step."""
    torch.manual_seed(0)
    module = GPT2Module(vocab_size=64, block_size=8, n_layer=2, n_head=2, n_embd=8, bias="fsdp1" in name)
    saver = pl.callbacks.ModelCheckpoint(
        folder, filename=f"{name}-{{step}}", every_n_train_steps=SAVED_AT, save_top_k=-1
    )
    optimizer = OptimizerCallback(functools.partial(NAMOD, lr=0.02, orthogonalizer="svd"))
    trainer = toy.trainer(
        *([optimizer] if resume else [optimizer, saver]),
        devices=devices,
        strategy=strategy,
        max_steps=STEPS,
        enable_checkpointing=not resume,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader([(IDS, IDS.roll(1, 1))] * STEPS, batch_size=None), ckpt_path=resume)
    assert trainer.global_step == STEPS
    with torch.no_grad():
        return trainer.strategy.model.eval()(IDS).clone()


SOURCES = ("fsdp1 2 sharded", "fsdp2 2 sharded", "tp 2 sharded")
TARGETS = ("single", "ddp 2", "fsdp1 2", "fsdp2 2")
CASES = [(source, to, "NAMOD") for source in SOURCES for to in TARGETS]  # v by column
CASES += [(source, to, o) for o in ("AdaMuon", "AdamW") for source in SOURCES[:2] for to in ("single", "fsdp1 2")]


@dataclass
class Runs:
    """What two processes made of everything here, and where they left their checkpoints.

    Attributes:
        folder: Of the checkpoints.
        logits: Of GPT-2s after the last step, by strategy.
        uninterrupted: Weights of `ResumableNet` after a run without a stop, by strategy and optimizer.
        resumed: After one from a consolidated checkpoint.
    """

    folder: Path
    logits: dict[str, Tensor]
    uninterrupted: dict[Any, dict[str, Tensor]]
    resumed: dict[Any, dict[str, Tensor]]


def resuming(cases: list[tuple[str, str, str]], to_one: bool) -> list[tuple[str, str, str | None]]:
    return [(to, optimizer, f"whole {source}") for source, to, optimizer in cases if (to == "single") == to_one]


def run_all(rank: int, folder: str, names: list[str], cases: list[tuple[str, str, str]]) -> Runs:
    os.environ.update(NODE_RANK="0")
    logits = {name: train(STRATEGIES[name](), 2, Path(folder), name) for name in names}
    runs = list(dict.fromkeys((source, optimizer, None) for source, _, optimizer in cases))
    uninterrupted = run_cases(rank, runs, folder)
    for source, optimizer, _ in runs:
        if rank == 0:
            whole = checkpoint(f"whole {source}", optimizer, folder)
            consolidate(checkpoint(source, optimizer, folder), whole)  # starts no processes, and asks none
    dist.barrier()
    return Runs(Path(folder), logits, uninterrupted, run_cases(rank, resuming(cases, to_one=False), folder))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, selected: list[dict[str, Any]]) -> Runs:
    """Of what is selected, and always of FAST, which tests without parameters read."""
    folder = str(tmp_path_factory.mktemp("runs"))
    names = [name for name in STRATEGIES if name == FAST or {"name": name} in selected]
    sources = {case["source"] for case in selected if case.keys() == {"source"}}
    chosen = [(case["source"], case["to"], case["optimizer"]) for case in selected if "optimizer" in case]
    cases = [c for c in CASES if c in chosen or c == (SOURCES[1], "single", "NAMOD") or c[0] in sources]
    runs: Runs = run_ranks(run_all, 2, folder, names, cases, timeout=200)[0]
    runs.resumed |= run_cases(0, resuming(cases, to_one=True), folder)
    return runs


def mostly_slow(names: Iterable[str], fast: str) -> list[Any]:
    return [name if name == fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def saved(folder: Path, name: str, step: int) -> Path:
    path = folder / f"{name}-step={step}.ckpt"
    assert path.is_dir() == ("sharded" in name)
    return path


@pytest.mark.parametrize("name", mostly_slow(STRATEGIES, FAST))
def test_a_checkpoint_of_two_processes_is_exported_with_their_logits(name: str, runs: Runs, tmp_path: Path) -> None:
    path = saved(runs.folder, name, STEPS)
    with torch.no_grad():
        torch.testing.assert_close(load_network(path)(IDS), runs.logits[name], rtol=0, atol=1e-5)
        export(str(path), str(tmp_path / "hf"))
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
        torch.testing.assert_close(model(IDS).logits, runs.logits[name], rtol=0, atol=1e-5)
    assert (runs.logits[name] - load_network(saved(runs.folder, name, SAVED_AT))(IDS)).abs().max() > 1e-2
    assert model.generate(IDS[:, :4], max_new_tokens=2, do_sample=False).shape == (2, 6)


def test_a_sharded_checkpoint_generates_text(runs: Runs, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = saved(runs.folder, "fsdp2 sharded", STEPS)
    text = generate(str(path), "w5 w7", max_new_tokens=1, temperature=0.0, data_dir=str(tmp_path))
    with torch.no_grad():
        assert text == f"w5 w7 w{load_network(path)(torch.tensor([[5, 7]]))[0, -1].argmax()}"


# ---------------------------------------------------------------------- consolidate


@pytest.mark.parametrize("name", mostly_slow(SHARDED, FAST))
def test_a_gpt2_goes_on_from_a_consolidated_checkpoint_on_one_device(name: str, runs: Runs, tmp_path: Path) -> None:
    report = consolidate(str(saved(runs.folder, name, SAVED_AT)), str(tmp_path / "whole.ckpt"))
    assert report["global_step"] == SAVED_AT
    assert report["optimizers"] == 1
    assert report["bytes"] == (tmp_path / "whole.ckpt").stat().st_size
    networks = [
        load_network(path).state_dict() for path in (tmp_path / "whole.ckpt", saved(runs.folder, name, SAVED_AT))
    ]
    torch.testing.assert_close(*networks, rtol=0, atol=0)
    resumed = train("auto", 1, tmp_path, name, tmp_path / "whole.ckpt")
    torch.testing.assert_close(resumed, runs.logits[name], rtol=0, atol=1e-5)
    assert os.listdir(tmp_path) == ["whole.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "to", "optimizer"), CASES)
def test_a_run_resumed_from_a_consolidated_checkpoint_equals_the_uninterrupted_one(
    source: str, to: str, optimizer: str, runs: Runs
) -> None:
    expected, actual = runs.uninterrupted[source, optimizer, None], runs.resumed[to, optimizer, f"whole {source}"]
    tolerance = 0 if source == f"{to} sharded" else 1e-5 if "fsdp1" in source + to else 1e-12  # float32 there
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        assert relative_error(weight, expected[name]) <= tolerance, name


@pytest.mark.parametrize("source", mostly_slow(SOURCES, SOURCES[1]))
def test_a_sharded_checkpoint_loses_nothing(source: str, runs: Runs) -> None:
    path = Path(checkpoint(source, "NAMOD", str(runs.folder)))
    whole = torch.load(checkpoint(f"whole {source}", "NAMOD", str(runs.folder)), weights_only=True)
    rest = torch.load(path / "meta.pt", weights_only=True)
    assert whole.keys() == {*rest, "state_dict", "optimizer_states"}
    names = [name for group in whole["optimizer_states"][0]["param_groups"] for name in group["params"]]
    assert set(names) == set(whole["optimizer_states"][0]["state"]) < set(whole["state_dict"])
    assert read_checkpoint(path, optimizers=False)["optimizer_states"] == []


def test_a_sharded_checkpoint_that_lacks_a_shard_is_refused(runs: Runs, tmp_path: Path) -> None:
    path = Path(checkpoint("fsdp2 2 sharded", "NAMOD", str(runs.folder)))
    broken = tmp_path / "broken.ckpt"
    broken.mkdir()
    for file in path.iterdir():
        if not file.name.startswith("__1"):
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"Expected a checkpoint of Lightning. Got .*cannot be read: .*__1_0.distcp"):
        consolidate(str(broken), str(tmp_path / "whole.ckpt"))
    assert os.listdir(tmp_path) == ["broken.ckpt"]
