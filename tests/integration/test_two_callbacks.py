"""Two OptimizerCallbacks: in one Trainer they are refused; attached by hand, the second takes the first one's place."""

from __future__ import annotations

import warnings
from functools import partial

import lightning.pytorch as pl
import pytest

from lightning_namo import NAMO, Muon, OptimizerCallback
from tests.helpers.toy import Net, SgdNet, assert_same, fit

REPLACES = "replaces another OptimizerCallback"


def namo() -> OptimizerCallback:
    return OptimizerCallback(partial(NAMO, lr=0.02))


def muon() -> OptimizerCallback:
    return OptimizerCallback(partial(Muon, lr=0.03))


def own(module: pl.LightningModule) -> bool:
    """Whether the module has its own configure_optimizers, or none, as in its class."""
    return "configure_optimizers" not in vars(module)


@pytest.mark.parametrize("attached", [0, 1, 2])
@pytest.mark.parametrize("kind", [Net, SgdNet])
@pytest.mark.filterwarnings("ignore:OptimizerCallback replaces")
def test_two_in_one_trainer_are_refused_and_the_module_is_given_back(kind, attached):
    module, callbacks = kind(), [namo(), muon()]
    for callback in callbacks[:attached]:
        callback.attach(module)
    with pytest.raises(
        ValueError, match=r"Expected one OptimizerCallback in the Trainer but got 2.*Remove all but one"
    ):
        fit(module, *callbacks)
    assert own(module)
    assert_same(module, kind())


@pytest.mark.filterwarnings("ignore:OptimizerCallback replaces the")
def test_two_are_no_matter_where_nothing_is_trained():
    module = Net()
    pl.Trainer(callbacks=[namo(), muon()], logger=False, limit_val_batches=1, enable_progress_bar=False).validate(
        module, verbose=False
    )
    assert own(module)


@pytest.mark.parametrize("kind", [Net, SgdNet])
@pytest.mark.filterwarnings("ignore:OptimizerCallback replaces the")
def test_the_second_to_be_attached_replaces_the_first_with_a_warning(kind):
    module, expected = kind(), kind()
    first, second = namo(), muon()
    first.attach(module)
    with pytest.warns(UserWarning, match=f"{REPLACES} that was attached to {kind.__name__}"):
        second.attach(module)
    trained = fit(module, second)
    assert type(trained.optimizers[0]) is Muon
    fit(expected, muon())
    assert_same(module, expected)
    assert own(module)


@pytest.mark.filterwarnings("ignore:OptimizerCallback replaces the")
def test_a_method_of_the_instance_comes_back_after_two_were_attached():
    module = Net()
    method = partial(SgdNet.configure_optimizers, module)
    module.configure_optimizers = method
    first, second = namo(), muon()
    first.attach(module)
    with pytest.warns(UserWarning, match=REPLACES):
        fit(module, second)
    assert module.configure_optimizers is method


def test_one_that_is_attached_twice_is_no_matter():
    module, callback = Net(), namo()
    callback.attach(module)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        callback.attach(module)
        fit(module, callback)
    assert not any("OptimizerCallback replaces" in str(warning.message) for warning in found)
