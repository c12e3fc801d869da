"""Globs over the names of parameters: they overrule the routing, and divide matrices into blocks."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_namo.routing.candidates import Route
from lightning_namo.routing.split import split_parameters
from tests.helpers.zoo import GPT, ZOO, ViT, compiled, gpt2, groups_of, reasons_of


def test_globs_overrule_the_routing_in_both_directions() -> None:
    groups = split_parameters(ViT(), adamw=("mix", "patch.*"), orthogonalize="pos_embed")
    routes = {route.name: route for route in groups.routes}
    assert routes["mix"] == Route("mix", (8, 8), "adamw", "sure", "glob 'mix' in adamw")
    assert routes["patch.bias"].reason == "glob 'patch.*' in adamw"
    assert routes["pos_embed"].group == "matrices_batched"
    assert routes["pos_embed"].reason.startswith("glob 'pos_embed' in orthogonalize, 1 matrices 17 x 8, ")


def test_a_single_string_is_one_glob() -> None:
    by_string, by_tuple = (split_parameters(GPT(), adamw=globs) for globs in ("*.fc.weight", ("*.fc.weight",)))
    assert by_string.routes == by_tuple.routes
    assert groups_of(by_string)["blocks.1.fc.weight"] == "adamw"


def test_a_tied_parameter_matches_under_any_of_its_names() -> None:
    groups = split_parameters(GPT(), orthogonalize="lm_head.weight")
    assert groups_of(groups)["wte.weight"] == "matrices"
    assert reasons_of(groups)["wte.weight"] == "glob 'lm_head.weight' in orthogonalize, tied to lm_head.weight"


def test_globs_match_cleaned_names_only() -> None:
    assert groups_of(split_parameters(compiled(), adamw="blocks.1.fc.weight"))["blocks.1.fc.weight"] == "adamw"
    with pytest.raises(ValueError, match="no match"):
        split_parameters(compiled(), adamw="_orig_mod.*")


@given(globs=st.lists(st.sampled_from(["*", "blocks.*", "*.weight", "*.bias", "wte.*", "*.0.*", "*[12].fc*"])))
@settings(deadline=None, max_examples=50)
def test_adamw_globs_move_what_they_match_and_nothing_else(globs: list[str]) -> None:
    model = GPT()
    before = groups_of(split_parameters(model))
    expected = {
        name: "adamw" if any(fnmatchcase(name, glob) for glob in globs) else group for name, group in before.items()
    }
    if "matrices" in expected.values():
        assert groups_of(split_parameters(model, adamw=globs)) == expected
    else:
        with pytest.raises(ValueError, match="trainable matrix"):
            split_parameters(model, adamw=globs)


def test_equal_blocks_make_a_group_of_their_own() -> None:
    groups = split_parameters(GPT(), blocks={"*.qkv.weight": 3})
    assert [group["name"] for group in groups] == ["matrices_blocks_3", "matrices", "adamw"]
    assert groups[0]["blocks"] == 3
    assert len(groups[0]["params"]) == 2


def test_unequal_blocks_keep_their_order() -> None:
    groups = split_parameters(GPT(), blocks={"*.qkv.weight": (16, 4, 4)})
    assert groups[0]["name"] == "matrices_blocks_16_4_4"
    assert groups[0]["blocks"] == [16, 4, 4]


def test_blocks_of_a_transposed_parameter_are_its_stored_columns() -> None:
    groups = split_parameters(gpt2(), blocks={"*.c_attn.weight": [8, 12, 4], "*.c_fc.weight": 4})
    assert [group["name"] for group in groups] == [
        "matrices_transposed_blocks_8_12_4",
        "matrices_transposed",
        "matrices_transposed_blocks_4",
        "adamw",
    ]
    up = split_parameters(nn.ConvTranspose1d(2, 5, 3), blocks={"weight": 15})
    assert up[0]["name"] == "matrices_transposed_blocks_15"


@pytest.mark.parametrize("whole", [1, [24]])
def test_one_block_is_a_whole_matrix(whole: int | list[int]) -> None:
    groups = split_parameters(GPT(), blocks={"*.qkv.weight": whole})
    assert [group["name"] for group in groups] == ["matrices", "adamw"]


@given(
    rows=st.integers(1, 40),
    asked=st.one_of(st.integers(-1, 42), st.lists(st.integers(-3, 20), max_size=5)),
)
@settings(deadline=None)
def test_blocks_are_accepted_exactly_when_they_fill_the_rows(rows: int, asked: int | list[int]) -> None:
    module = nn.Linear(2, rows, bias=False)
    fits = (
        asked > 0 and rows % asked == 0
        if isinstance(asked, int)
        else sum(asked) == rows and all(size > 0 for size in asked)
    )
    if fits:
        blocks = split_parameters(module, blocks={"weight": asked})[0]["blocks"]
        assert blocks == (1 if asked == [rows] else asked)
    else:
        with pytest.raises(ValueError, match=f"weight to divide its {rows} rows"):
            split_parameters(module, blocks={"weight": asked})


@pytest.mark.parametrize("keyword", ["adamw", "orthogonalize", "blocks"])
def test_a_glob_that_matches_nothing_names_the_nearest_parameters(keyword: str) -> None:
    globs = {"*.qvk.weight": 3} if keyword == "blocks" else ["*.qvk.weight"]
    with pytest.raises(ValueError, match=rf"'\*.qvk.weight' in {keyword} .* Nearest: blocks.0.qkv.weight"):
        split_parameters(GPT(), **{keyword: globs})


def test_a_parameter_in_both_lists_is_named_with_both_globs() -> None:
    with pytest.raises(ValueError, match=r"on blocks.0.fc.weight, but got glob '\*.fc.\*' in adamw and glob '\*fc"):
        split_parameters(GPT(), adamw="*.fc.*", orthogonalize="*fc.weight")


def test_a_vector_or_a_complex_parameter_cannot_be_orthogonalized() -> None:
    with pytest.raises(ValueError, match=r"'\*qkv\*' in orthogonalize .* blocks.0.qkv.bias has shape \(24,\)"):
        split_parameters(GPT(), orthogonalize="*qkv*")
    with pytest.raises(ValueError, match=r"1.weight is complex"):
        split_parameters(ZOO["complex"](), orthogonalize="1.weight")


def test_blocks_for_what_is_no_matrix_say_where_it_went() -> None:
    with pytest.raises(ValueError, match=r"blocks.0.qkv.bias takes AdamW \(bias\)"):
        split_parameters(GPT(), blocks={"*.qkv.*": 3})
    with pytest.raises(ValueError, match=r"blocks.0.qkv.weight takes AdamW \(glob '\*.0.\*' in adamw\)"):
        split_parameters(GPT(), adamw="*.0.*", blocks={"*.qkv.weight": 3})


def test_two_blocks_globs_for_one_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match=r"for blocks.0.qkv.weight, but got \*.qkv.weight and \*.0.qkv.\*\."):
        split_parameters(GPT(), blocks={"*.qkv.weight": 3, "*.0.qkv.*": 3})


def test_blocks_that_do_not_fit_are_named_with_the_rows() -> None:
    with pytest.raises(ValueError, match=r"blocks.0.qkv.weight to divide its 24 rows .* Got \[16, 4\]\."):
        split_parameters(GPT(), blocks={"*.qkv.weight": [16, 4]})
    with pytest.raises(ValueError, match=r"c_attn.weight to divide its 24 rows .* Got 16\."):
        split_parameters(gpt2(), blocks={"*.c_attn.weight": 16})
