"""What ranks publish is compared: each difference is refused by name, without processes."""

from __future__ import annotations

from math import nan

import pytest
import torch

from lightning_namo.sharding.agreement import (
    Alarm,
    ParameterDescription,
    check_agreement,
    check_hyper_parameters,
    check_order,
    check_replicas,
    check_same,
    checksums,
    fingerprint,
    plain,
)

W, B = ("w", (4, 4), torch.float32), ("b", (4,), torch.float32)


def test_parameters_that_differ_are_named() -> None:
    check_agreement([[W, B]] * 3)
    check_same([W, B])  # there are no others here
    with pytest.raises(ValueError, match=r"rank 0 has w \(4, 4\) torch.float32 where rank 2 has b \(4,\)"):
        check_agreement([[W], [W], [B]])
    with pytest.raises(ValueError, match=r"rank 0 has 1 and rank 1 has 2: only rank 1 has b \(4,\)"):
        check_agreement([[W], [W, B]])


def test_another_order_of_optimizers_is_refused_with_its_rank() -> None:
    check_order([False, False])
    with pytest.raises(ValueError, match="rank 1 steps them in another order than rank 0"):
        check_order([True, False, True])


def test_replicas_with_other_weights_are_named_and_other_parts_are_no_matter() -> None:
    def holding(region: str | None, checksum: int) -> list[ParameterDescription]:
        return [ParameterDescription("w", (4, 4), torch.float32, region, checksum)]

    check_replicas([holding("top", 1), holding("bottom", 2), holding("top", 1), holding(None, 3)])
    with pytest.raises(ValueError, match=r"Expected ranks 0 and 2 to hold replicas of w \(4, 4\), but their weights"):
        check_replicas([holding("top", 1), holding("bottom", 2), holding("top", 2)])


def test_hyper_parameters_may_differ_by_rounding_only() -> None:
    check_hyper_parameters(
        [[("matrices", {"lr": 0.1, "eps": nan})], [("matrices", {"lr": 0.1 * (1 + 1e-7), "eps": nan})]]
    )
    with pytest.raises(
        ValueError, match=r"the same lr of group 'matrices' on all ranks, but rank 0 has 0.1 and rank 1"
    ):
        check_hyper_parameters([[("matrices", {"lr": 0.1})], [("matrices", {"lr": 0.1001})]])
    with pytest.raises(ValueError, match=r"rank 0 has \['matrices'\] and rank 1 has \['adamw'\]"):
        check_hyper_parameters([[("matrices", {})], [("adamw", {})]])


def test_a_fingerprint_tells_optimizers_and_numbers_apart_and_skips_tensors() -> None:
    hyper = [("matrices", {"lr": 0.1, "decay": torch.tensor(0.5)})]
    assert plain(hyper) == [("matrices", {"lr": 0.1, "decay": 0.5})]
    first = fingerprint(0, hyper)
    assert first == fingerprint(0, [("matrices", {"lr": 0.1, "decay": torch.tensor(0.7)})]) < 2**24
    assert first != fingerprint(1, hyper)
    assert first != fingerprint(0, [("matrices", {"lr": 0.2})])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_a_checksum_depends_on_every_value_and_its_place(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 13).to(dtype).view(3, 4)
    changed, moved = tensor.clone(), tensor.flip(0)
    changed[2, 3] += 1
    sums = checksums([tensor, tensor.clone(), changed, moved, torch.zeros(2), -torch.zeros(2)])
    assert sums[0] == sums[1]
    assert len(set(sums[:4])) == 3
    assert sums[4] == sums[5]
    assert checksums([]) == []


def test_an_alarm_is_read_once() -> None:
    alarm = Alarm(torch.device("cpu"))
    assert alarm.at_once
    assert alarm.read() == []
    alarm.set(torch.tensor([0.0, 2.0]))
    assert alarm.read() == [0.0, 2.0]
    assert alarm.read() == []
