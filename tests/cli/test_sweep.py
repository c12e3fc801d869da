"""Sweeps: what is run, that it goes on where it stopped, and the table."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_namo.cli.sweep import sweep
from tests.helpers.forked import run_python
from tests.helpers.paths import ROOT

GRID = {
    "config": str(ROOT / "configs/optim/namo.yaml"),
    "values": {
        "optim.optimizer.lr": [0.005, 0.012],
        "trainer.max_steps": [2],
        "trainer.val_check_interval": [2],
        "trainer.limit_val_batches": [1],
        "trainer.callbacks": [None],
        "trainer.accelerator": ["cpu"],
        "model.n_layer": [1],
        "model.n_embd": [16],
    },
}


def plan(folder: Path, **keys: object) -> str:
    path = folder / "sweep.yaml"
    whole = {"base": [str(ROOT / "configs/quickstart.yaml")], "out_dir": str(folder / "out"), "grids": [GRID], **keys}
    path.write_text(yaml.safe_dump(whole))
    return str(path)


def fork(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
    """A run as the sweep starts it, in a fork of this process."""
    assert (command[0], check) == (sys.executable, False)
    return run_python(command[1:])


@pytest.mark.slow
def test_a_sweep_runs_what_is_not_done_and_writes_one_table(data, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    config, out = plan(tmp_path), tmp_path / "out"
    first = sweep(config, job=1)
    monkeypatch.setattr(subprocess, "run", fork)  # a new interpreter takes ten seconds of its own
    assert (first["done"], first["runs"], first["best"]["run"]) == (1, 2, "namo_lr=0.012")
    written = (out / "namo_lr=0.012/result.json").stat().st_mtime_ns
    second = sweep(config)
    assert (second["done"], (out / "namo_lr=0.012/result.json").stat().st_mtime_ns) == (2, written)
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["optim.optimizer.lr"]) for row in rows] == [
        ("namo_lr=0.005", "0.005"),
        ("namo_lr=0.012", "0.012"),
    ]
    losses = [float(row["val/loss"]) for row in rows]
    assert losses[0] != losses[1]
    assert all(8 < loss < 9 for loss in losses)  # log 4096 = 8.3 after two steps
    assert second["best"]["val/loss"] == min(losses)


def test_the_job_array_has_a_line_for_each_run(tmp_path):
    lines = sweep(plan(tmp_path), print_jobs=True).splitlines()
    assert len(lines) == 2
    for line, lr in zip(lines, ("0.005", "0.012"), strict=True):
        assert line.startswith("lightning-namo fit --config=")
        assert f"--optim.optimizer.lr={lr}" in line
        assert f"--trainer.logger.name=namo_lr={lr}" in line
        assert "--trainer.callbacks=null" in line
        assert "--ckpt_path=last" in line


@pytest.mark.parametrize(
    ("size", "numbers"), [("small", [5, 5, 5, 20]), ("medium", [5, 5, 5, 20]), ("large", [5, 6, 6, 24])]
)
def test_the_published_grids_are_there(size, numbers, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = sweep(f"configs/sweeps/{size}.yaml", print_jobs=True).splitlines()
    names = ("adamw", "muon", "namo", "namo_d")
    assert [sum(f"--config=optim/{name} " in line for line in lines) for name in names] == numbers
    assert all(f"--config=gpt2_{size} " in line for line in lines)


def test_every_order_has_five_learning_rates_and_its_best_three_seeds(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = sweep("configs/sweeps/denoise.yaml", print_jobs=True).splitlines()
    assert len(lines) == 21 == len({line.partition("--trainer.logger.name=")[2].split()[0] for line in lines})
    for order in ("pre", "none", "post"):
        of_order = [line for line in lines if f"--config=denoise/{order} " in line]
        best = yaml.safe_load(Path(f"configs/denoise/{order}.yaml").read_text())["optim"]["optimizer"]["init_args"][
            "lr"
        ]
        at_best = [line for line in of_order if f"--optim.optimizer.lr={best} " in line]
        assert {line.partition("--seed_everything=")[2][0] for line in at_best} == set("012")
        assert len({line.partition("--optim.optimizer.lr=")[2].split()[0] for line in of_order}) == 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": []}, r"Expected base, out_dir, grids .* Got .*'grid'"),
        ({"grids": [{"values": {"optim.optimizer.lr": 0.1}}]}, r"to have values, from options to lists\. Got"),
        ({"grids": ["configs/optim/namo.yaml"]}, r"Expected each grid"),
    ],
)
def test_a_file_that_says_something_else_is_refused(keys, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(plan(tmp_path, **keys))


def test_jobs_and_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a job from 0 to 1\. Got 2"):
        sweep(plan(tmp_path), job=2)
    with pytest.raises(ValueError, match="Expected a file, or the name of a recipe"):
        sweep(str(tmp_path / "none.yaml"))


def test_a_run_that_fails_stops_the_sweep_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", fork)
    grid = {**GRID, "values": {"model.n_layer": [-1]}}
    with pytest.raises(ValueError, match=r"Expected namo to finish\. Got exit code 2"):
        sweep(plan(tmp_path, grids=[grid]))
    assert not list((tmp_path / "out").rglob("result.json"))
