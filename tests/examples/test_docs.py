"""What docs/own_rule.md shows is what runs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from tests.examples.test_own_rule import normuon
from tests.helpers.optimizers import randn
from tests.helpers.paths import ROOT


def test_the_rule_on_the_page_is_that_of_the_example() -> None:
    page = (ROOT / "docs" / "own_rule.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    trained = []
    for cls in (names["NorMuon"], normuon()):
        p = nn.Parameter(randn(6, 4))
        optimizer = cls([p], lr=0.1)
        for step in range(3):
            p.grad = randn(6, 4, seed=step + 1)
            optimizer.step()
        trained.append((p.detach(), optimizer.state[p]["v"]))
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
