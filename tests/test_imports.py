"""What importing the package imports, and that names which are imported late are found."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_namo

HEAVY = ("lightning", "jsonargparse", "tokenizers", "tensorboard", "transformers", "torchmetrics", "yaml")


def test_plain_pytorch_imports_torch_only() -> None:
    program = f"""
import sys
from lightning_namo import NAMO, build_optimizer, clip_gradients, split_parameters
print([name for name in {HEAVY} if name in sys.modules])
import torch
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
optimizer = build_optimizer(model, NAMO)
model(torch.ones(5, 3)).sum().backward()
clip_gradients(model, max_norm=1.0)
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
print([name for name in {HEAVY} if name in sys.modules])
import lightning_namo.cli, lightning_namo.gpt2.data.tokenize  # as the processes of `prepare` do
print("lightning" in sys.modules)
lightning_namo.OptimizerCallback
print("lightning" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.split("\n")[:4] == ["[]", "[]", "False", "True"]


def test_public_names_are_seen_by_dir_by_import_and_by_type_checkers() -> None:
    assert set(lightning_namo.__all__) <= set(dir(lightning_namo))
    assert all(getattr(lightning_namo, name) is not None for name in lightning_namo.__all__)
    tree = ast.parse(Path(lightning_namo.__file__).read_text(encoding="utf-8"))
    seen = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(lightning_namo.__all__) <= seen, "a type checker reads imports, also those under TYPE_CHECKING"
    with pytest.raises(AttributeError, match="'lightning_namo' has no attribute 'Adam'"):
        lightning_namo.Adam  # noqa: B018
