"""Models by name."""

from __future__ import annotations

import pytest

from lightning_namo.planning.models import build_model


@pytest.mark.parametrize(("model", "elements"), [("gpt2_small", 124_373_760), ("llama_7b", 6_738_415_616)])
def test_models_by_name_have_the_published_sizes(model: str, elements: int) -> None:
    assert sum(parameter.numel() for parameter in build_model(model).module.parameters()) == elements
