"""Parameters of every dtype, shape and layout in memory train alike."""

import pytest
import torch
from torch import nn

from tests.helpers.optimizers import EXACT, all_optimizers, exact_run, parameter, parameters, randn, run
from tests.helpers.toy import assert_same


@all_optimizers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_follows_float64(cls, dtype, tolerance):
    start, gradients = (0.1 * randn(6, 4)).to(dtype), [randn(6, 4, seed=s, dtype=dtype) for s in range(1, 5)]
    weights = {}
    for kind in (dtype, torch.float64):
        p = nn.Parameter(start.to(kind, copy=True))
        optimizer = cls([p], lr=0.1, **EXACT)
        for grad in gradients:
            p.grad = grad.to(kind)
            optimizer.step()
        weights[kind] = p.detach()
    assert weights[dtype].dtype == dtype
    assert (weights[dtype] - weights[torch.float64]).norm() < tolerance * (weights[torch.float64] - start).norm()


@all_optimizers
def test_one_optimizer_trains_parameters_of_several_dtypes(cls):
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    together = run(cls([parameter(6, 4, dtype=dtype) for dtype in dtypes]), 0)
    for index, dtype in enumerate(dtypes):
        p = parameter(6, 4, dtype=dtype)
        alone = cls([p])
        p.grad = randn(6, 4, seed=index).to(dtype)
        alone.step()
        assert_same(parameters(together)[index], p)


@all_optimizers
def test_channels_last_convolutions_train_as_contiguous_ones_and_stay_channels_last(cls):
    plain, last = nn.Parameter(randn(6, 4, 3, 3)), nn.Parameter(randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizers = [cls([plain]), cls([last])]
    for seed in range(1, 4):
        plain.grad, last.grad = (randn(6, 4, 3, 3, seed=seed).contiguous(memory_format=f) for f in _FORMATS)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-6)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert optimizers[1].state[last]["momentum_buffer"].is_contiguous(memory_format=torch.channels_last)


_FORMATS = (torch.contiguous_format, torch.channels_last)


@all_optimizers
@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4, 2, 3), (6, 4, 2, 3, 2)])
def test_convolutions_train_as_the_matrices_they_flatten_to(cls, shape):
    kernel = nn.Parameter(randn(*shape))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    for optimizer in (run(cls([kernel]), 1, 2), run(cls([matrix]), 1, 2)):
        assert optimizer.skipped_steps() == 0
    assert_same(kernel.detach().flatten(1), matrix.detach())


@all_optimizers
def test_a_parameter_that_is_not_contiguous_trains_as_its_copy(cls):
    strided, copied = nn.Parameter(randn(4, 6).T), nn.Parameter(randn(4, 6).T.contiguous())
    optimizers = [cls([strided]), cls([copied])]
    for seed in range(1, 3):
        strided.grad = copied.grad = randn(6, 4, seed=seed)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(strided, copied, rtol=0, atol=1e-6)


@all_optimizers
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_a_transposed_parameter_trains_as_its_transpose(cls, shape):
    start, gradients = (
        randn(*shape, dtype=torch.float64),
        [randn(*shape, seed=s, dtype=torch.float64) for s in (1, 2, 3)],
    )
    (expected,) = exact_run(cls, [{"params": [nn.Parameter(start.clone())]}], [[g] for g in gradients])
    stored = nn.Parameter(start.T.contiguous())
    (actual,) = exact_run(cls, [{"params": [stored], "transposed": True}], [[g.T.contiguous()] for g in gradients])
    torch.testing.assert_close(actual.T, expected, rtol=0, atol=1e-12)


@all_optimizers
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("blocks", "rows"), [(3, (4, 4, 4)), ([2, 5, 3], (2, 5, 3)), ((6, 1), (6, 1))])
def test_a_fused_parameter_trains_as_its_blocks_apart(cls, blocks, rows, transposed):
    start, *gradients = (randn(sum(rows), 5, seed=s, dtype=torch.float64) for s in range(4))
    expected = exact_run(
        cls,
        [{"params": [nn.Parameter(part.clone()) for part in start.split(rows)]}],
        [list(grad.split(rows)) for grad in gradients],
    )
    stored = [(t.T.contiguous() if transposed else t) for t in (start, *gradients)]
    group = {"params": [nn.Parameter(stored[0])], "blocks": blocks, "transposed": transposed}
    (actual,) = exact_run(cls, [group], [[grad] for grad in stored[1:]])
    torch.testing.assert_close(actual.T if transposed else actual, torch.cat(expected), rtol=0, atol=1e-12)
