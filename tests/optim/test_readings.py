"""What a rule reports: for whom, of what shape, and when not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_namo import NAMO, NAMOD, Muon, OrthogonalizedOptimizer, build_optimizer
from lightning_namo.optim import Polar, Sum
from lightning_namo.testing.layouts import Experts


class Reporting(OrthogonalizedOptimizer):
    """Reports one number of each kind."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0})

    def rule(self, x: Any, h: Any) -> Any:
        norm_sq, columns, rows = yield Sum(x.square_sum(x.grad), x.column_square_sum(x.grad), x.row_square_sum(x.grad))
        O = yield Polar(x.advance(h))
        x.report(norm_sq=norm_sq, columns=lambda: columns, rows=rows, one=0.5, steps=lambda: x.step)
        x.apply(O, step_size=h.lr)


def stepped(optimizer: OrthogonalizedOptimizer, keep: bool = True) -> dict[str, dict[str, Tensor]]:
    optimizer.keeps_readings = keep
    optimizer.step()
    return optimizer.readings()


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=generator)
    return p


@pytest.mark.parametrize("batched", [None, True])
def test_numbers_of_matrices_columns_and_rows(batched: bool | None) -> None:
    params = [parameter(5, 3, seed=seed) for seed in range(3)]
    optimizer = Reporting([(f"w{i}", p) for i, p in enumerate(params)])
    optimizer.batched = batched
    found = stepped(optimizer)
    assert set(found) == {"norm_sq", "columns", "rows", "one", "steps", "step", "skipped"}
    for i, p in enumerate(params):
        squares = p.grad.square()
        torch.testing.assert_close(found["norm_sq"][f"w{i}"], squares.sum().view(1))
        torch.testing.assert_close(found["columns"][f"w{i}"], squares.sum(dim=0).view(1, 3))
        torch.testing.assert_close(found["rows"][f"w{i}"], squares.sum(dim=1).view(1, 5))
        assert found["one"][f"w{i}"].tolist() == [0.5]
        assert found["steps"][f"w{i}"].tolist() == found["step"][f"w{i}"].tolist() == [1.0]


@pytest.mark.parametrize("blocks", [[2, 2, 2], [4, 2], [1, 5], [5, 1]])
def test_blocks_have_a_number_each_and_rows_as_many_as_the_highest(blocks: list[int]) -> None:
    p = parameter(6, 3)
    found = stepped(Reporting([{"params": [("w", p)], "blocks": blocks}]))
    parts = torch.split(p.grad.square(), blocks)
    torch.testing.assert_close(found["norm_sq"]["w"], torch.stack([part.sum() for part in parts]))
    torch.testing.assert_close(found["columns"]["w"], torch.stack([part.sum(dim=0) for part in parts]))
    rows = found["rows"]["w"]
    assert rows.shape == (len(blocks), max(blocks))
    for i, part in enumerate(parts):
        torch.testing.assert_close(rows[i, : len(part)], part.sum(dim=1))
        assert rows[i, len(part) :].isnan().all()


def test_experts_have_a_number_each() -> None:
    torch.manual_seed(0)
    module = Experts(3, 5, 4)
    optimizer = build_optimizer(module, Reporting)
    ((name, p),) = [(name, p) for name, p in module.named_parameters() if p.dim() == 3][:1]
    for other in module.parameters():
        other.grad = torch.randn_like(other)
    found = stepped(optimizer)
    torch.testing.assert_close(found["norm_sq"][name], p.grad.square().sum(dim=(1, 2)))
    assert found["step"][name].shape == (1,)


def test_a_skipped_matrix_reads_nan_and_one_without_a_gradient_nothing() -> None:
    params = [parameter(5, 3, seed=seed) for seed in range(3)]
    params[1].grad[0, 0] = math.nan
    params[2].grad = None
    optimizer = NAMO([(f"w{i}", p) for i, p in enumerate(params)])
    stepped(optimizer)
    found = stepped(optimizer)
    assert found["step_scale"]["w0"].isfinite().all()
    assert found["step_scale"]["w1"].isnan().all()
    assert "w2" not in found["step_scale"]
    assert {name: value.item() for name, value in found["skipped"].items()} == {"w0": 0, "w1": 2}


