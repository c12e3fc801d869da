"""Going on from the checkpoint of another optimizer."""

import copy
import functools
import warnings

import pytest
import torch

from lightning_namo import NAMO, NAMOD, AdaMuon, Muon, OptimizerCallback, WarmupStableDecay
from tests.helpers import toy
from tests.helpers.checkpointed import Model, assert_same_state, build_exact, other_model, step, trained
from tests.helpers.optimizers import EXACT, through_a_file
from tests.helpers.toy import assert_same

SOURCES = [(torch.optim.AdamW, "exp_avg", 0.9), (Muon, "momentum_buffer", 0.95), (NAMO, "momentum_buffer", 0.95)]


@pytest.mark.parametrize(("source", "key", "decay"), SOURCES, ids=lambda s: getattr(s, "__name__", ""))
def test_the_momentum_of_another_optimizer_counts_as_the_gradient_of_a_first_step(source, key, decay):
    model = Model()
    saved = through_a_file(trained(source, model).state_dict())
    optimizer = build_exact(model, NAMOD, lr=0.125, adopt_state=True)
    with pytest.warns(UserWarning, match=r"Taken over: the momentum of 3 matrices.*whole state of 6 AdamW .* none"):
        optimizer.load_state_dict(saved)
    theirs = build_exact(Model(), source)
    theirs.load_state_dict(saved)
    ids = {n: i for g in saved["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    for name, parameter in model.named_parameters():
        state, before = optimizer.state.get(parameter), saved["state"].get(ids.get(name))
        if name in ("qkv.weight", "conv.weight", "out.weight"):
            first_gradient = before[key] / (1 - decay**5)
            torch.testing.assert_close(state["momentum_buffer"], 0.05 * first_gradient)
            assert state["step"] == 1
            total = state["v"].sum() / 0.01
            torch.testing.assert_close(total, first_gradient.square().sum(), rtol=1e-5, atol=0)
        elif state is not None:
            assert_same(state, before)
    assert all(group["lr"] == 0.125 for group in optimizer.param_groups)
    weights = copy.deepcopy(model.state_dict())
    step(optimizer, model, 9)
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, weights[n])
        for n, p in model.named_parameters()
        if p.requires_grad
    )


@pytest.mark.parametrize("cls", [Muon, AdaMuon])
def test_optimizers_without_bias_correction_take_the_momentum_as_it_is(cls):
    model = Model()
    source = trained(torch.optim.AdamW, model)
    optimizer = build_exact(model, cls, adopt_state=True)
    with pytest.warns(UserWarning, match="Taken over"):
        optimizer.load_state_dict(source.state_dict())
    expected = source.state[model.out.weight]["exp_avg"] / (1 - 0.9**5)
    torch.testing.assert_close(optimizer.state[model.out.weight]["momentum_buffer"], expected)


def test_a_plain_adamw_without_names_is_read_in_the_order_of_the_module():
    model = Model()
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    step(plain, model, 0)
    optimizer = build_exact(model, NAMO, adopt_state=True)
    with pytest.warns(UserWarning, match="the momentum of 3 matrices"):
        optimizer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(
        optimizer.state[model.out.weight]["momentum_buffer"], 0.05 * model.out.weight.grad, rtol=1e-4, atol=1e-6
    )


def test_what_has_no_momentum_starts_anew_and_is_named():
    model = Model()
    saved = trained(torch.optim.SGD, model).state_dict()
    optimizer = build_exact(model, NAMO, adopt_state=True)
    with pytest.warns(UserWarning, match=r"momentum of 0 matrices.*state of 0 AdamW.*anew: .*qkv.weight.* 4 more"):
        optimizer.load_state_dict(saved)
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


def test_another_model_is_refused_even_then():
    optimizer = build_exact(Model(), NAMO, adopt_state=True)
    for saved in (build_exact(other_model(), torch.optim.AdamW).state_dict(), build_exact(Model(3), Muon).state_dict()):
        with pytest.raises(ValueError, match="another model"):
            optimizer.load_state_dict(saved)


def test_a_checkpoint_of_its_own_loads_as_ever_with_adopt_state():
    model = Model()
    saved = through_a_file(trained(NAMO, model).state_dict())
    optimizer = build_exact(model, NAMO, adopt_state=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), saved)


def test_only_our_optimizers_adopt():
    with pytest.raises(ValueError, match=r"adopt_state=True with a subclass of Orthog.* Got AdamW"):
        build_exact(Model(), torch.optim.AdamW, adopt_state=True)


def test_a_run_of_adamw_goes_on_with_namo_at_namos_learning_rate(tmp_path):
    schedule = WarmupStableDecay(warmup=2)
    adamw = OptimizerCallback(functools.partial(torch.optim.AdamW, lr=0.3), schedule=schedule)
    saver = toy.checkpoints(tmp_path)
    toy.fit(toy.Net(), adamw, saver, enable_checkpointing=True, max_epochs=1)
    callback = OptimizerCallback(functools.partial(NAMO, lr=0.01, **EXACT), schedule=schedule, adopt_state=True)
    trainer, module = toy.trainer(callback, max_epochs=2), toy.Net()
    with pytest.warns(UserWarning, match="NAMO goes on from another optimizer's checkpoint"):
        trainer.fit(module, ckpt_path=saver.best_model_path or str(next(tmp_path.glob("*.ckpt"))))
    assert trainer.global_step == 2 * toy.BATCHES
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.01]
    refused = toy.trainer(OptimizerCallback(functools.partial(NAMO, lr=0.01)), max_epochs=2)
    with pytest.raises(ValueError, match="pass adopt_state=True"):
        refused.fit(toy.Net(), ckpt_path=str(next(tmp_path.glob("*.ckpt"))))
