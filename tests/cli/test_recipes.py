"""Recipes by their names, from a checkout and from the wheel."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from lightning_namo.cli import main
from lightning_namo.cli.recipes import by_name, recipe
from tests.helpers.command_line import complaint
from tests.helpers.paths import CONFIGS, ROOT

pytestmark = pytest.mark.usefixtures("kept_parsers", "empty_folder")


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_every_file_has_a_name_and_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    printed = capsys.readouterr().out.splitlines()
    titles = [line for line in printed if not line.startswith("  ")]
    assert [title.partition(":")[0].partition(",")[0] for title in titles] == ["Recipes", "Layers", "Sweeps"]
    lines = [line.split(maxsplit=1) for line in printed if line not in titles]
    assert {name for name, _ in lines} == {
        str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")
    }
    assert [name for name, _ in lines][:4] == ["gpt2_large", "gpt2_medium", "gpt2_small", "quickstart"]
    assert all(10 < len(words) <= 110 and "lightning-namo" not in words for _, words in lines)


def test_fit_takes_names_as_it_takes_files(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--config", "gpt2_small", "--config=optim/namo_d", "-c", "strategy/fsdp2.yaml"]
    files = [f"--config={CONFIGS / name}.yaml" for name in ("gpt2_small", "optim/namo_d", "strategy/fsdp2")]
    assert printed(capsys, *names) == printed(capsys, *files)


def test_a_file_of_that_name_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quickstart").write_text("trainer: {max_steps: 7}")
    assert recipe("quickstart") == "quickstart"
    trainer = printed(capsys, "--config", "quickstart")["trainer"]
    assert isinstance(trainer, dict)
    assert trainer["max_steps"] == 7


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("quickstrat", "Nearest: quickstart, "),
        ("optim/namod", "Nearest: optim/namo_d, optim/namo"),
        ("fsdp2", "Nearest: strategy/fsdp2, "),
        ("configs/quickstart.yaml", "Nearest: quickstart. "),
        ("zzz.yaml", "Got 'zzz.yaml'. `lightning-namo recipes`"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(name: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "fit", "--config", name)
    assert said.startswith("Expected a file, or the name of a recipe. Got")
    assert nearest in said


def test_routes_plan_and_sweep_take_names(capsys: pytest.CaptureFixture[str]) -> None:
    main(["routes", "quickstart"])
    assert "16 matrices" in capsys.readouterr().out
    main(["plan", "--ranks", "8", "--config", "gpt2_small", "--json", "true"])
    assert json.loads(capsys.readouterr().out)
    main(["sweep", "sweeps/optimizers", "--print_jobs", "true"])
    jobs = capsys.readouterr().out.splitlines()
    assert len(jobs) == 15
    assert jobs[-1].startswith(
        "lightning-namo fit --config=quickstart --config=telemetry/spectra --config=optim/namo_d"
    )


def test_sweeps_name_recipes_that_are_there() -> None:
    for path in (CONFIGS / "sweeps").glob("*.yaml"):
        description = yaml.safe_load(path.read_text(encoding="utf-8"))
        layers = [*description["base"], *(grid["config"] for grid in description["grids"])]
        assert set(layers) <= set(by_name())


def test_one_is_copied_to_edit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "optim/muon"])
    assert capsys.readouterr().out.strip() == "muon.yaml"
    assert (tmp_path / "muon.yaml").read_bytes() == (CONFIGS / "optim" / "muon.yaml").read_bytes()
    assert "Expected the name of a new file. Got muon.yaml" in complaint(capsys, "recipes", "optim/muon")
    main(["recipes", "--name", "optim/muon", "--out", "mine.yaml"])
    assert (tmp_path / "mine.yaml").is_file()
    assert "Expected the name of the recipe to copy" in complaint(capsys, "recipes", "--out", "x.yaml")


@pytest.mark.slow
def test_the_wheel_works_without_a_checkout(tmp_path: Path) -> None:
    """In an environment of its own, beside what this one has installed; the package comes from the wheel alone."""

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=tmp_path, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("lightning_namo-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh")
    bin_ = tmp_path / "fresh" / "bin"
    site = Path(run(bin_ / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not read
    run(sys.executable, "-m", "pip", "--python", bin_ / "python", "install", "--quiet", "--no-deps", wheel)
    where = run(bin_ / "python", "-c", "import lightning_namo; print(lightning_namo.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert "quickstart" in run(bin_ / "lightning-namo", "recipes")
    options = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.callbacks=[]"]
    run(bin_ / "lightning-namo", "fit", "--config", "quickstart", "--config", "optim/namo", *options)
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))
    assert "16 matrices" in run(bin_ / "lightning-namo", "routes", "quickstart")
