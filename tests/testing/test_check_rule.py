"""What authors of rules call: it passes what is right, and says in their words what is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lightning_namo.optim import OrthogonalizedOptimizer, Polar, Sum
from lightning_namo.testing import check_rule
from tests import reference
from tests.helpers.rules import RULES, MuonH, NorMuon


@pytest.mark.parametrize("cls", RULES.values())
def test_a_right_rule_passes(cls: Any) -> None:
    check_rule(cls)


class Base(OrthogonalizedOptimizer):
    """Muon, for rules with a mistake."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True})

    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr)


class MeanOverTheStack(Base):
    state: Any = {"v": "matrix"}

    def rule(self, x: Any, h: Any) -> Any:
        (squares,) = yield Sum(x.square_sum(x.grad))
        x.v = 0.9 * x.v + 0.1 * squares
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr * (x.v / x.v.mean()).sqrt())


class CountsOnSelf(Base):
    steps = 0

    def rule(self, x: Any, h: Any) -> Any:
        self.steps = self.steps + 1
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr / self.steps)


class KeepsElementsOnSelf(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        self.last = getattr(self, "last", 0.0) * 0.5 + O
        x.apply(self.last, h.lr)


class ForgetsToYield(Base):
    def rule(self, x: Any, h: Any) -> Any:
        x.apply(Polar(x.advance(h)), h.lr)
        yield Polar(x.momentum)


class NormOfItsShard(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(functional.normalize(O, dim=-1), h.lr)


class SumThatWasNotAskedFor(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr / x.square_sum(O))


class ReducesItsShard(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr / O.square().sum())


class DividesByZero(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        (squares,) = yield Sum(x.square_sum(O))
        x.apply(O, h.lr / squares.sqrt())


class SpreadsNoNumber(Base):
    state: Any = {"v": "row"}

    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        (x.v,) = yield Sum(x.row_square_sum(O))
        x.apply(O / (x.v.sqrt() + 1e-8), h.lr)


class DrawsNumbers(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h) + 0.1 * torch.randn_like(x.momentum))
        x.apply(O, h.lr)


class DecidesByNumbers(Base):
    def rule(self, x: Any, h: Any) -> Any:
        (squares,) = yield Sum(x.square_sum(x.grad))
        if bool((squares > 1).all()):
            (squares,) = yield Sum(x.square_sum(x.weight))
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr * squares.clamp(max=1.0))


class ConvertsItsRate(Base):
    """Reads the device in every step, and is right on the CPU; a tensor of the host takes another path."""

    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr if isinstance(h.lr, float) else 1.0)


class FloatOfItsRate(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, float(h.lr))


class RateOfItsDefaults(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr, decay=1 - h.lr * h.lr / self.defaults["lr"])


class RateOfTheFirstGroup(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, self.param_groups[0]["lr"])


class HighestRate(Base):
    peak = 0.0

    def rule(self, x: Any, h: Any) -> Any:
        self.peak = max(self.peak, h.lr)
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr, decay=1 - h.lr * h.lr / self.peak)


class RateOnSelf(Base):
    def rule(self, x: Any, h: Any) -> Any:
        self.rate = h.lr
        O = yield Polar(x.advance(h))
        x.apply(O, self.rate)


class MeanLateOn(Base):
    def rule(self, x: Any, h: Any) -> Any:
        (squares,) = yield Sum(x.square_sum(x.grad))
        O = yield Polar(x.advance(h))
        x.apply(O, torch.where(x.step <= 10, h.lr * x.step / 10, h.lr * squares / squares.mean()))


class InPlaceState(Base):
    state: Any = {"u": "element"}

    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.u.lerp_(O, 0.1)
        x.apply(x.u, h.lr)


class InPlaceNumbers(Base):
    state: Any = {"v": "row"}

    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        (squares,) = yield Sum(x.row_square_sum(O))
        x.v.lerp_(squares, 0.1)
        x.apply(O, h.lr)


class WritesTheWeight(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.weight -= h.lr * O


class ShapeOfElements(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        m, n = O.shape
        x.apply(O, h.lr * m / n)


class ProductOfElements(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O @ O, h.lr)


class AnswersInOne(Base):
    def rule(self, x: Any, h: Any) -> Any:
        squares = yield Sum(x.square_sum(x.grad))
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr / squares.sqrt())


class TensorOnTheHost(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr * torch.stack([torch.ones(()), x.step.max()]).mean())


class YieldsElements(Base):
    def rule(self, x: Any, h: Any) -> Any:
        yield x.advance(h)


class RemembersTheGradient(Base):
    """Keeps elements of one step for the next in a variable."""

    def rule(self, x: Any, h: Any) -> Any:
        last = self.__dict__.setdefault("last", {}).get(x.shape, 0.0)
        self.last[x.shape] = (
            float(torch.linalg.vector_norm(x.momentum.stacked())) if x.step.device.type == "cpu" else 0.0
        )
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr * (1 + last))


class NeverApplies(Base):
    def rule(self, x: Any, h: Any) -> Any:
        yield Polar(x.advance(h))


class LacksAKey(Base):
    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr / (1 + h.beta2))


