"""Rules of one's own: what they compute, what the engine keeps for them, and what they are told when they are wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_namo import NAMO, AdaMuon, Muon
from lightning_namo.optim import OrthogonalizedOptimizer, Polar, Sum
from lightning_namo.optim.stack import MatrixParameter
from lightning_namo.optim.trial import scratch_of
from lightning_namo.sharding.layout import Layout, Rectangle
from tests.helpers.optimizers import randn
from tests.helpers.rules import RULES
from tests.reference import polar

EVERY = list(RULES.values())
SHAPES = [(6, 4)] * 3 + [(4, 6)] * 2 + [(5, 5), (8, 4)]


def optimizer_of(rule: Callable[..., Any], kinds: dict[str, str] | None = None, **hyper: Any) -> type:
    """A class of optimizers with a rule."""

    class Own(OrthogonalizedOptimizer):
        state: Any = kinds or {}

        def __init__(self, params: Any, lr: float = 0.1) -> None:
            defaults = {"lr": lr, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True, "orthogonalizer": "svd"}
            super().__init__(params, defaults | hyper)

    Own.rule = rule  # type: ignore[method-assign]
    return Own


def matrices(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """One of plain matrices, and one of three blocks, of which two are alike."""
    return [{"params": parameters[:-1]}, {"params": parameters[-1:], "blocks": [3, 3, 2], "name": "fused"}]


def gradient(parameter: Tensor, step: int, index: int) -> Tensor:
    return randn(*parameter.shape, seed=100 * step + index, dtype=parameter.dtype)


def trained(
    cls: type,
    batched: bool | None = None,
    steps: int = 3,
    change: Callable[[int, int, Tensor], Tensor | None] | None = None,
) -> tuple[list[nn.Parameter], OrthogonalizedOptimizer]:
    parameters = matrices()
    optimizer = cls(groups(parameters), lr=0.1, orthogonalizer="svd")
    optimizer.batched = batched
    for step in range(steps):
        for index, p in enumerate(parameters):
            grad = gradient(p, step, index)
            p.grad = grad if change is None else change(step, index, grad)
        optimizer.step()
    return parameters, optimizer


def assert_alike(one: tuple[Any, Any], other: tuple[Any, Any], **tolerance: float) -> None:
    for p, q in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        torch.testing.assert_close(one[1].state[p], other[1].state[q], **tolerance)


# --- what rules compute ---------------------------------------------------------------------------


def test_a_rule_after_the_paper_is_that_of_the_paper() -> None:
    """NorMuon's shape: a row statistic of the polar factor, and the norm of the update kept."""

    def rule(self: Any, x: Any, h: Any) -> Any:
        O = (yield Polar(x.advance(h))).to(x.v.dtype)
        (O_rows,) = yield Sum(x.row_square_sum(O))
        x.v = 0.5 * x.v + 0.5 * O_rows / x.shape[1]
        U = O * x.spread(1 / (x.v.sqrt() + 1e-8))
        (U_sq,) = yield Sum(x.square_sum(U))
        x.apply(U, h.lr / U_sq.sqrt(), decay=0.99)

    cls = optimizer_of(rule, {"v": "row"})
    p = nn.Parameter(randn(6, 4, dtype=torch.float64))
    optimizer, W, M, v = cls([p]), p.detach().clone(), torch.zeros(6, 4).double(), torch.zeros(6, 1).double()
    for step in range(4):
        p.grad = G = gradient(p, step, 0)
        optimizer.step()
        M = 0.9 * M + 0.1 * G
        O = polar(0.9 * M + 0.1 * G)
        v = 0.5 * v + 0.5 * O.square().mean(dim=1, keepdim=True)
        U = O / (v.sqrt() + 1e-8)
        W = 0.99 * W - 0.1 / U.norm() * U
    torch.testing.assert_close(p.detach(), W, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(optimizer.state[p]["v"], v[:, 0], rtol=1e-10, atol=1e-10)


def test_momentum_after_the_polar_factor_moves_toward_it() -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        O = yield Polar(x.grad)
        x.apply(x.advance(h, toward=O), h.lr)

    p = nn.Parameter(randn(5, 3, dtype=torch.float64))
    optimizer, W, M = optimizer_of(rule, nesterov=False)([p]), p.detach().clone(), torch.zeros(5, 3).double()
    for step in range(3):
        p.grad = gradient(p, step, 0)
        optimizer.step()
        M = 0.9 * M + 0.1 * polar(p.grad)
        W = W - 0.1 * M
    torch.testing.assert_close(p.detach(), W, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("reading", ["momentum", "grad", "look_ahead", "advance twice", "sum", "weight"])
def test_a_direction_is_the_same_whatever_is_read_before_it_departs(reading: str, nesterov: bool) -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        N = x.advance(h)
        if reading == "look_ahead":
            x.square_sum(x.look_ahead(h))
        elif reading == "advance twice":
            x.advance(h)
        elif reading == "sum":
            x.square_sum(N)
        else:
            x.square_sum(getattr(x, reading))
        O = yield Polar(N)
        x.apply(O, h.lr)

    def plain(self: Any, x: Any, h: Any) -> Any:
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr)

    one, other = (trained_of(rule_, 1, nesterov) for rule_ in (rule, plain))
    for p, q in zip(one, other, strict=True):
        assert torch.equal(p, q)


def trained_of(rule: Callable[..., Any], steps: int, nesterov: bool = True) -> list[nn.Parameter]:
    parameters = matrices()
    optimizer = optimizer_of(rule, nesterov=nesterov)(groups(parameters))
    for step in range(steps):
        for index, p in enumerate(parameters):
            p.grad = gradient(p, step, index)
        optimizer.step()
    return parameters


def test_the_gradient_may_be_read_in_every_part_of_a_rule() -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        (G_sq,) = yield Sum(x.square_sum(x.grad))
        O = yield Polar(x.advance(h))
        x.apply(x.grad * 0.5 + O, h.lr / (1 + G_sq))
        assert x.grad.dtype == O.dtype

    parameters, starts = trained_of(rule, 1), matrices()
    for index, (p, start) in enumerate(zip(parameters[:-1], starts, strict=False)):
        G = gradient(start, 0, index)
        expected = start - 0.1 / (1 + G.square().sum()) * (0.5 * G + polar(G))
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_what_is_made_of_the_gradient_can_be_kept() -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        yield Sum(x.square_sum(x.grad))
        kept = x.grad.to(torch.float32), x.momentum.contiguous(), x.weight.float()
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr)
        x.apply(kept[0] + kept[1] + kept[2], h.lr)

    for index, (p, start) in enumerate(zip(trained_of(rule, 1)[:-1], matrices(), strict=False)):
        G = gradient(start, 0, index)
        torch.testing.assert_close(p, start - 0.1 * (polar(G) + G + start), rtol=1e-5, atol=1e-6)