def test_a_skipped_matrix_reads_nan_whatever_the_rule_reports() -> None:
    params = [parameter(5, 3, seed=seed) for seed in range(2)]
    params[1].grad[0, 0] = math.inf
    found = stepped(Muon([(f"w{i}", p) for i, p in enumerate(params)], lr=0.1))
    assert found["effective_step"]["w0"].item() > 0
    assert found["effective_step"]["w1"].isnan().all()


def test_nothing_is_computed_or_kept_unless_somebody_looks() -> None:
    class Costly(Reporting):
        called = 0

        def costly(self) -> float:
            Costly.called += 1
            return 1.0

        def rule(self, x: Any, h: Any) -> Any:
            O = yield Polar(x.advance(h))
            x.report(costly=self.costly)
            x.apply(O, step_size=h.lr)

    optimizer = Costly([("w", parameter(5, 3))])
    assert stepped(optimizer, keep=False) == {}
    at_the_trial = Costly.called  # before the first step, where mistakes are told
    assert stepped(optimizer, keep=False) == {}
    assert Costly.called == at_the_trial
    assert stepped(optimizer)["costly"]["w"].tolist() == [1.0]
    assert stepped(optimizer, keep=False) == {}  # none of an earlier step


def test_readings_change_no_step() -> None:
    for cls in (NAMO, NAMOD):
        weights = []
        for keep in (False, True):
            p = parameter(5, 3)
            optimizer = cls([("w", p)])
            for _ in range(3):
                stepped(optimizer, keep)
            weights.append(p.detach())
        assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (lambda x: x.grad, "the reading r to have numbers of matrices, columns or rows but got x.grad, elements"),
        (lambda x: x.square_sum(x.grad), "but got a part of a sum, which was not asked for"),
        (lambda x: "high", "but got 'high'"),
        (lambda x: torch.ones(7), r"to have numbers \(K, 1, 1\), \(K, 1, n\) or \(K, m, 1\)"),
    ],
)
def test_what_is_no_number_is_refused_before_the_first_step(reading: Any, words: str) -> None:
    class Wrong(Reporting):
        def rule(self, x: Any, h: Any) -> Any:
            x.report(r=lambda: reading(x))
            x.apply((yield Polar(x.advance(h))), step_size=h.lr)

    p = parameter(5, 3)
    with pytest.raises((TypeError, ValueError), match=words):
        Wrong([("w", p)]).step()
    assert not p.any()


def test_names_that_the_log_adds_are_refused() -> None:
    class Taken(Reporting):
        def rule(self, x: Any, h: Any) -> Any:
            x.report(noise_scale=1.0)
            x.apply((yield Polar(x.advance(h))), step_size=h.lr)

    with pytest.raises(ValueError, match="names of their own, but the log itself adds noise_scale"):
        Taken([("w", parameter(5, 3))]).step()


def test_a_reading_stays_what_it_was_when_the_rule_goes_on() -> None:
    class Writing(Reporting):
        def rule(self, x: Any, h: Any) -> Any:
            O = yield Polar(x.advance(h))
            number = torch.full_like(x.step, 2.0)
            x.report(number=number)
            x.apply(O, step_size=number.mul_(0))

    assert stepped(Writing([("w", parameter(5, 3))]))["number"]["w"].tolist() == [2.0]


def test_namo_d_reports_columns_and_how_many_are_at_a_clamp() -> None:
    p = parameter(6, 4)
    p.grad[:, 0] *= 1e3
    optimizer = NAMOD([("w", p)], lr=0.5, clamp=0.9, weight_decay=0.1, max_step=0.2)
    stepped(optimizer)
    p.grad[:, 1] = -p.grad[:, 1]
    p.grad[:, 2] = 0
    found = {name: value["w"][0] for name, value in stepped(optimizer).items()}
    assert found["step_scale"].shape == found["effective_step"].shape == (4,)
    ratio = found["step_scale"] / found["step_scale"].mean()
    assert ratio.min() >= 0.85  # the mean of clipped numbers is not that of free ones
    assert found["at_lower_clamp"] + found["at_upper_clamp"] >= 0.5
    assert found["effective_step"].max() == pytest.approx(0.2)
    assert found["at_cap"] == (found["effective_step"] >= 0.2).float().mean()
    torch.testing.assert_close(found["effective_decay"], 0.1 * (0.5 * found["step_scale"]).clamp(max=0.2))
