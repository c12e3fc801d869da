"""What the pages of docs show is what runs."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import nn

from lightning_namo import NAMO, OptimizerCallback
from lightning_namo.cli import main
from tests.helpers.launch import free_port
from tests.helpers.messages import EXEMPT, messages, pattern, quoted
from tests.helpers.optimizers import randn
from tests.helpers.paths import ROOT
from tests.helpers.rules import NorMuon

IMPORTS = "from functools import partial\n\nimport torch\n\n"


def test_the_rule_on_the_page_is_that_of_the_example_and_passes_the_tests_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "own_rule.md").read_text(encoding="utf-8")
    (tmp_path / "page.py").write_text(IMPORTS + "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    spec = importlib.util.spec_from_file_location("page", tmp_path / "page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "page", module)
    spec.loader.exec_module(module)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    trained = []
    for cls in (module.NorMuon, NorMuon):
        p = nn.Parameter(randn(6, 4))
        optimizer = cls([p], lr=0.1)
        for step in range(3):
            p.grad = randn(6, 4, seed=step + 1)
            optimizer.step()
        trained.append((p.detach(), optimizer.state[p]["v"]))
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


def test_the_noise_scale_is_measured_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "noise.md").read_text("utf-8"), re.DOTALL)
    torch.manual_seed(0)
    exec(snippet, {})
    scale, fraction = (float(value) for value in re.findall(r"tensor\((.*?)\)", capsys.readouterr().out))
    assert scale > 0
    assert 0 < fraction < 1


def test_the_learning_rates_of_the_optimizers_page_are_tried(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class LitModel(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = self.net(batch[0]).square().mean()
            self.log("train_loss", loss)
            return loss

    (snippet,) = snippets("optimizers.md")
    quiet = f"default_root_dir={str(tmp_path)!r}, logger=False, enable_progress_bar=False, max_steps=3"
    names = {"L": pl, "partial": partial, "NAMO": NAMO, "OptimizerCallback": OptimizerCallback, "LitModel": LitModel}
    data = torch.utils.data.TensorDataset(torch.ones(8, 4))
    exec(snippet.replace("max_steps=300", quiet), {**names, "loader": torch.utils.data.DataLoader(data)})
    losses = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("0.")]
    assert [float(lr) for lr, _ in losses] == [0.0015, 0.004, 0.012, 0.036, 0.1]
    assert len({loss for _, loss in losses}) == 5


def test_the_spectra_page_s_loop_prints_its_readings(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, loop = snippets("spectra.md")
    exec(trainer, {})
    exec(loop, {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = [(step, f"{layer}.weight") for step in (4, 9, 14) for layer in (2, 0)]
    assert [(int(step), name) for step, name, _, _ in rows] == expected
    assert all(0 < float(ratio) < 1 and -1 <= float(alignment) <= 1 for _, _, ratio, alignment in rows)


def test_the_spectra_page_s_command_is_a_layer_that_keeps_the_callbacks(
    capsys: pytest.CaptureFixture[str], kept_parsers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = snippets("spectra.md", "bash")
    with pytest.raises(SystemExit):
        main([*shlex.split(command)[1:], "--print_config"])
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
    assert names.count("SpectralMonitor") == 1
    assert {"RichProgressBar", "ModelCheckpoint", "TokenThroughput", "RunSummary"} < set(names)


def snippets(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(5), ids=["transformers", "accelerate", "peft", "litgpt", "lightning_cli"])
def test_other_frameworks_train_as_the_page_says(number: int, tmp_path: Path) -> None:
    codes = snippets("frameworks.md")
    assert len(codes) == 5
    (tmp_path / "my_cli.py").write_text(codes[number], encoding="utf-8")
    (command,) = snippets("frameworks.md", "bash")
    arguments = shlex.split(command)[2:] if number == 4 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "my_cli.py", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    if number == 0:
        assert (tmp_path / "out" / "checkpoint-8" / "optimizer.pt").exists()
    if number > 2:
        assert "matrices" in run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", ["fsdp2", "tensor_parallel"])
def test_a_module_of_one_s_own_trains_under_a_strategy_as_the_page_says(page: str, tmp_path: Path) -> None:
    (code,) = snippets(f"strategies/{page}.md")
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": str(free_port())}
    run = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 matrices" in run.stdout + run.stderr


@pytest.mark.parametrize("command", snippets("routing.md", "bash")[0].splitlines())
def test_the_routing_page_s_commands_run(command: str, capsys: pytest.CaptureFixture[str], kept_parsers: None) -> None:
    path = {"configs/gpt2_small.yaml": str(ROOT / "configs" / "gpt2_small.yaml")}
    path["my_package.MyModel"] = "tests.cli.test_routes.Looks"
    main([path.get(word, word) for word in shlex.split(command)[1:]])
    assert "matrices" in capsys.readouterr().out


def test_the_routing_page_counts_the_tables() -> None:
    (count,) = re.findall(r"The tables of (\d+) models", (ROOT / "docs" / "routing.md").read_text("utf-8"))
    assert int(count) == len(list((ROOT / "tests" / "data" / "routes").iterdir()))


def test_the_versions_page_and_the_readme_have_the_package_s_bounds_and_what_the_tests_run_with() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = next(d.removeprefix("torch>=") for d in needed if d.startswith("torch>="))
    (tested,) = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"torch {oldest} or later" in (ROOT / "README.md").read_text()
    page = (ROOT / "docs/versions.md").read_text()
    assert re.search(rf"^\| torch \| {re.escape(oldest)} and later \| .*\b{re.escape(tested)}\b", page, re.MULTILINE)


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_package_each_once() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").partition("## Questions")[0]
    quotes = [(quote, pattern(quote)) for quote in quoted(page)]
    said = [message for message in messages() if (message.file, message.text) not in EXEMPT]
    assert len(said) > 200
    entries = [(message, [quote for quote, of in quotes if of.match(message.text)]) for message in said]
    lacking = [f"{message}" for message, found in entries if not found]
    assert not lacking, "without an entry on the page:\n" + "\n".join(lacking)
    several = [f"{message}: {found}" for message, found in entries if len(found) > 1]
    assert not several, "with several entries on the page:\n" + "\n".join(several)
    unsaid = [quote for quote, of in quotes if not any(of.match(message.text) for message in said)]
    assert not unsaid, "on the page, but not in the package:\n" + "\n".join(unsaid)


def test_no_exemption_from_the_troubleshooting_page_is_out_of_date() -> None:
    assert EXEMPT.keys() <= {(message.file, message.text) for message in messages()}
