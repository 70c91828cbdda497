"""Products for each sample against einsum and a loop over samples."""

import pytest
import torch
from torch.testing import assert_close

from per_sample._kernels import outer
from per_sample._kernels.onednn import available
from per_sample._kernels.outer import outer_product

SHAPES = [
    # n, e, o, t, i
    (3, (), 4, 1, 5),
    (3, (), 4, 6, 5),
    (3, (2,), 4, 1, 5),
    (3, (2, 7), 4, 6, 5),
    (1, (), 1, 1, 1),
    (0, (), 4, 6, 5),
    (0, (2,), 4, 1, 5),
    (3, (), 4, 0, 5),
    (3, (0,), 4, 6, 5),
    (3, (), 0, 6, 5),
]


def operands(n, extra, o, t, i, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(n, *extra, o, t, dtype=dtype, generator=generator)
    return left, torch.randn(n, *extra, t, i, dtype=dtype, generator=generator)


def expected(left, right):
    return torch.einsum("n...ot,n...ti->n...oi", left, right)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128], ids=str)
def test_product(shape, transposed, functional, dtype):
    left, right = operands(*shape, dtype)
    if transposed:
        left, right = (m.transpose(-1, -2).contiguous().transpose(-1, -2) for m in (left, right))
    result = outer_product(left, right, functional=functional)
    assert result.shape == (*left.shape[:-1], right.shape[-1])
    assert_close(result, expected(left, right))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    left, right = operands(3, (), 4, 33, 5, dtype)
    result = outer_product(left, right)
    assert result.dtype == dtype
    assert_close(result.double(), expected(left.double(), right.double()), rtol=2e-2, atol=5e-2)


@pytest.mark.skipif(not available(), reason="this build of torch lacks the operator")
@pytest.mark.parametrize("extra", [(), (2,)])
@pytest.mark.parametrize("transposed", [False, True])
def test_onednn(extra, transposed, monkeypatch):
    monkeypatch.setattr(outer, "fast_mm", lambda: False)
    left, right = operands(3, extra, 130, 65, 128, torch.float32)
    if transposed:
        left, right = (m.transpose(-1, -2).contiguous().transpose(-1, -2) for m in (left, right))
    calls, run = [], outer.inner_product
    monkeypatch.setattr(outer, "inner_product", lambda *args: calls.append(args) or run(*args))
    assert_close(outer_product(left, right), expected(left, right), rtol=1e-4, atol=1e-4)
    assert len(calls) == 3 * (extra[0] if extra else 1)
    calls.clear()
    outer_product(left, right, functional=True)
    outer_product(left.requires_grad_(), right)
    outer_product(left.detach().double(), right.double())
    assert not calls


@pytest.mark.parametrize("t", [1, 4])
def test_derivatives_and_transforms(t):
    left, right = (m.requires_grad_() for m in operands(2, (), 3, t, 5))
    assert torch.autograd.gradcheck(outer_product, (left, right))
    assert torch.autograd.gradgradcheck(outer_product, (left, right))
    lefts, rights = torch.stack([left, -left, 2 * left]), torch.stack([right, right, right + 1])
    assert_close(torch.func.vmap(outer_product)(lefts, rights), expected(lefts, rights))


def test_inputs_stay_as_they_are():
    left, right = operands(3, (2,), 4, 1, 5)
    before = left.clone(), right.clone()
    outer_product(left, right)
    assert_close((left, right), before, rtol=0, atol=0)
