"""`lightning-namo routes`: the table of a class or a recipe, without training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lightning_namo.cli import main
from tests.helpers.command_line import complaint
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.usefixtures("kept_parsers", "empty_folder")


class Looks(nn.Module):
    """A module whose constructor looks at numbers, which the meta device has not."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.body, self.head = nn.Linear(width, width), nn.Linear(width, 3)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["routes", *arguments])
    return capsys.readouterr().out


def test_a_class_of_transformers_takes_the_arguments_of_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "{num_labels: 3, num_hidden_layers: 1, hidden_size: 8, num_attention_heads: 2, intermediate_size: 12}"
    out = printed(capsys, "transformers.BertForSequenceClassification", "--arguments", sizes)
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert rows["classifier.weight"].endswith("adamw     sure        output head, called classifier")
    assert "3 x 8" in rows["classifier.weight"]
    assert rows["bert.encoder.layer.0.output.dense.weight"].endswith("matrices  sure        matrix")


def test_json_has_a_line_for_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "{embed_dim: 8, num_heads: 2}"
    found = json.loads(printed(capsys, "torch.nn.MultiheadAttention", "--arguments", sizes, "--json", "true"))
    assert found[0] == {
        "name": "in_proj_weight",
        "shape": [24, 8],
        "group": "matrices",
        "confidence": "sure",
        "reason": "matrix, fused: 3 blocks possible",
    }
    assert [row["name"] for row in found[1:]] == ["in_proj_bias", "out_proj.weight", "out_proj.bias"]


def test_a_recipe_is_routed_with_its_section_optim(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = str(ROOT / "configs" / "quickstart.yaml")
    assert "16 matrices (786,432 elements), 11 AdamW" in printed(capsys, recipe)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"optim": {"adamw": "*.c_fc.weight", "blocks": "auto"}}))
    layered = printed(capsys, recipe, "--config", str(tmp_path / "mine.yaml"))
    assert "12 matrices" in layered
    assert "glob '*.c_fc.weight' in adamw" in layered
    assert "matrices_blocks_3" in layered
    by_option = printed(capsys, recipe, "--optim.adamw", "*.c_fc.weight", "--optim.blocks", "auto")
    assert by_option == layered


def test_a_module_without_a_matrix_and_one_that_looks_at_numbers_have_tables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "2 parameters: 0 matrices" in printed(capsys, "torch.nn.LayerNorm", "--arguments", "{normalized_shape: 3}")
    assert "head.weight" in printed(capsys, "tests.cli.test_routes.Looks", "--arguments", "{width: 6}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["torch.nn.Nothing"],
            "Expected a config (YAML), a module's class or a function that makes one. Got 'torc",
        ),
        (
            ["torch.nn.Linear"],
            "Expected --arguments with which torch.nn.Linear can be made, as '{width: 8}'. Got:",
        ),
        (["torch.nn.ReLU", "--arguments", "{width: 8}"], "Expected --arguments with which torch.nn.ReLU can be made"),
        (["transformers.BertModel", "--arguments", "{num_lables: 3}"], "Got: BertConfig has no num_lables"),
        (["json.dumps", "--arguments", "{obj: 3}"], "Expected json.dumps to make a module. Got '3'."),
        (["torch.nn.Transformer", "--optim.adamw", "nothing"], "Expected 'nothing' in adamw to match a parameter"),
        (["torch.nn.Transformer", "--optim.heads", "muon"], "muon"),
    ],
)
def test_wrong_input_is_one_clear_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in complaint(capsys, "routes", *arguments)
