"""Weighted sums over the samples and inner products with a direction, against dense float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from factor_cases import CASES, FEW, GROUPED, PLAIN, WAYS, Largest, Made, dense, direction_for, flat, made, with_operands
from per_sample import options
from per_sample._factors import Factor, Hadamard, Outer
from per_sample._kernels.onednn import available
from per_sample.quantities import weighted_sum as module
from per_sample.quantities.dot import dot
from per_sample.quantities.precision import operands
from per_sample.quantities.weighted_sum import weighted_sum


def weights_for(n: int) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expected_sum(factor: Factor, weights: torch.Tensor | None) -> torch.Tensor:
    grads = dense(factor)
    return grads.sum(0) if weights is None else torch.einsum("n,n...->...", weights.to(grads.dtype), grads)


def expected_dot(factor: Factor, direction: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ne,e->n", flat(dense(factor)), direction.conj().reshape(-1)).real.clone()


@pytest.mark.parametrize(("n", "dtype", "functional", "scratch"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_sums_and_dots(case, n, dtype, functional, scratch):
    factor = made(case, n, dtype)
    before = [x.clone() for x in operands(factor)]
    direction = direction_for(factor)
    with options(scratch_bytes=scratch):
        sums = [weighted_sum(factor, weights, functional=functional) for weights in (None, weights_for(n))]
        products = dot(factor, direction, functional=functional)
    assert_close(sums, [expected_sum(factor, weights) for weights in (None, weights_for(n))])
    assert_close(products, expected_dot(factor, direction))
    assert_close(operands(factor), before, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "scratch"), [(torch.bfloat16, 1), (torch.float16, 2**26)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_summed_in_single(case, scratch, dtype):
    factor, weights = made(case, 5, dtype), weights_for(5)
    with options(scratch_bytes=scratch):
        found, products = weighted_sum(factor, weights), dot(factor, direction_for(factor))
    assert found.dtype == products.dtype == torch.float32
    # The operands are what they are: only single precision's own rounding is left.
    assert_close(found.double(), expected_sum(factor, weights), rtol=1e-4, atol=1e-4)
    assert_close(products.double(), expected_dot(factor, direction_for(factor)), rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(*(st.integers(0, 4) for _ in range(3)), st.integers(0, 5), st.lists(st.integers(1, 3), max_size=2))
def test_products_of_any_size(n, o, t, i, extra):
    factor, weights = Made(n).outer(o, t, i, *extra), weights_for(n)
    assert_close(weighted_sum(factor, weights), expected_sum(factor, weights))
    direction = direction_for(factor)
    assert_close(dot(factor, direction), expected_dot(factor, direction))


@pytest.mark.parametrize("case", ["outer-1", "outer-wide", "outer-extras-1", "conv-point", "rows-few", "sum-tied-wide"])
def test_no_gradient_is_formed(case):
    n = 64
    factor = made(case, n)
    # Convolutions pad their operands.
    allowed = max(flat(dense(factor)).shape[1], 2 * sum(x.numel() for x in operands(factor)))
    with Largest() as largest:
        weighted_sum(factor, weights_for(n))
        dot(factor, direction_for(factor))
    assert largest.numel <= allowed


def test_the_largest_tensor_is_counted():
    factor = made("outer-wide", 64)
    with Largest() as largest:
        factor.materialize()
    assert largest.numel == 64 * 40 * 50


@pytest.mark.parametrize("case", FEW)
def test_a_weight_of_zero_drops_nothing(case):
    factor = made(case)
    tensors = [x.clone() for x in operands(factor)]
    tensors[0][1] = float("nan")
    factor = with_operands(factor, tensors)
    found = weighted_sum(factor, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    expected = expected_sum(factor, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    if case == "masked":
        # Where the mask holds nothing there is no gradient at all.
        expected = expected.masked_fill(~factor.by, 0)
    assert found.isnan().any()
    assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("case", FEW)
def test_dots_of_one_sample_leave_the_others(case):
    factor = made(case)
    tensors = [x.clone() for x in operands(factor)]
    tensors[0][1] = float("inf")
    found = dot(with_operands(factor, tensors), direction_for(factor))
    expected = expected_dot(factor, direction_for(factor))
    assert not found[1].isfinite()
    assert_close(found[[0, 2]], expected[[0, 2]])


def test_what_a_mask_leaves_out_does_not_count():
    factor = made("masked")
    left = factor.base.left.clone()
    left[1, 2] = float("inf")
    mask = factor.by.clone()
    mask[2] = False
    factor = Hadamard(Outer(left, factor.base.right), mask)
    grads = torch.where(mask, dense(factor.base), 0.0)
    direction = direction_for(factor)
    assert_close(dot(factor, direction), (grads * direction).sum((1, 2)))
    assert_close(weighted_sum(factor, None), grads.sum(0))


@pytest.mark.parametrize("case", FEW)
def test_derivatives(case):
    factor, weights = made(case, 2), weights_for(2).requires_grad_()
    direction = direction_for(factor).requires_grad_()
    tensors = [x.clone().requires_grad_() for x in operands(factor)]
    assert torch.autograd.gradcheck(lambda w, *x: weighted_sum(with_operands(factor, x), w), (weights, *tensors), fast_mode=True)
    assert torch.autograd.gradcheck(lambda v, *x: dot(with_operands(factor, x), v), (direction, *tensors), fast_mode=True)


@pytest.mark.parametrize("case", FEW)
def test_under_vmap(case):
    factor, weights = made(case), torch.stack([weights_for(3), 2 - weights_for(3)])
    direction = direction_for(factor)
    stacked = [torch.stack([x, x.flip(0)]) for x in operands(factor)]
    sums = torch.func.vmap(lambda w, x: weighted_sum(with_operands(factor, x), w))(weights, stacked)
    dots = torch.func.vmap(lambda x: dot(with_operands(factor, x), direction))(stacked)
    for w, found, products, tensors in zip(weights, sums, dots, zip(*stacked, strict=True), strict=True):
        one = with_operands(factor, tensors)
        assert_close(found, expected_sum(one, w))
        assert_close(products, expected_dot(one, direction))


@pytest.mark.skipif(not available(), reason="this build of torch lacks the operator")
def test_onednn(monkeypatch):
    monkeypatch.setattr(module, "fast_mm", lambda: False)
    calls, run = [], module.inner_product
    monkeypatch.setattr(module, "inner_product", lambda *args: calls.append(args) or run(*args))
    factor, weights = Made(4, torch.float32).turned(257, 300, 258), weights_for(4)
    assert_close(weighted_sum(factor, weights).double(), expected_sum(factor, weights), rtol=1e-4, atol=1e-3)
    assert len(calls) == 1
    weighted_sum(factor, weights, functional=True)
    weighted_sum(Outer(factor.left.clone().requires_grad_(), factor.right), weights)
    weighted_sum(Made(4).turned(257, 300, 258), weights)
    assert len(calls) == 1


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.sampled_from([PLAIN, GROUPED]), st.integers(0, 3), st.integers(0, 2), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1))
def test_convolutions_of_any_size(geometry, n, b, i, o, less):
    factor, weights = Made(n).conv(geometry, (7, 8), b, i, o, (less, less)), weights_for(n)
    assert_close(weighted_sum(factor, weights), expected_sum(factor, weights))
    direction = direction_for(factor)
    assert_close(dot(factor, direction), expected_dot(factor, direction))
