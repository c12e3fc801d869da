"""Former modules have what moved, with a warning that names its place."""

from __future__ import annotations

import importlib.util

import pytest

from lightning_namo._moved import MOVED, RENAMED

FORMER = [  # a name or more of each former module
    "adamw.AdamWStep",
    "adoption.warm_start_states",
    "agreement.Alarm",
    "base.OrthogonalizedOptimizer",
    "callbacks.OptimizerCallback",
    "callbacks.SaveOnSigterm",
    "checks.check_config",
    "clipping.ClipsGradients",
    "clipping.GradientClipping",
    "clipping.clip_gradients",
    "consolidate.consolidate",
    "consolidate.replacing",
    "estimate.estimate",
    "estimate.overlapped",
    "exchange.Exchange",
    "exchange.mean_over_ranks",
    "factory.build_optimizer",
    "factory.optimize_with",
    "forecast.MODELS",
    "forecast.plan",
    "grid.Grid",
    "grouped.GroupedOptimizer",
    "optimizers.AdaMuon",
    "optimizers.NAMOD",
    "orthogonalize.iteration_dtype",
    "orthogonalize.newton_schulz_polynomials",
    "orthogonalize.newton_schulz_flops",
    "orthogonalize.orthogonalize",
    "param_groups.Route",
    "param_groups.clean_name",
    "param_groups.split_parameters",
    "plan.assign_owners",
    "ranges.RANGES",
    "regions.Block",
    "regions.Region",
    "regions.Span",
    "regions.find_regions",
    "regions.local_tensor",
    "rules.bias_correction",
    "run_card.RunCard",
    "schedules.WarmupStableDecay",
    "sweep.sweep",
    "trained_module.TrainedModule",
    "gpt2.corpus.load_speeches",
    "gpt2.documents.Span",
    "gpt2.documents.find_files",
    "gpt2.encoding.Encoder",
    "gpt2.files.sha256",
    "gpt2.loaders.TrainLoader",
    "gpt2.openwebtext.openwebtext",
    "gpt2.parts.Job",
    "gpt2.prepare.prepare",
    "gpt2.prepare.train_tokenizer",
    "gpt2.streaming.StreamingTextDataModule",
    "gpt2.trained.load_network",
]


@pytest.mark.parametrize("path", FORMER)
def test_a_former_module_has_what_moved_and_names_the_new_place(path: str) -> None:
    module, _, name = f"lightning_namo.{path}".rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"{path} is lightning_namo\.") as warned:
        value = getattr(importlib.import_module(module), name)
    place, _, new_name = str(warned[0].message).split(" is ")[1].split(" now.")[0].rpartition(".")
    assert value is getattr(importlib.import_module(place), new_name)
    assert new_name == RENAMED.get(path, name)
    assert getattr(value, "__module__", place) in (place, "types", "typing"), "a module that only imports it is named"
    assert warned[0].filename == __file__


def test_every_former_module_is_tried_and_found_without_an_import() -> None:
    assert all(importlib.util.find_spec(f"lightning_namo.{name}") is not None for name in MOVED)
    assert {path.rpartition(".")[0] for path in FORMER} == set(MOVED)


def test_a_former_module_has_nothing_else_and_takes_no_public_name_s_place() -> None:
    import lightning_namo.orthogonalize
    import lightning_namo.schedules as schedules

    assert lightning_namo.orthogonalize is importlib.import_module("lightning_namo.polar.orthogonalize").orthogonalize
    with pytest.raises(AttributeError, match="no attribute 'Cosine'"):
        schedules.Cosine  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lightning_namo.nothing")


def test_a_star_takes_what_moved() -> None:
    names: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match="optim.muon.AdaMuon now"):
        exec("from lightning_namo.optimizers import *", names)
    assert {"NAMO", "NAMOD", "Muon", "AdaMuon"} <= set(names)
