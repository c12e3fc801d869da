"""The benchmarks run as their docstrings say, on a small network, and leave a table and a picture."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.helpers.forked import run_python
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "examples" / "benchmarks"
SMALL = ["--blocks", "1", "--width", "64", "--rounds", "2", "--threads", "1", "--csv", "out.csv", "--figure", "out.png"]

OTHERS = """
from torch.optim import SGD

class NAMO(SGD):
    def __init__(self, lr, wd, muon_params, adamw_params):
        super().__init__([*muon_params, *adamw_params], lr, weight_decay=wd)

class NAMO_D(NAMO):
    pass

class Muon(SGD):
    def __init__(self, params, lr, weight_decay, distributed_mesh, nesterov, adjust_lr):
        super().__init__(params, lr, weight_decay=weight_decay)
"""


def run(script: str, options: list[str], folder: Path) -> tuple[str, list[dict[str, str]]]:
    """What a benchmark prints, and its table, once its picture has been seen to be one."""
    done = run_python([str(BENCHMARKS / script), *SMALL, *options], folder, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stderr
    height, width, _ = imread(folder / "out.png").shape
    assert min(height, width) > 100
    with (folder / "out.csv").open(newline="", encoding="utf-8") as file:
        return done.stdout, list(csv.DictReader(file))


def test_step_compares_sides_on_shards_of_two_processes(tmp_path: Path) -> None:
    printed, table = run("step.py", ["--ranks", "2", "--sides", "namo,torch,redundant"], tmp_path)
    rows = {row["side"]: row for row in table}
    assert list(rows) == ["NAMO", "torch.optim.Muon", "redundant"]
    for row in rows.values():
        assert float(row["fastest ms"]) <= float(row["step, median ms"]) <= float(row["slowest ms"])
        assert float(row["of redundant, least"]) <= float(row["of redundant, most"])
        assert min(float(row[name]) for name in ("GFLOP", "operations", "GB touched", "MB sent", "peak MB")) > 0
    assert rows["redundant"]["of redundant"] == "1.000"
    sent = re.search(r"rank 0 sends ([\d,]+) bytes of matrices", printed)
    assert sent is not None
    assert float(rows["NAMO"]["MB sent"]) >= int(sent[1].replace(",", "")) / 1e6
    assert float(rows["NAMO"]["MB sent"]) < float(rows["torch.optim.Muon"]["MB sent"])
    assert int(rows["NAMO"]["collectives"]) < int(rows["torch.optim.Muon"]["collectives"])


def test_step_updates_a_whole_gpt2_also_with_checkouts_of_others(tmp_path: Path) -> None:
    for name in ("src/namo.py", "dion/muon.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(OTHERS)
    sides = ["namo", "torch", "adamw", "authors-namo", "authors-namo-d", "dion"]
    options = ["--model", "small", "--authors", ".", "--dion", ".", "--sides", ",".join(sides), "--alone"]
    printed, table = run("step.py", options, tmp_path)
    rows = {row["side"]: row for row in table}
    others = ["authors' NAMO", "authors' NAMO-D", "dion's Muon"]
    assert list(rows) == ["NAMO", "torch.optim.Muon", "fused AdamW", *others]
    assert {f"of {other}" for other in others} < set(table[0])
    # X X', its square and their product with X, five times, for matrices of 64 rows and together 768 columns
    flops = 5 * (4 * 64**2 * 768 + 4 * 2 * 64**3)
    assert float(rows["torch.optim.Muon"]["GFLOP"]) == pytest.approx(flops / 1e9, rel=1e-4)
    assert float(rows["fused AdamW"]["GFLOP"]) == 0
    assert "all code runs eagerly" in printed
    assert "One side after another" in printed


def test_train_computes_large_batches_from_measured_parts(tmp_path: Path) -> None:
    options = ["--block-size", "64", "--tokens", "64", "491520", "--precision", "32-true"]
    printed, table = run("train.py", options, tmp_path)
    assert [row["optimizer"] for row in table] == ["AdamW", "Muon", "NAMO", "NAMO-D"] * 2
    assert [row["micro-batches"] for row in table] == ["1"] * 4 + ["7680"] * 4
    assert [bool(row["step s, measured"]) for row in table] == [True] * 4 + [False] * 4
    assert all(0 < float(row["optimizer % of it"]) < 100 for row in table[:4])
    assert [row["over AdamW %, computed"] for row in table if row["optimizer"] == "AdamW"] == ["0.00", "0.00"]
    assert re.search(r"NAMO-D at 491,520 tokens: -?[\d.]+% over AdamW, computed; goal 4%", printed)


def test_overlap_draws_what_travels_in_traces_of_two_processes(tmp_path: Path) -> None:
    options = "--blocks 1 --width 64 --bucket-mib 0.02 --steps 1 --figure out.png --trace traces"
    done = run_python([str(BENCHMARKS / "overlap.py"), *options.split()], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    height, width, _ = imread(tmp_path / "out.png").shape
    assert min(height, width) > 100
    found = re.findall(
        r"(\w+): ([\d.]+) of .* \(([\d.]+) to ([\d.]+) in .* (\d+) buckets, (\d+) all-to-alls", done.stdout
    )
    assert [layout for layout, *_ in found] == ["FSDP2", "DDP"]
    for layout, fraction, least, most, buckets, sent in found:
        assert 0 <= float(least) <= float(fraction) <= float(most) <= 1
        assert int(buckets) > 1
        assert int(sent) == int(buckets) * (2 if layout == "FSDP2" else 1)  # replicas need not send momentum
        for rank in (0, 1):
            trace = json.loads(
                gzip.decompress((tmp_path / "traces" / f"{layout.lower()}-rank{rank}.json.gz").read_bytes())
            )
            assert sum(event["name"] == "gloo:all_to_all" for event in trace["traceEvents"]) == int(sent)


def test_noise_scale_leaves_a_table_and_a_picture_of_it(tmp_path: Path) -> None:
    options = ["--steps", "26", "--moments", "25", "--batches", "4", "--big", "2", "--out", "out.csv"]
    done = run_python([str(BENCHMARKS / "noise_scale.py"), *options], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert set(rows[0]) == {"step", "matrix", "reads", "error", "direct", "cos 1", "cos 10", "cos 20"}
    for row in rows:
        assert 0 < float(row["error"]) < 1
        assert row["matrix"] in done.stdout
    plot = [str(ROOT / "examples" / "plot_noise.py"), "measured", "out.csv", "--out", "out.png"]
    drawn = run_python(plot, tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert imread(tmp_path / "out.png").std() > 0.05


def test_spectra_compares_decompositions(tmp_path: Path) -> None:
    options = ["--shapes", "60", "100", "--rounds", "2"]
    done = run_python([str(BENCHMARKS / "spectra.py"), *options], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "noise |" in line]
    assert [row[:2] for row in rows] == [["60 x 100", "noise"], ["60 x 100", "signal in noise"]]
    assert all(float(number) > 0 for row in rows for number in row[2:5])
    assert float(rows[1][5]) < 0.1 < float(rows[0][5]) <= 1  # the randomized SVD's subspace