class MixesUpTheAxes(Base):
    state: Any = {"v": "column"}

    def rule(self, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        (squares,) = yield Sum(x.row_square_sum(O))
        x.v = squares.mT
        x.apply(O, h.lr)


class HoldsTheGradient(Base):
    def rule(self, x: Any, h: Any) -> Any:
        G = x.grad.clone()
        yield Sum(x.square_sum(x.grad))
        O = yield Polar(x.advance(h))
        x.apply(O + 0.1 * G, h.lr)


MISTAKES = [
    (MeanOverTheStack, "not trained beside other matrices of its shape as alone. .* keepdim=True"),
    (CountsOnSelf, r"not trained (beside|that went on from its state dict).*(self|declares)"),
    (KeepsElementsOnSelf, r"fails when it takes steps .*keep nothing on self.*Got self\.last: declare it"),
    (
        ForgetsToYield,
        r"fails when it takes steps .*elements as its direction but got a request, not its answer: O = yield Polar\(",
    ),
    (NormOfItsShard, r"not trained in shards, .*may not mix them .*norms over a dimension"),
    (SumThatWasNotAskedFor, r"fails when it takes steps .*asked for before it is used .* yield Sum\(part\)"),
    (ReducesItsShard, r"fails when it takes steps .*keep the shape of the elements.* yield Sum\(x.square_sum"),
    (DividesByZero, r"not finite after gradients of zero.*clamp\(min=eps\)"),
    (SpreadsNoNumber, r"fails when it takes steps .*x.spread\(number\)"),
    (DrawsNumbers, "not trained twice alike from the same start.* not on random numbers"),
    (DecidesByNumbers, "fails when it takes steps .*depend on hyper-parameters and shapes alone.*torch.where"),
    (ConvertsItsRate, "not trained with tensors as learning rate and weight decay as with floats"),
    (FloatOfItsRate, "fails when it takes steps with tensors as learning rate.*no number on the host"),
    (RateOfItsDefaults, "not trained that went on from its state dict|not trained beside another group"),
    (RateOfTheFirstGroup, "not trained beside another group as by itself"),
    (HighestRate, "not trained that went on from its state dict.*not on the optimizer"),
    (RateOnSelf, "not trained beside another group as by itself.*take turns"),
    (MeanLateOn, r"not trained beside other matrices .* as alone"),
    (InPlaceState, r"x.u, elements|got x.u\. Assign"),
    (InPlaceNumbers, r"x.v is zero after 4 steps.* x.v = ..."),
    (WritesTheWeight, r"Expected x.weight to be read only: x.apply"),
    (ShapeOfElements, r"Expected no shape of elements.* is x.shape"),
    (ProductOfElements, r"Expected no product of matrices of elements"),
    (AnswersInOne, r"to be unpacked before .sqrt: \(total,\) = yield"),
    (TensorOnTheHost, r"device=x.step.device"),
    (YieldsElements, r"yield Sum\(...\) or Polar\(...\) but it yielded elements"),
    (RemembersTheGradient, "not trained "),
    (NeverApplies, r"weights never change. A rule ends with x.apply"),
    (LacksAKey, "fails when it takes steps .*beta2"),
    (MixesUpTheAxes, r"fails when it takes steps .*x.v to (be set|have) .*"),
    (HoldsTheGradient, "fails when it takes steps .*held for the whole model"),
]


@pytest.mark.parametrize(("cls", "words"), MISTAKES)
def test_a_mistake_is_told_in_the_authors_words(cls: Any, words: str) -> None:
    check_rule(Base)
    with pytest.raises(AssertionError, match=rf"(?s)^{cls.__name__}.*{words}"):
        check_rule(cls)


def normuon(W: Tensor, gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    yield from reference.normuon(W, gradients, eta=1e-3)


def hyperball(W: Tensor, gradients: Iterable[Tensor]) -> Iterator[Tensor]:
    yield from reference.muon_hyperball(W, gradients, eta=0.01)


def test_a_reference_may_be_a_formula_or_an_optimizer() -> None:
    check_rule(partial(NorMuon, orthogonalizer="svd"), normuon)
    check_rule(partial(MuonH, orthogonalizer="svd"), hyperball)
    check_rule(partial(NorMuon, lr=0.01), partial(NorMuon, lr=0.01))
    with pytest.raises(AssertionError, match=r"NorMuon: after step 1 of a \(6, 4\) matrix its update is .* from the"):
        check_rule(partial(NorMuon, lr=0.002, orthogonalizer="svd"), normuon)
    muon = partial(torch.optim.Muon, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    check_rule(RULES["Muon"], muon)
    with pytest.raises(AssertionError, match=r"Muon: after step \d"):
        check_rule(RULES["Muon"], muon, rtol=1e-9)


class OwnStep(Base):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(TypeError, match="Expected OwnStep to be a rule, and to leave step to the engine"):
        check_rule(OwnStep)
    for wrong in (torch.optim.AdamW, partial(torch.optim.SGD, lr=0.1), "NAMO"):
        with pytest.raises(TypeError, match="subclass of OrthogonalizedOptimizer"):
            check_rule(wrong)  # type: ignore[arg-type]


class OwnRank(Base):
    """Right on one process only."""

    def rule(self, x: Any, h: Any) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr * (1 + rank))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_real_processes_are_compared_with_one() -> None:
    check_rule(NorMuon, processes=4)
    check_rule(partial(MuonH, lr=0.05), processes=2)
    with pytest.raises(AssertionError, match=r"OwnRank: a matrix is not trained under \w+ in 2 processes as in one"):
        check_rule(OwnRank, processes=2)


def test_real_processes_are_refused_where_they_cannot_be_had() -> None:
    class Local(Base):
        pass

    with pytest.raises(ValueError, match=r"a class that other processes can import.*Local.*top of a module"):
        check_rule(Local, processes=2)
    with pytest.raises(ValueError, match="2 to 4 processes but got 5"):
        check_rule(Base, processes=5)
