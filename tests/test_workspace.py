"""The arena: what a frame took is used again, and nothing that is in use is given out twice."""

import pytest
import torch

from lightning_namo import NAMO
from lightning_namo.workspace import Workspace

CPU = torch.device("cpu")


def take(workspace, *shape, dtype=torch.float32):
    return workspace.take(shape, dtype, CPU)


def grown(elements=64):
    """A workspace whose arena holds that many float32 elements."""
    workspace = Workspace()
    with workspace.frame():
        take(workspace, elements)
    return workspace


def test_the_arena_has_the_size_of_the_most_that_was_in_use_at_a_time():
    workspace = Workspace()
    with workspace.frame():
        with workspace.frame():
            take(workspace, 64)
        with workspace.frame():
            take(workspace, 32)
            assert workspace.nbytes == 0  # it grows after the outermost frame
    assert workspace.nbytes == 64 * 4


def test_memory_is_used_again_after_its_frame_and_not_before():
    workspace = grown()
    with workspace.frame():
        outer = take(workspace, 4, 4).fill_(1.0)
        for value in (2.0, 3.0):
            with workspace.frame():
                inner = take(workspace, 16).fill_(value)
                assert inner.data_ptr() == outer.data_ptr() + outer.nbytes
        assert (outer == 1).all()


def test_more_than_the_arena_holds_is_new_memory():
    workspace = grown(16)
    with workspace.frame():
        first, second = take(workspace, 16).fill_(1.0), take(workspace, 16).fill_(2.0)
        assert (first == 1).all()
        assert (second == 2).all()
    assert workspace.nbytes == 32 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_aligned(dtype):
    workspace = grown()
    with workspace.frame():
        take(workspace, 3, dtype=torch.bfloat16)
        assert take(workspace, 5, dtype=dtype).data_ptr() % 64 == 0


def test_a_frame_ends_with_an_error_too():
    workspace = grown()

    def fail():
        with workspace.frame():
            take(workspace, 8)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    with workspace.frame():
        assert take(workspace, 8).data_ptr() == workspace._arena.data_ptr()


def test_a_frame_that_an_error_left_open_frees_nothing_of_a_later_one():
    """A generator that failed is closed when its traceback goes, which may be in the middle of the next step."""
    workspace = grown()

    def buckets():
        with workspace.frame():
            take(workspace, 8)
            yield

    with workspace.frame():
        left_open = buckets()
        next(left_open)
    with workspace.frame():
        first = take(workspace, 16).fill_(1.0)
        left_open.close()
        take(workspace, 16).fill_(2.0)
        assert (first == 1).all()


def test_other_devices_take_memory_as_torch_does():
    workspace = grown()
    with workspace.frame():
        assert workspace.take((4,), torch.float32, torch.device("meta")).is_meta
    assert workspace.nbytes == 64 * 4


def test_the_arena_of_an_optimizer_keeps_its_size_and_whatever_lies_in_it_changes_nothing():
    matrices = [torch.nn.Parameter(torch.randn(40, 80, generator=torch.Generator().manual_seed(k))) for k in range(3)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in matrices]
    optimizer, twin = NAMO(matrices), NAMO(twins)
    sizes = set()
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(matrices, twins, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        workspace = optimizer._prepare()[2].workspace
        sizes.add(workspace.nbytes)
        workspace._arena.fill_(0xFF)  # NaN in every dtype
        twin.step()
    assert len(sizes) == 1
    for p, q in zip(matrices, twins, strict=True):
        assert torch.equal(p, q)
