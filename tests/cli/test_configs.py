"""The configs: strategies as layers over the quickstart, and the recipes of the paper in every combination."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, OptimizerCallback, WarmupStableDecay, split_parameters
from lightning_namo.cli import NamoCLI, main
from lightning_namo.gpt2.data.module import accumulation
from lightning_namo.gpt2.data.streaming import StreamingTextDataModule
from lightning_namo.gpt2.model import GPT2, GPT2Config
from lightning_namo.gpt2.parallel import MeshStrategy
from lightning_namo.integration.build import make_optimizer
from tests.helpers.paths import CONFIGS

pytestmark = pytest.mark.usefixtures("kept_parsers")

STRATEGIES = sorted((CONFIGS / "strategy").glob("*.yaml"))
LIGHTNING, OURS = "lightning.pytorch.strategies", "lightning_namo.gpt2.parallel.MeshStrategy"
EXPECTED: dict[str, tuple[str, dict[str, Any], int]] = {  # strategy, some of its arguments, replicas of the model
    "ddp": (f"{LIGHTNING}.DDPStrategy", {"gradient_as_bucket_view": True}, 1),
    "fsdp1": (f"{LIGHTNING}.FSDPStrategy", {"auto_wrap_policy": ["lightning_namo.gpt2.model.Block"]}, 1),
    "fsdp2": (OURS, {"data_parallel_size": "auto", "tensor_parallel_size": 1}, 1),
    "hsdp": (OURS, {"data_parallel_size": "auto", "tensor_parallel_size": 1}, 2),
    "fsdp2_tp": (OURS, {"data_parallel_size": "auto", "tensor_parallel_size": 2}, 1),
}


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """The whole config that a command line comes to."""
    with pytest.raises(SystemExit) as stop:
        main([*options, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_every_strategy_has_a_config() -> None:
    assert {path.stem for path in STRATEGIES} == set(EXPECTED)


@pytest.mark.parametrize("path", STRATEGIES, ids=lambda path: path.stem)
def test_a_strategy_layers_over_the_quickstart_by_the_command_in_its_comment(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    (command,) = re.findall(r"^# +lightning-namo (fit .*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert f"configs/strategy/{path.name}" in command
    config = printed(capsys, *command.split())
    strategy, (class_path, arguments, replicas) = config["trainer"]["strategy"], EXPECTED[path.stem]
    assert strategy["class_path"] == class_path
    assert {key: strategy["init_args"][key] for key in arguments} == arguments
    model = config["model"]["init_args"]
    assert (model["n_layer"], model["n_embd"], model["replicas"]) == (4, 128, replicas)
    assert config["optim"]["optimizer"]["class_path"] == "lightning_namo.NAMOD"
    assert config["trainer"]["gradient_clip_val"] == 1.0


@pytest.mark.parametrize(
    ("devices", "sizes", "expected"),
    [
        (1, {}, (1, 1)),
        (6, {}, (6, 1)),
        (6, {"tensor_parallel_size": 2}, (3, 2)),
        (6, {"data_parallel_size": 3, "tensor_parallel_size": 2}, (3, 2)),
    ],
)
def test_data_parallel_ranks_follow_the_processes(
    devices: int, sizes: dict[str, Any], expected: tuple[int, int]
) -> None:
    strategy = MeshStrategy(**sizes)
    pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_checkpointing=False)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == expected


@pytest.mark.parametrize("sizes", [{"data_parallel_size": 4}, {"tensor_parallel_size": 4}, {"tensor_parallel_size": 8}])
def test_sizes_that_are_not_the_processes_are_refused_before_any_starts(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"data_parallel_size \* tensor_parallel_size = .*\. Got 6 processes"):
        pl.Trainer(accelerator="cpu", devices=6, strategy=MeshStrategy(**sizes))


# --- the recipes: model x optimizer x strategy ------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "small": {"layers": 12, "heads": 12, "width": 768, "parameters": 124_373_760, "batch": 480, "steps": 50_000},
    "medium": {"layers": 24, "heads": 16, "width": 1024, "parameters": 354_599_936, "batch": 480, "steps": 10_000},
    "large": {"layers": 36, "heads": 20, "width": 1280, "parameters": 773_582_080, "batch": 512, "steps": 10_000},
}
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {  # published learning rates, arXiv 2602.17080 and 2507.11005
    "adamw": (torch.optim.AdamW, {"lr": 0.0013, "betas": (0.9, 0.95), "weight_decay": 0.1}),
    "muon": (Muon, {"lr": 0.0013, "momentum": 0.95, "weight_decay": 0.1}),
    "adamuon": (AdaMuon, {"lr": 0.001, "momentum": 0.95, "weight_decay": 0.1}),
    "namo": (NAMO, {"lr": 0.012, "momentum": 0.95, "beta2": 0.99, "weight_decay": 0.1}),
    "namo_d": (NAMOD, {"lr": 0.009, "momentum": 0.95, "beta2": 0.99, "clamp": 0.1, "weight_decay": 0.1}),
    "medium/adamw": (torch.optim.AdamW, {"lr": 0.0009, "betas": (0.9, 0.95), "weight_decay": 0.1}),
    "medium/muon": (Muon, {"lr": 0.0009, "momentum": 0.95, "weight_decay": 0.1}),
    "medium/namo": (NAMO, {"lr": 0.007, "momentum": 0.95, "beta2": 0.99, "weight_decay": 0.1}),
    "medium/namo_d": (NAMOD, {"lr": 0.009, "momentum": 0.95, "beta2": 0.99, "clamp": 0.9, "weight_decay": 0.1}),
}
RECIPES = [  # every two of them together; as no two set the same option, that is every three
    (list(SIZES)[(row + column) % len(SIZES)], optimizer, path.stem)
    for row, optimizer in enumerate(OPTIMIZERS)
    for column, path in enumerate(STRATEGIES)
]


def layers(*names: str) -> list[str]:
    return [f"--config=configs/{name}.yaml" for name in names]


@pytest.fixture
def instantiated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NamoCLI]:
    """Everything that a command line makes, up to the run."""
    made: list[NamoCLI] = []
    monkeypatch.setattr(NamoCLI, "_run_subcommand", lambda self, subcommand: made.append(self))
    monkeypatch.chdir(CONFIGS.parent)

    def make(*options: str) -> NamoCLI:
        main(["fit", *options])
        return made[-1]

    return make


@functools.cache
def on_the_meta_device(config: GPT2Config) -> GPT2:
    with torch.device("meta"):
        return GPT2(config)


def test_every_optimizer_has_a_config() -> None:
    found = {str(path.relative_to(CONFIGS / "optim").with_suffix("")) for path in (CONFIGS / "optim").rglob("*.yaml")}
    assert found == {*OPTIMIZERS, "separate_adamw_lr"}


@pytest.mark.parametrize("order", ["pre", "none", "post"])
def test_every_order_is_a_layer_over_the_quickstart(instantiated: Callable[..., NamoCLI], order: str) -> None:
    cli = instantiated(*layers("quickstart", f"denoise/{order}"))
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, OptimizerCallback)]
    made = make_optimizer(split_parameters(on_the_meta_device(cli.model.config)), callback.optimizer)
    assert type(made) is Muon
    matrices, others = made.param_groups
    assert (matrices.get("order", "pre"), matrices["nesterov"], others["lr"]) == (order, False, 0.003)


def options_in(section: Any, name: str = "") -> Iterator[str]:
    """The names of all options of a config."""
    if not isinstance(section, dict):
        yield name
        return
    for key, value in section.items():
        yield from options_in(value, f"{name}.{key}")


def test_the_layers_of_a_recipe_set_no_option_twice() -> None:
    names = [[f"gpt2_{size}" for size in SIZES], [f"optim/{name}" for name in OPTIMIZERS]]
    names.append([f"strategy/{path.stem}" for path in STRATEGIES])
    kinds = []
    for kind in names:
        layers = [yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")) for name in kind]
        kinds.append({option for layer in layers for option in options_in(layer)})
    for one, other in itertools.combinations(kinds, 2):
        for first, second in itertools.product(one, other):  # an option is set by what sets all of its section, too
            assert not f"{first}.".startswith(f"{second}.")
            assert not f"{second}.".startswith(f"{first}.")


def test_every_two_layers_of_the_recipes_meet() -> None:
    for one, other in itertools.combinations(range(3), 2):
        sizes = [len(SIZES), len(OPTIMIZERS), len(STRATEGIES)]
        assert len({(recipe[one], recipe[other]) for recipe in RECIPES}) == sizes[one] * sizes[other]


@pytest.mark.parametrize(
    ("size", "optimizer", "strategy"),
    [pytest.param(*recipe, marks=[pytest.mark.slow] * (number % 15 > 0)) for number, recipe in enumerate(RECIPES)],
)
def test_a_recipe_is_what_the_paper_says(
    size: str, optimizer: str, strategy: str, instantiated: Callable[..., NamoCLI]
) -> None:
    fsdp1_on_a_cpu = ["--trainer.strategy=auto"] if strategy == "fsdp1" else []  # Lightning refuses it
    cli = instantiated(
        *layers(f"gpt2_{size}", f"optim/{optimizer}", f"strategy/{strategy}", "scale/laptop"),
        "--trainer.accelerator=cpu",
        "--trainer.devices=4",
        *fsdp1_on_a_cpu,
    )
    table, (cls, hyper) = SIZES[size], OPTIMIZERS[optimizer]
    config = cli.model.config
    assert (config.n_layer, config.n_head, config.n_embd) == (table["layers"], table["heads"], table["width"])
    assert (config.vocab_size, config.block_size, config.bias, config.dropout) == (50304, 1024, False, 0.0)
    model = on_the_meta_device(config)
    assert sum(p.numel() for p in model.parameters()) == table["parameters"]
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, OptimizerCallback)]
    made = make_optimizer(split_parameters(model), callback.optimizer)
    assert type(made) is cls
    matrices, others = made.param_groups
    assert {key: matrices[key] for key in hyper} == hyper
    assert others["lr"] == hyper["lr"]  # the official runs share it
    assert (len(matrices["params"]), len(others["params"])) == (4 * table["layers"], 2 * table["layers"] + 3)
    assert cli.datamodule.global_batch_size == table["batch"]
    assert (cli.trainer.max_steps, cli.trainer.gradient_clip_val) == (table["steps"], 1.0)
    assert cli.trainer.precision == "bf16-mixed"
    assert callback.schedule == WarmupStableDecay(warmup=2000)


def test_the_streaming_layer_has_the_recipes_sequences(instantiated: Callable[..., NamoCLI]) -> None:
    cli = instantiated(*layers("gpt2_small", "data/streaming", "scale/laptop"), "--data.data_dir=s3://bucket/chunks")
    data = cli.datamodule
    assert type(data) is StreamingTextDataModule
    assert data.address == "s3://bucket/chunks"
    assert (data.block_size, data.batch_size, data.global_batch_size, data.vocab_size) == (1024, 4, 480, 50257)
    assert (cli.model.config.block_size, cli.model.config.vocab_size) == (1024, 50304)


def test_adamw_can_have_a_learning_rate_of_its_own(instantiated: Callable[..., NamoCLI]) -> None:
    for optimizer in ("namo", "namo_d", "muon", "adamuon"):
        options = layers("gpt2_small", f"optim/{optimizer}", "optim/separate_adamw_lr", "scale/laptop")
        cli = instantiated(*options, "--trainer.accelerator=cpu")
        (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, OptimizerCallback)]
        made = make_optimizer(split_parameters(on_the_meta_device(cli.model.config)), callback.optimizer)
        assert [group["lr"] for group in made.param_groups] == [OPTIMIZERS[optimizer][1]["lr"], 0.0013]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("scale", "processes"), [("laptop", 1), ("one_node", 8), ("multi_node", 32)])
def test_every_scale_makes_the_global_batch(
    size: str, scale: str, processes: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = printed(capsys, "fit", *layers(f"gpt2_{size}", "optim/namo", f"scale/{scale}"))
    assert config["trainer"]["devices"] * config["trainer"]["num_nodes"] == processes
    data = config["data"]["init_args"]
    for tensor_parallel in (1, 2, 4, 8):
        if processes % tensor_parallel == 0:
            replicas = processes // tensor_parallel
            steps = accumulation(data["global_batch_size"], data["batch_size"], replicas, 1)
            assert steps * data["batch_size"] * replicas == SIZES[size]["batch"]
