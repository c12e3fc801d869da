"""WarmupStableDecay: multipliers step by step, lengths in steps and in shares, every group alike."""

import io
import math

import pytest
import torch

from lightning_namo import NAMO, WarmupStableDecay, optimize_with
from tests.helpers.toy import BATCHES, Net, fit


def sgd(*lrs: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (1.0,)])


def rates(schedule: WarmupStableDecay, steps: int, total_steps: int | None = None) -> list[float]:
    """The learning rate of each step, of a group with learning rate 1."""
    optimizer = sgd()
    scheduler = schedule(optimizer, total_steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_the_rate_climbs_stays_and_falls_to_the_floor_at_the_last_step():
    schedule = WarmupStableDecay(warmup=4, decay=3, total_steps=10, floor=0.1)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.7, 0.4, 0.1]
    assert rates(schedule, 10) == pytest.approx(expected)


def test_a_cosine_decay_falls_by_half_a_wave():
    schedule = WarmupStableDecay(decay=4, total_steps=6, shape="cosine", floor=0.2)
    expected = [1, 1] + [0.2 + 0.8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    assert rates(schedule, 6) == pytest.approx(expected)
    assert expected[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_rate_stays_at_the_floor_past_the_end(shape):
    schedule = WarmupStableDecay(decay=3, total_steps=5, shape=shape, floor=0.3)
    assert rates(schedule, 9)[4:] == pytest.approx([0.3] * 5)


def test_without_warm_up_and_decay_the_rate_stays():
    assert rates(WarmupStableDecay(), 5) == [1.0] * 5


def test_a_warm_up_alone_needs_no_end():
    schedule = WarmupStableDecay(warmup=2)
    assert not schedule.needs_total_steps
    assert rates(schedule, 4) == [0.5, 1, 1, 1]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_shares_of_the_run_are_steps_of_it(shape):
    shares = WarmupStableDecay(warmup=0.2, decay=0.5, total_steps=20, shape=shape)
    steps = WarmupStableDecay(warmup=4, decay=10, total_steps=20, shape=shape)
    assert rates(shares, 20) == rates(steps, 20)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_shares_that_fill_the_run_fit_runs_of_any_length(share):
    for total in range(2, 40):
        used = rates(WarmupStableDecay(warmup=share, decay=1 - share, total_steps=total), total)
        assert used[-1] == pytest.approx(0.1)


def test_the_length_of_the_schedule_overrules_that_of_the_run():
    schedule = WarmupStableDecay(decay=2, total_steps=4)
    assert rates(schedule, 8, total_steps=8) == rates(schedule, 8)


def test_every_group_is_driven_alike_so_that_ratios_stay():
    optimizer = sgd(0.5, 0.02, 0.0)
    scheduler = WarmupStableDecay(warmup=3, decay=3, total_steps=9)(optimizer)
    for _ in range(9):
        first, second, third = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first * 0.04)
        assert third == 0
        optimizer.step()
        scheduler.step()


def test_a_schedule_resumes_from_a_plain_state_dict():
    schedule = WarmupStableDecay(warmup=3, decay=4, total_steps=10)
    optimizer = sgd(0.5, 0.02)
    scheduler = schedule(optimizer)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
    file.seek(0)
    optimizer_state, scheduler_state = torch.load(file, weights_only=True)
    resumed = sgd(0.5, 0.02)
    resumed_scheduler = schedule(resumed)
    resumed.load_state_dict(optimizer_state)
    resumed_scheduler.load_state_dict(scheduler_state)
    for _ in range(6):
        assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
        for each in (optimizer, scheduler, resumed, resumed_scheduler):
            each.step()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"warmup": -1}, "warmup"),
        ({"warmup": 1.5}, "warmup"),
        ({"warmup": math.nan}, "warmup"),
        ({"decay": -0.1}, "decay"),
        ({"decay": 2.0}, "decay"),
        ({"decay": math.inf}, "decay"),
        ({"floor": -0.1}, "floor"),
        ({"floor": 1.1}, "floor"),
        ({"floor": math.nan}, "floor"),
        ({"total_steps": 0}, "total_steps"),
        ({"shape": "square"}, "shape"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, match):
    with pytest.raises(ValueError, match=f"Expected {match} to be .* got "):
        WarmupStableDecay(**arguments)


@pytest.mark.parametrize("schedule", [WarmupStableDecay(decay=3), WarmupStableDecay(warmup=0.1)])
def test_a_run_of_unknown_length_is_refused_where_it_matters(schedule):
    assert schedule.needs_total_steps
    with pytest.raises(ValueError, match=r"Expected total_steps.*total_steps=\.\.\."):
        schedule(sgd())


def test_a_run_shorter_than_warm_up_and_decay_is_refused():
    with pytest.raises(ValueError, match="at least warm-up 6 \\+ decay 5 steps but it has 10"):
        WarmupStableDecay(warmup=6, decay=5)(sgd(), 10)


# --- in a Trainer ---------------------------------------------------------------------------------


class Recording(Net):
    """Keeps the learning rates (of the matrices, of AdamW) that every step ran with."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(tuple(group["lr"] for group in optimizer.param_groups))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 2 * BATCHES),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 2 * BATCHES // 3),
        ({"max_epochs": -1, "max_steps": 9}, 9),
        ({"max_epochs": 50, "max_steps": 5}, 5),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
    ],
)
def test_the_trainer_tells_how_long_the_run_is(options, steps):
    schedule = WarmupStableDecay(warmup=0.25, decay=0.5)

    class Scheduled(Recording):
        configure_optimizers = optimize_with(NAMO, lr=0.01, adamw_lr=0.001, schedule=schedule)

    module = Scheduled()
    trainer = fit(module, **options)
    multipliers = rates(schedule, steps, total_steps=steps)
    assert trainer.global_step == steps
    assert [rate for rate, _ in module.rates] == pytest.approx([0.01 * m for m in multipliers])
    assert [rate for _, rate in module.rates] == pytest.approx([0.001 * m for m in multipliers])


@pytest.mark.parametrize("schedule", [WarmupStableDecay(decay=5), WarmupStableDecay(warmup=0.1)])
def test_an_open_ended_run_is_refused_with_the_way_out(schedule):
    class Scheduled(Net):
        configure_optimizers = optimize_with(NAMO, schedule=schedule)

    with pytest.raises(ValueError, match=r"max_steps.*total_steps"):
        fit(Scheduled(), max_epochs=-1)


@pytest.mark.parametrize("schedule", [WarmupStableDecay(warmup=2), WarmupStableDecay(decay=0.5, total_steps=4)])
def test_an_open_ended_run_is_fine_where_the_schedule_has_its_own_length(schedule):
    class Scheduled(Recording):
        configure_optimizers = optimize_with(NAMO, lr=1e-3, schedule=schedule)

        def on_train_batch_end(self, *args: object) -> None:
            self.trainer.should_stop = len(self.rates) == 6

    module = Scheduled()
    fit(module, max_epochs=-1)
    assert [rate for rate, _ in module.rates] == pytest.approx([1e-3 * m for m in rates(schedule, 6)])
