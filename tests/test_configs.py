"""Every strategy's config is a layer over the quickstart, and says what its own comment says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml

from lightning_namo.cli import main
from lightning_namo.gpt2.parallel import MeshStrategy

CONFIGS = Path(__file__).parents[1] / "configs"
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
