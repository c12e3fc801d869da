"""Output heads by role: tied, declared, called so at the top of a model, or the last Linear, which nothing follows."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lightning_namo import NAMO, build_optimizer
from lightning_namo.routing.candidates import Route
from lightning_namo.routing.split import split_parameters
from tests.helpers.zoo import GPT, frozen_backbone, groups_of, llama, reasons_of

LAST = "output head, the last Linear, which nothing follows"
TINY = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
TINY |= {"max_position_embeddings": 16, "pad_token_id": 0}


def routes_of(module: nn.Module, **routing: str) -> dict[str, Route]:
    return {route.name: route for route in split_parameters(module, **routing).routes}


def heads_of(module: nn.Module, **routing: str) -> dict[str, str]:
    """Weights that take AdamW as output heads, with the reason."""
    routes = routes_of(module, **routing).values()
    return {r.name: r.reason for r in routes if r.group == "adamw" and r.reason.startswith("output head")}


@pytest.mark.parametrize(("vocabulary", "width", "positions"), [(64, 8, 16), (8, 8, 8), (32, 8, 8), (16, 16, 4)])
def test_an_untied_head_is_found_whatever_the_widths(vocabulary: int, width: int, positions: int) -> None:
    model = GPT("untied", vocabulary, width, positions)
    assert heads_of(model) == {"lm_head.weight": "output head, called lm_head"}
    assert len(split_parameters(model)[0]["params"]) == 8


@pytest.mark.parametrize(("vocabulary", "width", "positions"), [(64, 8, 16), (64, 8, 8), (32, 8, 8), (8, 8, 8)])
def test_no_hidden_layer_is_taken_for_the_head_of_a_model_without_one(
    vocabulary: int, width: int, positions: int
) -> None:
    groups = split_parameters(GPT(None, vocabulary, width, positions))
    assert len(groups[0]["params"]) == 8
    assert all(route.confidence == "sure" for route in groups.routes)


@pytest.mark.parametrize("labels", [2, 3, 8, 10])
def test_a_classifier_is_a_head_however_many_classes_it_has(labels: int) -> None:
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=labels))  # which has two types of tokens
    assert heads_of(model) == {"classifier.weight": "output head, called classifier"}
    routes = routes_of(model)
    assert routes["classifier.weight"].confidence == "sure"
    assert (routes["bert.pooler.dense.weight"].group, routes["bert.pooler.dense.weight"].reason) == (
        "matrices",
        "matrix",
    )


@pytest.mark.parametrize("classes", [2, 10, 11])
def test_the_last_linear_is_a_head_whatever_is_beside_it(classes: int) -> None:
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))
    assert heads_of(model) == {"3.weight": LAST}
    assert routes_of(model)["3.weight"].confidence == "assumed"


@pytest.mark.parametrize(
    ("hidden", "doubt"), [(32, "as wide as an embedding is long"), (31, "nothing reads its 31 features")]
)
def test_a_layer_that_may_be_an_output_stays_a_matrix_but_is_to_be_checked(hidden: int, doubt: str) -> None:
    model = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, hidden), nn.Conv1d(1, 4, 3), nn.Linear(4, 7))
    routes = routes_of(model)
    assert (routes["1.weight"].group, routes["1.weight"].confidence) == ("matrices", "please check")
    assert routes["1.weight"].reason == f"matrix, {doubt}: an output?"
    assert heads_of(model) == {"3.weight": LAST}


def test_a_layer_that_a_later_linear_reads_is_hidden() -> None:
    model = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32))
    assert heads_of(model) == {"3.weight": LAST}
    assert routes_of(model)["1.weight"].confidence == "sure"


def test_a_head_without_a_name_before_a_value_head_is_to_be_checked() -> None:
    model = nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(8, 1))
    groups = split_parameters(model)
    assert heads_of(model) == {"3.weight": LAST}
    assert reasons_of(groups)["2.weight"] == "matrix, as wide as an embedding is long: an output?"
    assert str(groups).splitlines()[-1] == "Please check 1 of them: 2.weight."


@pytest.mark.parametrize("name", ["lm_head", "classifier", "score", "qa_outputs", "head", "value_head", "logits"])
def test_heads_are_known_by_their_names_at_the_top_of_a_model(name: str) -> None:
    body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model = nn.ModuleDict(OrderedDict([(name, nn.Linear(4, 9)), ("body", body)]))
    assert heads_of(model) == {f"{name}.weight": f"output head, called {name}"}
    assert heads_of(nn.ModuleDict({"net": model})) == {f"net.{name}.weight": f"output head, called {name}"}


def test_only_the_output_layer_of_a_head_is_one() -> None:
    roberta = RobertaForSequenceClassification(RobertaConfig(**TINY))  # classifier.dense, classifier.out_proj
    assert heads_of(roberta) == {"classifier.out_proj.weight": "output head, called classifier"}
    config = DistilBertConfig(vocab_size=40, dim=8, n_heads=2, hidden_dim=12, n_layers=1)
    distil = DistilBertForSequenceClassification(config)
    assert heads_of(distil) == {"classifier.weight": "output head, called classifier"}
    assert routes_of(distil)["pre_classifier.weight"].group == "matrices"
    modern = ModernBertForMaskedLM(ModernBertConfig(**TINY, tie_word_embeddings=False))
    assert heads_of(modern) == {"decoder.weight": "output head, declared by ModernBertForMaskedLM"}
    assert routes_of(modern)["head.dense.weight"].group == "matrices"  # a norm follows it


def test_each_of_several_heads_is_one() -> None:
    heads = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))})
    model = nn.ModuleDict({"heads": heads, "body": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
    called = "output head, called heads"
    assert heads_of(model) == {"heads.a.weight": called, "heads.b.2.weight": called}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.score, self.out = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)


@pytest.mark.parametrize("container", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_layers_of_blocks_are_hidden_whatever_their_names(container) -> None:
    assert heads_of(container([Block(), Block()])) == {}
    assert heads_of(nn.ModuleList([Block()])) == {}
    assert heads_of(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2)) == {}


def test_the_last_linear_is_hidden_where_something_follows_it() -> None:
    for follower in (nn.LayerNorm(4), nn.Conv1d(4, 4, 1)):
        assert heads_of(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), follower)) == {}
    assert heads_of(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Softmax(-1))) == {"1.weight": LAST}
    shared = nn.Linear(4, 4)
    assert heads_of(nn.Sequential(shared, nn.Linear(4, 4), shared)) == {}


def test_the_only_matrix_has_no_body_and_is_none() -> None:
    assert heads_of(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))) == {}


def test_a_pooler_or_projection_at_the_end_is_a_matrix_to_be_checked() -> None:
    model = BertModel(BertConfig(**TINY))
    assert heads_of(model) == {}
    route = routes_of(model)["pooler.dense.weight"]
    assert (route.confidence, route.reason) == ("please check", "matrix, the last layer, but called pooler: an output?")
    back = nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.Linear(9, 9))
    assert reasons_of(split_parameters(back))["2.weight"] == (
        "matrix, the last layer, but as wide as the model: an output?"
    )
    conv = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 2, 1))
    assert routes_of(conv)["1.weight"].confidence == "please check"


class DeclaresHead(nn.Module):
    def __init__(self, declares: bool | None) -> None:
        super().__init__()
        self.output, self.body, self.declares = nn.Linear(4, 7), nn.Linear(4, 4), declares
        self.norm = nn.LayerNorm(4)

    def get_output_embeddings(self) -> nn.Module | None:
        if self.declares is None:
            raise NotImplementedError
        return self.output if self.declares else None


@pytest.mark.parametrize(("declares", "group"), [(True, "adamw"), (False, "matrices"), (None, "matrices")])
def test_a_head_is_one_that_a_submodule_declares(declares: bool | None, group: str) -> None:
    groups = groups_of(split_parameters(nn.Sequential(DeclaresHead(declares))))
    assert (groups["0.output.weight"], groups["0.output.bias"]) == (group, "adamw")


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_llama_head_is_declared_and_its_norms_are_norms(tied: bool) -> None:
    reasons = reasons_of(split_parameters(llama(tied)))
    assert sum(reason == "matrix" for reason in reasons.values()) == 7
    assert reasons["model.norm.weight"] == reasons["model.layers.0.input_layernorm.weight"] == "norm"
    assert reasons.get("lm_head.weight") == (None if tied else "output head, declared by LlamaForCausalLM")


def test_outputs_of_other_nets_and_before_what_is_no_layer_are_to_be_checked() -> None:
    def mlp(outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, outputs))

    def checked(model: nn.Module) -> list[str]:
        return [route.name for route in split_parameters(model).routes if route.confidence == "please check"]

    critic = nn.ModuleDict({"actor": mlp(4), "critic": mlp(1)})
    assert checked(critic) == ["actor.2.weight"]
    assert heads_of(critic) == {"critic.2.weight": LAST}
    taught = nn.ModuleDict({"net": mlp(3), "teacher": mlp(3).requires_grad_(False)})
    assert checked(taught) == ["net.2.weight"]
    assert checked(nn.Sequential(*mlp(3), nn.PReLU())) == ["2.weight"]
    final = nn.ModuleDict({"linear": nn.Linear(8, 5), "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(8, 16))})
    assert checked(nn.ModuleDict({"body": mlp(8), "final_layer": final})) == [
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.weight",
    ]
    attention = nn.ModuleDict({"query": nn.Linear(8, 6), "key": nn.Linear(8, 6), "head": nn.Linear(8, 3)})
    assert checked(attention) == []


def test_a_head_may_have_several_outputs() -> None:
    head = nn.ModuleDict({"hidden": nn.Linear(8, 6), "cls": nn.Linear(6, 10), "box": nn.Linear(6, 4)})
    boxes = type("DetectionHead", (nn.Module,), {})()
    for name, layer in head.items():
        boxes.add_module(name, layer)
    model = nn.Module()
    model.body, model.head = nn.Linear(8, 8), boxes
    called = "output head, called head"
    assert heads_of(model) == {"head.cls.weight": called, "head.box.weight": called}
    adaptive = nn.ModuleDict({"body": nn.Linear(8, 8), "softmax": nn.AdaptiveLogSoftmaxWithLoss(8, 40, [10, 20])})
    assert [name.removeprefix("softmax.") for name in heads_of(adaptive)] == [
        "head.weight",
        "tail.0.1.weight",
        "tail.1.1.weight",
    ]


@pytest.mark.parametrize("package", ["torchvision.models.resnet", "timm.models.resnet", "mine.models"])
def test_fc_is_a_head_of_known_vision_families(package: str) -> None:
    """The class is a stand-in with the real one's name and module: torchvision has no CPU build for every torch."""

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.body, self.norm = nn.Linear(4, 7), nn.Linear(4, 4), nn.LayerNorm(4)

    ResNet.__module__ = package
    sharded = type("FSDPResNet", (ResNet,), {"__module__": "torch.distributed"})()  # as FSDP2 makes of it
    assert heads_of(sharded) == heads_of(ResNet())
    assert heads_of(ResNet()) == ({} if package == "mine.models" else {"fc.weight": "output head, called fc"})


