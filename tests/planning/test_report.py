"""`lightning-namo plan`: the table, the configs it reads, and what it refuses."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_namo.cli import main
from lightning_namo.planning.models import MODELS
from lightning_namo.planning.simulated_mesh import LAYOUTS as NAMES
from tests.helpers.forked import run_python
from tests.helpers.paths import CONFIGS, ROOT

pytestmark = pytest.mark.usefixtures("empty_folder")


def layers(*names: str) -> Iterator[str]:
    return (f"--config={CONFIGS / name}.yaml" for name in names)


def as_json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    main(["plan", "--json=true", *options])
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("layout", NAMES)
def test_the_table_names_the_bound_the_formula_and_the_time(layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--ranks=16", f"--layout={layout}"])
    out = capsys.readouterr().out
    assert out.startswith(f"NAMO for gpt2_small on 16 ranks, {layout}: ")
    assert "Computed, not measured." in out
    assert re.search(r"busiest rank +\S+ +1\.0\d\d of the bound max\(total/R, largest\)", out)
    assert re.search(r"formula +19\.9 MB +2 \(R-1\)/R \* elements/R \* itemsize", out)
    assert re.search(r"step +[\d.]+ ms +overlapped; [\d.]+ ms if not", out)
    assert re.search(r"share of training +[\d.]+% +passes [\d.]+ ms \(491,520 tokens", out)


def test_owners_lists_every_matrix_with_its_rank(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--ranks=4", "--owners=true"])
    assert len(re.findall(r"^[0-3] +transformer\.h\.\S+ +\(\d+, \d+\)$", capsys.readouterr().out, re.MULTILINE)) == 48


@pytest.mark.parametrize(
    ("names", "grid", "tokens"),
    [
        (("quickstart",), (8, 1, 1), 8 * 16 * 128),  # "auto" is DDP on several devices
        (("quickstart", "strategy/fsdp2"), (1, 8, 1), 8 * 16 * 128),
        (("quickstart", "strategy/hsdp"), (2, 4, 1), 8 * 16 * 128),
        (("quickstart", "strategy/fsdp2_tp", "optim/muon"), (1, 4, 2), 4 * 16 * 128),
    ],
)
def test_layers_of_configs_give_the_model_of_fit_and_its_strategy(
    names: tuple[str, ...],
    grid: tuple[int, int, int],
    tokens: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = as_json(capsys, "--ranks=8", "--owners=true", *layers(*names))
    assert tuple(result["grid"].values()) == grid
    assert result["training_seconds"] == pytest.approx(6 * result["elements"] * tokens / (8 * 0.4 * 989e12))

    models: list[Any] = []

    @functools.wraps(pl.Trainer.fit)  # the command line reads the signature
    def record(trainer: pl.Trainer, model: Any, **_: Any) -> None:
        models.append(model)

    monkeypatch.setattr(pl.Trainer, "fit", record)
    main(["fit", *layers("quickstart"), "--trainer.logger=false", "--trainer.accelerator=cpu"])
    models[0].configure_model()
    parameters = dict(models[0].named_parameters())
    assert result["elements"] == sum(parameter.numel() for parameter in parameters.values())
    assert result["owners"].keys() <= parameters.keys()


def test_options_overrule_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    result = as_json(capsys, "--ranks=8", *layers("quickstart", "strategy/hsdp"), "--layout=fsdp2", "--model.n_layer=2")
    assert result["grid"] == {"replicas": 1, "shards": 8, "tensor": 1}
    assert result["matrices"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout=zero",), "Expected layout to be one of ddp, fsdp2, hsdp, fsdp2_tp. Got 'zero'."),
        (("--layout=hsdp", "--replicas=3"), r"Expected replicas \* tensor to divide the 8 ranks. Got 3 \* 1 = 3."),
        (("--layout=ddp", "--replicas=2"), "Expected replicas with hsdp or fsdp2_tp only. Got 2 with ddp."),
        (("--layout=fsdp2", "--tensor=2"), "Expected tensor with fsdp2_tp only. Got 2 with fsdp2."),
        (("--layout=fsdp2_tp", "--tensor=8"), "Expected tensor, 8, to divide the attention heads. Got 12 heads."),
        (("--model=gpt5",), "Expected model to be a LightningModule's class, .* or one of gpt2_small, .* Got 'gpt5'."),
        (("--model=gpt2-smal",), r".* Got 'gpt2-smal'\. Nearest: gpt2_small\."),
        ((*layers("quickstart", "strategy/fsdp1"),), r"Expected a recipe with DDP or .* Got FSDPStrategy; with FSDP"),
        ((*layers("quickstart", "optim/adamw"),), "Expected a subclass of OrthogonalizedOptimizer, .* Got AdamW."),
        (
            ("--model=tests.planning.test_report.Vectors",),
            "Expected a trainable matrix to orthogonalize in Vectors",
        ),
        (
            ("--model=tests.planning.test_report.Matrix", "--layout=fsdp2_tp"),
            "Expected a model that 2 tensor-parallel ranks",
        ),
    ],
)
def test_wrong_input_ends_with_one_message(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--ranks=8", *options])
    assert stop.value.code == 2
    assert re.search(f"error: {message}", capsys.readouterr().err)


class Vectors(pl.LightningModule):
    """A model without matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)


class Matrix(pl.LightningModule):
    """A model that tensor parallelism knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_the_tables_in_the_docs_are_what_the_script_writes() -> None:
    script = str(ROOT / "examples" / "benchmarks" / "scale_notes.py")
    done = run_python([script, "--models", "gpt2_small", "--ranks", "8", "64"])
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| gpt2_small")]
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert len(rows) == 4
    assert all(row in page for row in rows)
    assert all(f"| {model} |" in page for model in MODELS)
