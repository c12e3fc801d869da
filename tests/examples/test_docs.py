"""What docs/own_rule.md and docs/noise.md show is what runs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

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