def one_step(rule: Callable[..., Any], kinds: dict[str, str] | None = None, blocks: Any = 1, **hyper: Any) -> Any:
    """A matrix and its optimizer after a step of a rule; its weight was W and its gradient G."""
    p = nn.Parameter(W.clone())
    optimizer = optimizer_of(rule, kinds, **hyper)([{"params": [p], "blocks": blocks}], lr=1.0)
    p.grad = G.clone()
    optimizer.step()
    return p.detach(), optimizer


W, G = randn(6, 4), randn(6, 4, seed=1)


@pytest.mark.parametrize("change", ["to", "mul_"])
def test_blocks_of_unequal_rows_do_not_share_what_is_made_of_their_polar_factors(change: str) -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        O = yield Polar(x.grad)
        x.apply(O.to(torch.float32) if change == "to" else O.mul_(1.0), h.lr)

    p, _ = one_step(rule, blocks=[4, 2])
    torch.testing.assert_close(p, W - torch.cat([polar(G[:4]), polar(G[4:])]), rtol=1e-5, atol=1e-5)


def test_a_polar_factor_may_be_held_over_another() -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        O = yield Polar(x.grad)
        yield Polar(O.flip(-1) * x.grad)
        x.apply(O, h.lr)

    def plain(self: Any, x: Any, h: Any) -> Any:
        O = yield Polar(x.grad)
        x.apply(O, h.lr)

    held, alone = (one_step(r, orthogonalizer="newton_schulz")[0] for r in (rule, plain))
    assert torch.equal(held, alone)


@pytest.mark.parametrize("blocks", [1, 2])
def test_numbers_that_were_read_stay_as_they_were(blocks: int) -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        yield Sum(x.square_sum(x.grad))
        old = x.a
        x.a = x.a + 1
        x.a, x.b = x.b, x.a
        O = yield Polar(x.advance(h))
        x.apply(O, old)

    p, optimizer = one_step(rule, {"a": "matrix", "b": "matrix"}, blocks)
    state = next(iter(optimizer.state.values()))
    assert torch.equal(p, W)
    assert (state["a"] == 0).all()
    assert (state["b"] == 1).all()