def test_heads_are_matrices_for_those_who_want_it() -> None:
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 10))
    routes = routes_of(model, heads="matrix")
    assert (routes["2.weight"].group, routes["2.weight"].reason) == ("matrices", f"matrix, {LAST}")
    bert = BertForSequenceClassification(BertConfig(**TINY, num_labels=3))
    assert routes_of(bert, heads="matrix")["classifier.weight"].group == "matrices"
    assert routes_of(llama(tied=True), heads="matrix")["model.embed_tokens.weight"].group == "adamw"
    assert routes_of(llama(), heads="matrix")["lm_head.weight"].group == "matrices"
    assert heads_of(model, adamw="2.*", heads="matrix") == {}
    conv = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 2, 1))
    assert {route.confidence for route in routes_of(conv, heads="matrix").values()} == {"sure"}
    with pytest.raises(ValueError, match=r"Expected heads to be 'adamw' or 'matrix'. Got 'muon'."):
        split_parameters(model, heads="muon")


def test_a_head_is_trained_alone_while_all_matrices_are_frozen() -> None:
    model = frozen_backbone()
    model["hidden"].requires_grad_(False)
    groups = split_parameters(model)
    assert "Nothing is orthogonalized until frozen matrices are trained: AdamW trains the head alone." in str(groups)
    optimizer, head = build_optimizer(model, NAMO, lr=0.1, adamw_lr=0.01), model["head"]
    before = head.weight.detach().clone()
    for parameter in head.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(before - head.weight, torch.full_like(before, 0.01), rtol=1e-5, atol=0)
    model["hidden"].requires_grad_(True)
    optimizer.add_param_group({"params": list(model["hidden"].parameters())})
    assert [group["name"] for group in optimizer.param_groups] == ["adamw", "adamw_2", "matrices"]
    of_heads = build_optimizer(frozen_backbone(), NAMO, heads="matrix", adamw="hidden.weight")
    assert of_heads.param_groups[0]["param_names"] == ["head.weight"]


def test_a_head_alone_without_matrices_has_nothing_to_orthogonalize() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4))
    model.head = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="Use AdamW: build_optimizer has nothing to orthogonalize"):
        build_optimizer(model, NAMO)
