"""What a step finds to differ, with numbers given; tests/distributed/test_parted.py has real ranks."""

from __future__ import annotations

import pytest
import torch

from lightning_namo.optim.step_agreement import StepAgreement
from lightning_namo.sharding.assignment import Matrix
from lightning_namo.sharding.exchange import Exchange
from lightning_namo.sharding.layout import Rectangle
from lightning_namo.sharding.publication import Published
from lightning_namo.workspace import Workspace

HYPER = [("matrices", {"lr": torch.tensor(0.1), "nesterov": True})]


@pytest.fixture
def agreement() -> StepAgreement:
    matrices = [Matrix(name, (2, 2), torch.float32, 4, Rectangle(0, 2, 0, 2)) for name in "ab"]
    exchange = Exchange(matrices, torch.device("cpu"), None, Published, Workspace())
    exchange.number = 0
    return StepAgreement(exchange, ["a", "b"], lambda: None)


def test_ranks_that_agree_go_on(agreement: StepAgreement) -> None:
    sums = agreement.numbers(HYPER, None, [])
    agreement.check(sums, [torch.tensor([False, False])], [], None)
    agreement.raise_disagreement(None)


def test_replicas_with_other_gradients_are_named(agreement: StepAgreement) -> None:
    sums = agreement.numbers(HYPER, None, [])
    with pytest.raises(RuntimeError, match=r"Expected the replicas of b to have the same gradient"):
        agreement.check(sums, [torch.tensor([False, True])], [], None)


def test_what_is_not_read_at_once_is_raised_when_asked_and_once(agreement: StepAgreement) -> None:
    agreement.alarm.at_once = False
    agreement.check(agreement.numbers(HYPER, None, []), [torch.tensor([True, False])], [], None)
    with pytest.raises(RuntimeError, match="the replicas of a to have"):
        agreement.raise_disagreement(None)
    agreement.raise_disagreement(None)


def test_a_rank_that_refuses_its_gradients_raises_its_own_reason(agreement: StepAgreement) -> None:
    agreement.alarm.at_once = False
    refusal = ValueError("Expected a dense gradient")
    agreement.check(agreement.numbers(HYPER, refusal, []), [], [], refusal)
    with pytest.raises(ValueError, match="Expected a dense gradient"):
        agreement.raise_disagreement(refusal)