def in_place_number(self: Any, x: Any, h: Any) -> Any:
    yield Sum(x.square_sum(x.grad))
    x.v *= 0.5
    x.v += 1
    O = yield Polar(x.advance(h))
    x.apply(O, h.lr)


def in_place_elements(self: Any, x: Any, h: Any) -> Any:
    O = yield Polar(x.advance(h).sign_())
    x.u = x.u.mul(0.5).add_(O.square())
    x.apply(O.mul_(1.0), h.lr)


def not_finite_direction(self: Any, x: Any, h: Any) -> Any:
    yield Sum(x.square_sum(x.grad))
    x.v = x.v + 1
    O = yield Polar(x.advance(h) * x.spread(1 / x.v.sqrt()))
    x.apply(O, h.lr)


def spread_state(self: Any, x: Any, h: Any) -> Any:
    yield Polar(x.grad)
    x.rows = x.rows + 1
    x.apply(x.spread(x.rows), h.lr)


@pytest.mark.parametrize("shape", [(6, 4), (4, 1)])
@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize("rule", [in_place_number, in_place_elements, not_finite_direction, spread_state])
def test_no_rule_changes_a_matrix_that_is_not_valid(rule: Any, method: str, shape: tuple[int, int]) -> None:
    parameters = [nn.Parameter(randn(*shape, seed=i)) for i in range(2)]
    cls = optimizer_of(rule, {"v": "matrix", "rows": "row", "u": "element"}, orthogonalizer=method, nesterov=False)
    optimizer = cls(parameters)
    for step in range(3):
        for index, p in enumerate(parameters):
            p.grad = gradient(p, step, index)
        if step != 1:
            parameters[0].grad[0, 0] = nan
        before = parameters[0].detach().clone(), copy.deepcopy(optimizer.state_dict()["state"][0])
        optimizer.step()
        if step != 1:
            after = optimizer.state_dict()["state"][0]
            assert torch.equal(parameters[0], before[0])
            assert all(torch.equal(after[key], value) for key, value in before[1].items() if key != "skipped")
    assert all(p.isfinite().all() for p in parameters)


def test_methods_in_place_change_what_the_rule_has_only() -> None:
    p, optimizer = one_step(in_place_elements, {"v": "matrix", "rows": "row", "u": "element"}, nesterov=False)
    state = next(iter(optimizer.state.values()))
    torch.testing.assert_close(state["momentum_buffer"], 0.1 * G)
    torch.testing.assert_close(p, W - polar(G.sign()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_numbers_of_any_dtype_scale_as_numbers_do(dtype: torch.dtype) -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        O = yield Polar(x.grad)
        x.apply(O, torch.ones_like(x.step).to(dtype), decay=torch.ones_like(x.step).to(dtype))

    torch.testing.assert_close(one_step(rule)[0], W - polar(G), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [None, True])
def test_the_elements_of_a_mask_are_counted(batched: bool | None) -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        O = yield Polar(x.grad)
        (count,) = yield Sum(x.square_sum(O * x.grad > 0))
        (columns,) = yield Sum(x.column_square_sum(O * x.grad > 0))
        x.apply(O, count + columns.sum(dim=-1, keepdim=True))

    p = nn.Parameter(W.clone())
    optimizer = optimizer_of(rule)([p], lr=1.0)
    optimizer.batched = batched
    p.grad = G.clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), W - 2 * int((polar(G) * G > 0).sum()) * polar(G), rtol=1e-5, atol=1e-5)


def test_elements_that_are_not_equal_can_be_told() -> None:
    def rule(self: Any, x: Any, h: Any) -> Any:
        yield Polar(x.grad)
        x.apply(x.grad * (x.grad != 0), h.lr)

    assert torch.equal(one_step(rule)[0], W - G)


# --- what the engine keeps for them ---------------------------------------------------------------


