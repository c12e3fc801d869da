"""Recipes and checkpoints of before the package had folders go on working: see tests/data/before."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lightning_namo import NAMOD
from lightning_namo.checkpoint.consolidate import consolidate
from lightning_namo.cli import main
from tests.helpers.job import ROOT, finish
from tests.helpers.launch import free_port

BEFORE = ROOT / "tests" / "data" / "before"
RULES = ("NAMO", "NAMOD", "Muon", "AdaMuon")
WITHIN = 1e-4  # of a weight's norm: runs on one and on two processes differed by 2e-5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokens").symlink_to(BEFORE / "tokens")
    return tmp_path


def options(rule: str, config: str = "recipe.yaml") -> list[str]:
    section = {"optimizer": f"lightning_namo.optimizers.{rule}"}
    given = {"lr": 0.02, "orthogonalizer": "svd"}
    layers = [f"--config={BEFORE / config}", f"--config={json.dumps({'optim': section})}"]
    return ["fit", *layers, *(f"--optim.optimizer.{key}={value}" for key, value in given.items())]


def check(checkpoint: Path, rule: str) -> None:
    """Whether a run ended with the weights that it had before."""
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    with np.load(BEFORE / "weights.npz") as expected:
        names = {name.partition("/")[2]: name for name in expected if name.startswith(f"{rule}/")}
        assert names.keys() == weights.keys()
        for name, weight in weights.items():
            value = torch.from_numpy(expected[names[name]])
            assert (weight - value).norm() <= WITHIN * value.norm(), name


@pytest.mark.usefixtures("kept_parsers")
@pytest.mark.parametrize("saved", ["single", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("rule", RULES)
def test_a_recipe_goes_on_from_a_checkpoint(
    rule: str, saved: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = BEFORE / rule / f"{saved}.ckpt"
    if saved == "fsdp2":  # a folder, which one process does not resume
        consolidate(str(checkpoint), str(folder / "one.ckpt"))
        checkpoint = folder / "one.ckpt"
    monkeypatch.chdir(folder)
    main([*options(rule), f"--ckpt_path={checkpoint}"])
    check(folder / "saved" / "step=4.ckpt", rule)


@pytest.mark.usefixtures("kept_parsers")
def test_the_config_that_fit_saved_repeats_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    main(["fit", f"--config={BEFORE / 'config.yaml'}"])
    check(folder / "saved" / "step=4.ckpt", "NAMOD")
    saved = yaml.safe_load(next(folder.glob("logs/**/config.yaml")).read_text(encoding="utf-8"))
    assert saved["model"]["class_path"] == "lightning_namo.gpt2.module.GPT2Module"
    assert saved["data"]["class_path"] == "lightning_namo.gpt2.data.TextDataModule"


@pytest.mark.slow
def test_the_command_line_names_the_new_paths_of_a_recipe(folder: Path) -> None:
    # Not in a fork: pytest keeps the warnings of its own process, and of its forks, to itself.
    command = [sys.executable, "-m", "lightning_namo", "fit", f"--config={BEFORE / 'recipe.yaml'}", "--print_config"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=200)
    for former in ("optimizers.NAMOD", "run_card.RunCard", "callbacks.SaveOnSigterm", "clipping.GradientClipping"):
        assert f"lightning_namo.{former} is lightning_namo." in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_sharded_checkpoint_goes_on_under_fsdp2(rule: str, folder: Path) -> None:
    shutil.copytree(BEFORE / rule / "fsdp2.ckpt", folder / "fsdp2.ckpt")
    strategy = {"class_path": "lightning_namo.gpt2.parallel.MeshStrategy", "init_args": {}}
    strategy["init_args"] = {"save_distributed_checkpoint": False}
    job = [*options(rule), f"--config={json.dumps({'trainer': {'strategy': strategy, 'devices': 2}})}"]
    job += ["--data.batch_size=2", "--ckpt_path=fsdp2.ckpt"]
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    ended = finish([(["lightning-namo", *job], ranks | {"LOCAL_RANK": str(rank)}) for rank in range(2)], folder)
    assert [process.code for process in ended] == [0, 0], ended[0].output
    check(folder / "saved" / "step=4.ckpt", rule)


def test_an_optimizer_that_was_saved_as_a_whole_goes_on() -> None:
    with pytest.warns(DeprecationWarning, match=r"lightning_namo.optim.namo.NAMOD now"):
        optimizer = torch.load(BEFORE / "optimizer.pt", weights_only=False)
    assert type(optimizer) is NAMOD
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
