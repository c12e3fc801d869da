"""Grids of runs: one `fit` for every combination of values, each resumable, and one table of what came out."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from tqdm import tqdm

from lightning_namo.atomic_io import replacing, write_json
from lightning_namo.cli.recipes import recipe
from lightning_namo.report.events import read_folder

RESULT, TABLE = "result.json", "results.csv"

KEYS = {"base", "out_dir", "metric", "grids"}


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its name, which is its folder too, its config layers, and the values that it tries."""

    name: str
    layers: tuple[str, ...]
    values: tuple[tuple[str, Any], ...]

    def command(self, out_dir: str) -> list[str]:
        """Arguments after ``lightning-namo``; a run that was interrupted goes on from its last checkpoint."""
        options = [*self.values, ("trainer.logger.save_dir", out_dir), ("trainer.logger.name", self.name)]
        options += [("trainer.logger.version", ""), ("ckpt_path", "last")]
        configs = [f"--config={layer}" for layer in self.layers]
        return ["fit", *configs, *(f"--{key}={_as_text(value)}" for key, value in options)]


def sweep(
    file: str, print_jobs: bool = False, job: int | None = None, only_table: bool = False
) -> dict[str, Any] | str:
    """Run a grid, one run after the other; what is done is skipped, what was interrupted goes on.

    The file says what to run: ``base``, the config layers of every run; ``grids``, each with a ``config`` layer and
    ``values``, from option to a list of values, all combinations of which are run; ``out_dir``; ``metric``, of which
    the last and the lowest value go into ``out_dir/results.csv``.

    Args:
        file: What to run, as configs/sweeps/small.yaml, or by name: sweeps/small.
        print_jobs: Print the command of each run instead, a line each, for a scheduler's job array.
        job: Do this run only, counted from 0: the index of the job array.
        only_table: Run nothing; write the table of the runs that are done.

    Returns:
        The table's file, the runs done of how many, and the best; or the commands.

    Raises:
        ValueError: A file that is missing or says something else, or a job that is not in it.
    """
    description = _read(Path(recipe(file)))
    runs, out_dir = list(_runs(description)), Path(description["out_dir"])
    if job is not None and not 0 <= job < len(runs):
        raise ValueError(f"Expected a job from 0 to {len(runs) - 1}. Got {job}: {file} has {len(runs)} runs.")
    if print_jobs:
        return "\n".join(shlex.join(["lightning-namo", *run.command(str(out_dir))]) for run in runs)
    began, before = time.monotonic(), _done(runs, out_dir)
    for number, run in enumerate(runs):
        if not only_table and job in (None, number) and not (out_dir / run.name / RESULT).is_file():
            if sys.stderr.isatty():
                # A line for each run, and none that is drawn anew: the run has bars of its own, and the same terminal.
                done, seconds = _done(runs, out_dir), time.monotonic() - began
                bar = tqdm.format_meter(done, len(runs), seconds, ncols=79, prefix="Sweep", unit="run", initial=before)
                print(bar, file=sys.stderr)
            _do(run, out_dir, description["metric"], f"{number + 1} of {len(runs)}")
    return _table(runs, out_dir, description["metric"])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"Expected a file that describes a sweep. Got {path}, which does not exist.")
    try:
        description = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"Expected YAML in {path}. Got: {error}") from error
    if not isinstance(description, dict) or not {"base", "out_dir", "grids"} <= set(description) <= KEYS:
        got = sorted(map(str, description)) if isinstance(description, dict) else description
        raise ValueError(f"Expected base, out_dir, grids and, optionally, metric in {path}. Got {got}.")
    for grid in description["grids"]:
        values = grid.get("values") if isinstance(grid, dict) else None
        if not isinstance(values, dict) or not all(isinstance(v, list) and v for v in values.values()):
            raise ValueError(f"Expected each grid in {path} to have values, from options to lists. Got {grid}.")
    return {"metric": "val/loss", **description}


def _runs(description: dict[str, Any]) -> Iterator[Run]:
    for grid in description["grids"]:
        layer = [grid["config"]] if "config" in grid else []
        for combination in itertools.product(*grid["values"].values()):
            values = tuple(zip(grid["values"], combination, strict=True))
            parts = [Path(grid["config"]).stem] if layer else []
            tried = [(key, value) for key, value in values if len(grid["values"][key]) > 1]
            parts += [f"{key.rpartition('.')[2]}={_as_text(value)}" for key, value in tried]
            yield Run("_".join(parts), (*description["base"], *layer), values)


def _done(runs: list[Run], out_dir: Path) -> int:
    """How many runs are done, whichever process did them."""
    return sum((out_dir / run.name / RESULT).is_file() for run in runs)


def _do(run: Run, out_dir: Path, metric: str, which: str) -> None:
    print(f"sweep: run {which}, {run.name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lightning_namo", *run.command(str(out_dir))], check=False)
    if done.returncode:
        raise ValueError(
            f"Expected {run.name} to finish. Got exit code {done.returncode}; its message is above. Once that is "
            "mended, the same command goes on from here."
        )
    seconds = round(time.monotonic() - began, 1)
    folder = out_dir / run.name
    result = {**dict(run.values), **_measured(folder, metric), "seconds": seconds}
    write_json(folder / RESULT, result)


def _measured(folder: Path, metric: str) -> dict[str, Any]:
    """The metric from the TensorBoard files of a run, which may have stopped and gone on."""
    curves, _ = read_folder(folder)
    if metric not in curves:
        raise ValueError(f"Expected {metric} among the curves in {folder}. Got {list(curves)}.")
    values = curves[metric].values.tolist()
    return {"steps": int(curves[metric].steps[-1]), metric: values[-1], f"lowest {metric}": min(values)}


def _table(runs: list[Run], out_dir: Path, metric: str) -> dict[str, Any]:
    """Write the table of all runs that are done, whichever process did them."""
    rows = [
        {"run": run.name, **json.loads(path.read_text(encoding="utf-8"))}
        for run in runs
        if (path := out_dir / run.name / RESULT).is_file()
    ]
    summary: dict[str, Any] = {"table": str(out_dir / TABLE), "done": len(rows), "runs": len(runs)}
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with replacing(out_dir / TABLE) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        summary["best"] = min(rows, key=lambda row: row[metric] if math.isfinite(row[metric]) else math.inf)
    return summary


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