@pytest.mark.parametrize("cls", EVERY)
def test_the_accelerators_path_gives_what_the_cpus_gives(cls: type) -> None:
    assert_alike(trained(cls, batched=True), trained(cls), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batched", [None, True])
@pytest.mark.parametrize("value", [nan, inf, 1e30])
@pytest.mark.parametrize("cls", EVERY)
def test_matrices_without_a_finite_gradient_stay_as_they_were(cls: type, value: float, batched: bool | None) -> None:
    def change(step: int, index: int, grad: Tensor) -> Tensor:
        if step == 1 and index in (1, 6):
            grad[0, 0] = value
        return grad

    spoilt, clean = trained(cls, batched, 1), trained(cls, batched, 1)
    for run, changed in ((spoilt, change), (clean, lambda step, index, grad: grad)):
        before = [(p.detach().clone(), copy.deepcopy(run[1].state_dict()["state"][i])) for i, p in enumerate(run[0])]
        for index, p in enumerate(run[0]):
            p.grad = changed(1, index, gradient(p, 1, index))
        run[1].step()
        if run is spoilt:
            for index in (1, 6):
                state = {key: value for key, value in run[1].state_dict()["state"][index].items() if key != "skipped"}
                assert torch.equal(run[0][index], before[index][0])
                assert all(torch.equal(value, before[index][1][key]) for key, value in state.items())
    assert spoilt[1].skipped_steps() == 2
    for index, (p, q) in enumerate(zip(spoilt[0], clean[0], strict=True)):
        assert torch.equal(p, q) == (index not in (1, 6))


@pytest.mark.parametrize("batched", [None, True])
@pytest.mark.parametrize("cls", EVERY)
def test_matrices_without_a_gradient_do_not_take_part(cls: type, batched: bool | None) -> None:
    def change(step: int, index: int, grad: Tensor) -> Tensor | None:
        return None if index in (1, 3) and step else grad

    some, every = trained(cls, batched, 3, change), trained(cls, batched, 3)
    first = trained(cls, batched, 1)
    for index, (p, q, r) in enumerate(zip(some[0], every[0], first[0], strict=True)):
        torch.testing.assert_close(p, r if index in (1, 3) else q, rtol=1e-6, atol=1e-7)
    assert some[1].skipped_steps() == 0
    assert [some[1].state[p]["step"].item() for p in some[0]] == [3, 1, 3, 1, 3, 3, 3]


@pytest.mark.parametrize("cls", EVERY)
def test_a_state_dict_loads_into_another_optimizer_and_a_copy_goes_on_alike(cls: type) -> None:
    parameters, optimizer = trained(cls, steps=2)
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = cls(groups(twins), lr=0.1, orthogonalizer="svd")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, of_copy = copy.deepcopy((parameters, optimizer))
    for run in ((parameters, optimizer), (twins, other), (copied, of_copy)):
        for step in (2, 3):
            for index, p in enumerate(run[0]):
                p.grad = gradient(p, step, index)
            run[1].step()
    for p, q, r in zip(parameters, twins, copied, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@pytest.mark.parametrize("cls", EVERY)
def test_what_is_saved_has_its_own_size(cls: type) -> None:
    _, optimizer = trained(cls, steps=1)
    for states in (optimizer.state_dict()["state"], pickle.loads(pickle.dumps(optimizer)).state):
        for state in states.values():
            assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def test_states_that_are_put_in_the_place_of_others_are_used() -> None:
    parameters, optimizer = trained(NAMO, steps=1)
    optimizer.state[parameters[0]]["momentum_buffer"] = torch.zeros(6, 4)
    for index, p in enumerate(parameters):
        p.grad = gradient(p, 1, index)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[parameters[0]]["momentum_buffer"], 0.05 * parameters[0].grad)


# --- what they are told ---------------------------------------------------------------------------


def no_polar(self: Any, x: Any, h: Any) -> Any:
    yield Sum(x.square_sum(x.grad))


def no_generator(self: Any, x: Any, h: Any) -> Any:
    x.advance(h)


def something_else(self: Any, x: Any, h: Any) -> Any:
    yield x.grad


def part_is_used(self: Any, x: Any, h: Any) -> Any:
    total = x.square_sum(x.grad)
    yield Polar(x.advance(h))
    x.apply(x.grad, total.sqrt())


def part_is_added(self: Any, x: Any, h: Any) -> Any:
    yield Polar(x.advance(h))
    x.apply(x.grad, 1 + x.square_sum(x.grad))


def number_meets_elements(self: Any, x: Any, h: Any) -> Any:
    (G_sq,) = yield Sum(x.square_sum(x.grad))
    yield Polar(x.advance(h) / G_sq)


def elements_for_a_number(self: Any, x: Any, h: Any) -> Any:
    O = yield Polar(x.advance(h))
    x.v = O


def writes_in_place(self: Any, x: Any, h: Any) -> Any:
    yield Polar(x.momentum.lerp_(x.grad, 0.1))


def local_reduction(self: Any, x: Any, h: Any) -> Any:
    O = yield Polar(x.advance(h))
    x.apply(O, h.lr * O.mean())


def not_declared(self: Any, x: Any, h: Any) -> Any:
    yield Polar(x.advance(h))
    x.second = x.v


def wrong_shape(self: Any, x: Any, h: Any) -> Any:
    O = yield Polar(x.advance(h))
    x.apply(O, x.step[0])


def rows_for_columns(self: Any, x: Any, h: Any) -> Any:
    (rows,) = yield Sum(x.row_square_sum(x.grad))
    yield Polar(x.advance(h))
    x.columns = rows


def held_over_a_request(self: Any, x: Any, h: Any) -> Any:
    N = x.look_ahead(h)
    yield Sum(x.square_sum(N))
    yield Polar(N)


def held_for_the_model(self: Any, x: Any, h: Any) -> Any:
    kept = x.grad * 1.0
    yield Sum(x.square_sum(x.grad))
    yield Polar(kept)


def no_hyper_parameter(self: Any, x: Any, h: Any) -> Any:
    O = yield Polar(x.advance(h))
    x.apply(O, h.rate)


def read_on_the_host(self: Any, x: Any, h: Any) -> Any:
    (squares,) = yield Sum(x.square_sum(x.grad))
    O = yield Polar(x.advance(h))
    x.apply(O, h.lr if squares.max() > 1 else 0.0)


def direction_is_a_number(self: Any, x: Any, h: Any) -> Any:
    yield Polar(x.v)


def read_after_a_write(self: Any, x: Any, h: Any) -> Any:
    O = yield Polar(x.advance(h))
    old = x.u
    x.u = O
    x.apply(O - old, h.lr)


def momentum_after_it_moved(self: Any, x: Any, h: Any) -> Any:
    M = x.momentum
    yield Polar(x.advance(h) - M)


def several_results(self: Any, x: Any, h: Any) -> Any:
    O = yield Polar(x.advance(h))
    x.apply(O, O.abs().max(dim=-1, keepdim=True).values)


def decision(self: Any, x: Any, h: Any) -> Any:
    if x.grad > 0:
        yield Polar(x.grad)


def out_of_a_function(self: Any, x: Any, h: Any) -> Any:
    yield Polar(torch.neg(x.grad, out=x.momentum))


def no_end(self: Any, x: Any, h: Any) -> Any:
    while True:
        yield Polar(x.grad)


MISTAKES = [
    (no_polar, ValueError, "Expected the rule of Own to ask for a polar factor"),
    (no_generator, TypeError, "Expected the rule of Own to be a generator"),
    (something_else, TypeError, r"Expected a rule to yield Sum\(...\) or Polar\(...\)"),
    (part_is_used, AttributeError, r"Expected a sum to be asked for before it is used \(sqrt\)"),
    (part_is_added, TypeError, r"Expected a sum to be asked for before it is used \(__radd__\)"),
    (number_meets_elements, TypeError, r"x.spread\(number\)"),
    (elements_for_a_number, TypeError, "Expected x.v to have numbers of matrices, columns or rows but got elements"),
    (writes_in_place, TypeError, r"Expected lerp_ to write elements of the rule's own, but got x.momentum"),
    (local_reduction, TypeError, "which are this rank's only"),
    (not_declared, AttributeError, r'got x.second. Declare it: state = \{"second": "element"\}'),
    (wrong_shape, ValueError, r"Expected step_size to have numbers \(K, 1, 1\)"),
    (rows_for_columns, ValueError, r"Expected x.columns to be set to numbers \(K, 1, 4\)"),
    (held_over_a_request, RuntimeError, "Expected elements to be used before the next yield"),
    (held_for_the_model, RuntimeError, "they would be held for the whole model"),
    (
        no_hyper_parameter,
        AttributeError,
        r"Expected the hyper-parameters to have rate, but there are .*lr.*\{\"rate\": ...\}",
    ),
    (read_on_the_host, TypeError, r"Expected the rule of Own to read no number on the host .*torch.where"),
    (direction_is_a_number, TypeError, "Expected Polar to be asked for elements"),
    (read_after_a_write, RuntimeError, "Expected elements to be used before x.u is written"),
    (momentum_after_it_moved, RuntimeError, "Expected elements to be used before x.momentum is written"),
    (several_results, TypeError, "which are this rank's only"),
    (decision, TypeError, "Expected a decision that all ranks take alike"),
    (out_of_a_function, TypeError, "Expected neg to make new elements"),
    (no_end, ValueError, "Expected the rule of Own to end"),
]


@pytest.mark.parametrize(("rule", "error", "words"), MISTAKES)
def test_a_mistake_is_told_before_anything_is_changed(rule: Any, error: type[Exception], words: str) -> None:
    p = nn.Parameter(randn(6, 4))
    optimizer = optimizer_of(rule, {"v": "matrix", "columns": "column", "u": "element"})([p])
    p.grad, before = randn(6, 4, seed=1), p.detach().clone()
    with pytest.raises(error, match=words):
        optimizer.step()
    assert torch.equal(p, before)
    assert not any(value.any() for value in optimizer.state[p].values())


def test_a_rule_may_yield_from_another_also_where_compiled_code_calls_the_step() -> None:
    def moved(x: Any, h: Any) -> Any:
        (squares,) = yield Sum(x.square_sum(x.grad))
        return (yield Polar(x.advance(h))), squares

    def rule(self: Any, x: Any, h: Any) -> Any:
        O, squares = yield from moved(x, h)
        x.apply(O, h.lr / (1 + squares))

    trained = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        p = nn.Parameter(W.clone())
        step = wrap(optimizer_of(rule)([p]).step)
        for _ in range(3):
            p.grad = G.clone()
            step()
        trained.append(p.detach())
    assert torch.equal(*trained)
    assert not torch.equal(trained[0], W)


def test_what_torch_and_lightning_read_must_be_given() -> None:
    class Bare(OrthogonalizedOptimizer):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})

    with pytest.raises(ValueError, match=r"Bare: expected super\(\).__init__ to be given momentum, weight_decay, too"):
        Bare([nn.Parameter(randn(6, 4))])


