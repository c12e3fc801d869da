"""What importing the package costs, and that former modules and lazy names are found."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_namo
from lightning_namo._moved import MOVED, RENAMED

HEAVY = ("lightning", "jsonargparse", "tokenizers", "tensorboard", "transformers", "torchmetrics", "yaml")

FORMER = [  # a name or more of each former module
    "base.OrthogonalizedOptimizer",
    "callbacks.OptimizerCallback",
    "callbacks.SaveOnSigterm",
    "clipping.ClipsGradients",
    "clipping.GradientClipping",
    "clipping.clip_gradients",
    "consolidate.consolidate",
    "estimate.estimate",
    "factory.build_optimizer",
    "factory.optimize_with",
    "forecast.MODELS",
    "forecast.plan",
    "grid.Grid",
    "optimizers.AdaMuon",
    "optimizers.NAMOD",
    "orthogonalize.iteration_dtype",
    "orthogonalize.newton_schulz_flops",
    "orthogonalize.orthogonalize",
    "param_groups.clean_name",
    "param_groups.split_parameters",
    "regions.Block",
    "regions.Span",
    "run_card.RunCard",
    "schedules.WarmupStableDecay",
    "sweep.sweep",
    "gpt2.corpus.load_speeches",
    "gpt2.documents.find_files",
    "gpt2.encoding.Encoder",
    "gpt2.loaders.TrainLoader",
    "gpt2.openwebtext.openwebtext",
    "gpt2.prepare.prepare",
    "gpt2.prepare.train_tokenizer",
    "gpt2.streaming.StreamingTextDataModule",
    "gpt2.trained.load_network",
]


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


@pytest.mark.parametrize("path", FORMER)
def test_a_former_module_has_what_moved_and_names_the_new_place(path: str) -> None:
    module, _, name = f"lightning_namo.{path}".rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"{path} is lightning_namo\.") as warned:
        value = getattr(importlib.import_module(module), name)
    place, _, new_name = str(warned[0].message).split(" is ")[1].split(" now")[0].rpartition(".")
    assert value is getattr(importlib.import_module(place), new_name)
    assert new_name == RENAMED.get(name, name)
    assert warned[0].filename == __file__


def test_every_former_module_is_tried() -> None:
    assert {path.rpartition(".")[0] for path in FORMER} == set(MOVED)


def test_a_former_module_has_nothing_else_and_takes_no_public_name_s_place() -> None:
    import lightning_namo.orthogonalize
    import lightning_namo.schedules as schedules

    assert lightning_namo.orthogonalize is importlib.import_module("lightning_namo.polar.orthogonalize").orthogonalize
    with pytest.raises(AttributeError, match="no attribute 'Cosine'"):
        schedules.Cosine  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lightning_namo.nothing")
