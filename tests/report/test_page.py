"""The page and its Markdown: sections, sizes, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_namo.report.page import report
from lightning_namo.report.table import duration
from tests.report.logged import optimizer, write

SECTIONS = ["Advice", "Runs", "Loss", "Learning rates", "Layers", "Spectra", "Clamps and skipped steps", "Files"]


def made(folder: Path, *paths: Path, **keys: Any) -> tuple[str, str]:
    """The page and the summary."""
    result = report([str(path) for path in paths], str(folder / "out.html"), **keys)
    assert result["page"] == str(folder / "out.html")
    return (folder / "out.html").read_text("utf-8"), Path(result["summary"]).read_text("utf-8")


def section(summary: str, title: str) -> str:
    return summary.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_a_bare_run_has_all_sections_and_says_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "run", {"other": {0: 1.0, 5: 2.0}})
    page, summary = made(tmp_path, tmp_path / "run")
    assert re.findall("^## (.*)$", summary, re.M) == SECTIONS == re.findall("<h2>(.*)</h2>", page)
    for title, words in {
        "Advice": "None: no number calls for a change",
        "Runs": "No settings",
        "Loss": "train/loss was not logged",
        "Learning rates": "No learning-rate sweep",
        "Layers": "Not logged by any run: step scale, signal fraction, noise scale",
        "Spectra": "Not logged by any run: spectra",
        "Clamps and skipped steps": "Not logged by any run: at_lower_clamp",
        "Files": "All event files and settings could be read.",
    }.items():
        assert words in section(summary, title), title
        assert words in page


def test_the_table_has_losses_sizes_and_settings_that_differ(tmp_path: Path) -> None:
    losses = {"val/loss": {0: 5.0, 50: 2.5, 99: 3.0}, "train/loss": {0: 6.0, 99: 2.75}, "train/lengths": {99: 12800.0}}
    write(tmp_path / "runs/a", {**losses, "skipped_steps/max": {99: 2.0}}, optim=optimizer(lr=0.1, clamp=0.5))
    write(tmp_path / "runs/b", {"val/loss": {0: 1.0, 4000: 1.0}}, optim=optimizer("Muon", lr=0.1, nesterov=True))
    _, summary = made(tmp_path, tmp_path / "runs")
    rows = [line for line in section(summary, "Runs").splitlines() if line.startswith("|")]
    header = (
        "run | last val/loss | lowest val/loss | last train/loss | steps | tokens | time | skipped steps | optimizer"
    )
    assert rows == [
        f"| {header} |",
        "|" + " --- |" * 9,
        "| b | 1.0000 | 1.0000 | - | 4,001 | - | 1 h 7 min | - | Muon |",
        "| a | 3.0000 | 2.5000 | 2.7500 | 100 | 12,800 | 1 min 39 s | 2 | NAMOD |",
    ]


def test_of_one_run_the_optimizer_is_shown_and_nothing_that_runs_have_in_common(tmp_path: Path) -> None:
    write(tmp_path / "run", {"val/loss": {0: 1.0}}, optim=optimizer(lr=0.1, clamp=0.5), seed_everything=3)
    _, summary = made(tmp_path, tmp_path / "run")
    rows = [line for line in section(summary, "Runs").splitlines() if line.startswith("|")]
    assert rows[0].endswith("| optimizer | clamp | lr |")
    assert rows[2].endswith("| NAMOD | 0.5 | 0.1 |")


def test_broken_files_and_settings_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "runs/a", {"val/loss": dict.fromkeys(range(9), 1.0)})
    path.write_bytes(path.read_bytes()[:-5])
    write(tmp_path / "runs/b", {"val/loss": {0: 2.0}})
    (tmp_path / "runs/b/config.yaml").write_text("a: [")
    (tmp_path / "runs/b/events.out.tfevents.0").touch()
    _, summary = made(tmp_path, tmp_path / "runs")
    lines = section(summary, "Files").strip().splitlines()
    assert lines[0].startswith(f"- a, {path.name}: the last record, at byte ")
    assert lines[1:2] == ["- b, events.out.tfevents.0: it is empty."]
    assert lines[2].startswith("- b, config.yaml: ")


def test_a_run_of_broken_files_only_is_shown(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.0").write_bytes(b"garbage" * 9)
    _, summary = made(tmp_path, tmp_path)
    assert "| - | - | - | 0 | - | 0.0 s |" in section(summary, "Runs")
    assert "events.out.tfevents.0: no length of a record at byte 0." in section(summary, "Files")


def test_names_and_settings_cannot_break_the_page(tmp_path: Path) -> None:
    name = "<script>alert(1)<!-- | &"
    write(tmp_path / "runs" / name, {"train/loss": {0: 1.0}}, optim=optimizer(lr=1, note="</script>"))
    write(tmp_path / "runs" / "b", {"train/loss": {0: 1.0}}, optim=optimizer(lr=1, note="x"))
    page, summary = made(tmp_path, tmp_path / "runs")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("</script>") == 4
    assert "| <script>alert(1)<!-- \\| & |" in summary
    figures = json.loads(re.search(r'id="figures">(.*)</script>', page)[1])
    assert name in {trace["name"] for figure in figures for trace in figure["data"]}


def test_nothing_is_fetched(tmp_path: Path) -> None:
    write(tmp_path / "run", {"train/loss": {0: 1.0}})
    page, _ = made(tmp_path, tmp_path / "run")
    assert re.findall(r'(?:src|href)="([^"#]*)', page) == ["data:,", *[""] * len(SECTIONS)]
    assert "@import" not in page


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"runs": []}, r"Expected one or more runs and a page to write.* Got runs \[\]"),
        ({"out": "report.md"}, "Got runs .* and out report.md"),
        ({"smoothing": 1.0}, r"report: expected smoothing to be in \[0, 1\) but got 1.0"),
        ({"smoothing": -0.1}, "expected smoothing"),
    ],
)
def test_wrong_arguments_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "run", {"train/loss": {0: 1.0}})
    with pytest.raises(ValueError, match=message):
        report(**{"runs": [str(tmp_path / "run")], "out": str(tmp_path / "x.html"), **keys})


def test_without_plotly_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name))
    with pytest.raises(ValueError, match=r"pip install 'lightning-namo\[report\]'\. Got no plotly"):
        report([str(tmp_path)])


RUNS, LOGGED = 50, 5_000
TAGS = ("train/loss", "val/loss", "train/lengths", "step_scale/median", "noise_scale/median", "signal_fraction/median")
MORE = ("filter_ratio_top/median", "stable_rank_gradient/median", "at_cap/median", "skipped_steps/max")


def fifty_runs(folder: Path) -> None:
    """Copies of one file with other numbers: an event ends with its value."""
    numbers = {tag: {10 * i: 1.0 + i / LOGGED for i in range(LOGGED)} for tag in TAGS + MORE}
    path = write(folder / "00", numbers)
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    ends, at = [], 0
    while at < len(content):
        at += 12 + int.from_bytes(content[at : at + 8].tobytes(), "little")
        ends.append(at)
        at += 4
    places = np.array(ends[1:])[:, None] + np.arange(-4, 0)  # the first is the file's version
    for number in range(RUNS):
        noise = np.random.default_rng(number).normal(5 + number, 1, len(places)).astype("<f4")
        content[places] = noise.view(np.uint8).reshape(-1, 4)
        run = folder / f"{number:02d}"
        run.mkdir(exist_ok=True)
        (run / path.name).write_bytes(content.tobytes())
        (run / "config.yaml").write_text(yaml.safe_dump({"optim": optimizer(lr=0.001 * (number + 1))}))


@pytest.mark.slow
def test_fifty_runs_fit_in_five_megabytes(tmp_path: Path) -> None:
    fifty_runs(tmp_path / "runs")
    page, summary = made(tmp_path, tmp_path / "runs")
    assert len(page.encode()) < 5e6
    words = "Curves longer than 100 points are drawn as means over equal numbers of points."
    assert words in page
    assert words in summary
    figures = json.loads(re.search(r'id="figures">(.*)</script>', page)[1])
    assert len(figures[0]["data"]) == 2 * RUNS
    assert section(summary, "Runs").count("\n| ") == RUNS + 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.94, "59.9 s"), (119.6, "2 min 0 s"), (3599.7, "1 h 0 min"), (7385, "2 h 3 min"), (90061, "25 h 1 min")],
)
def test_a_time_has_no_sixty_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_folder_is_not_replaced_by_the_page(tmp_path: Path) -> None:
    write(tmp_path / "run", {"train/loss": {0: 1.0}})
    for name in ("out.html", "other.md"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.txt").write_text("kept")
        with pytest.raises(ValueError, match=rf"Expected files to write at .* Got the folder .*{name}"):
            report([str(tmp_path / "run")], str(tmp_path / name.replace(".md", ".html")))
        assert (tmp_path / name / "data.txt").read_text() == "kept"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Expected a place to write"):
        report([str(tmp_path / "run")], str(tmp_path / "file" / "report.html"))