def test_an_optimizer_without_a_rule_is_told_to_have_one() -> None:
    class Empty(OrthogonalizedOptimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nesterov": True})

    p = nn.Parameter(randn(6, 4))
    p.grad = randn(6, 4)
    with pytest.raises(TypeError, match=r"Expected Empty to have a rule: def rule\(self, x, h\)"):
        Empty([p]).step()


@pytest.mark.parametrize("name", ["step", "grad", "momentum_buffer", "exp_avg", "apply", "_stack", "no name"])
def test_names_that_are_taken_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Own: expected the name of a state to be one that .* got '{name}'"):
        optimizer_of(no_end, {name: "matrix"})


def test_kinds_of_states_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Own: expected the kind of state 'v' to be one of .* but got 'columns'"):
        optimizer_of(no_end, {"v": "columns"})


def test_a_state_that_lacks_a_part_is_told() -> None:
    parameters, optimizer = trained(NAMO, steps=1)
    del optimizer.state[parameters[0]]["momentum_buffer"]
    with pytest.raises(ValueError, match="but it lacks momentum_buffer"):
        optimizer.step()


def test_a_rule_that_asks_for_something_else_than_in_its_trial_is_told() -> None:
    calls = []

    def rule(self: Any, x: Any, h: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            yield Sum(x.square_sum(x.grad))
        O = yield Polar(x.advance(h))
        x.apply(O, h.lr)

    p = nn.Parameter(randn(6, 4))
    p.grad = randn(6, 4)
    with pytest.raises(RuntimeError, match="Expected the rule of Own to ask for the same in every step"):
        optimizer_of(rule)([p]).step()


# --- what they take -------------------------------------------------------------------------------


def test_memory_of_a_rule_is_that_of_what_it_makes() -> None:
    """A gradient where it is valid, and N over it; U of AdaMuon waits for its norm."""
    shape = (64, 32)
    layout = Layout.of(shape, Rectangle(0, 64, 0, 32), transposed=False, blocks=1, name="w")
    found = {}
    for cls in (Muon, AdaMuon):
        optimizer = cls([nn.Parameter(torch.zeros(shape))])
        parameter = MatrixParameter("w", torch.zeros(shape), optimizer.param_groups[0], layout)
        found[cls] = scratch_of(optimizer._ruled, cls.state, parameter, 1, on_cpu=True)
    assert found[Muon].directing == pytest.approx(4, abs=0.1)
    assert found[Muon].applied == pytest.approx(4, abs=0.1)
    assert found[Muon].held == found[AdaMuon].held == pytest.approx(0, abs=0.1)
    assert found[Muon].waiting == 0
    assert found[AdaMuon].waiting >= 4
