"""Sums of squares, means and deviations over the samples, against dense float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from factor_cases import CASES, FEW, WAYS, Largest, Made, dense, made, with_operands
from per_sample import options
from per_sample._factors import Dense, Outer, Rows
from per_sample.quantities import moments as module
from per_sample.quantities.moments import merged, moments, square_sum
from per_sample.quantities.precision import operands


def expected(factor):
    """The sum of squares, the mean and the sum of squared deviations."""
    grads = dense(factor)
    mean = grads.sum(0) / max(1, len(grads))
    return grads.abs().square().sum(0), mean, (grads - mean).abs().square().sum(0)


@pytest.mark.parametrize(("n", "dtype", "functional", "scratch"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_moments(case, n, dtype, functional, scratch):
    factor = made(case, n, dtype)
    before = [x.clone() for x in operands(factor)]
    with options(scratch_bytes=scratch):
        squared = square_sum(factor, functional=functional)
        mean, deviations = moments(factor, functional=functional)
    assert_close((squared, mean, deviations), expected(factor))
    assert_close(operands(factor), before, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_summed_in_single(case):
    factor = made(case, 5, torch.bfloat16)
    found = square_sum(factor), *moments(factor)
    assert {x.dtype for x in found} == {torch.float32}
    for own, exact in zip(found, expected(factor), strict=True):
        assert_close(own.double(), exact, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(*(st.integers(0, 5) for _ in range(3)), st.integers(1, 5), st.integers(1, 4))
def test_rows_of_any_size(n, t, i, num, low):
    rows = Made(n).rows(num, t, i)
    factor = Rows(rows.index.clamp(min=-1) * low, rows.g, num * low)
    assert_close((square_sum(factor), *moments(factor)), expected(factor))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("form", ["outer-1", "outer", "dense", "rows"])
def test_a_mean_much_larger_than_the_spread(form, ratio, functional, dtype):
    make = Made(40)
    if form == "rows":
        index = torch.arange(3).expand(40, 3).clone()
        factor = Rows(index, (ratio + make.normal(40, 3, 2)).to(dtype), 5)
    elif form == "dense":
        factor = Dense((ratio + make.normal(40, 4, 5)).to(dtype))
    else:
        t = 1 if form == "outer-1" else 2
        factor = Outer((ratio + make.normal(40, 4, t)).to(dtype), (1 + make.normal(40, t, 5) / ratio).to(dtype))
    mean, deviations = moments(factor, functional=functional)
    _, exact_mean, exact = expected(factor)
    eps = torch.finfo(dtype).eps
    # A gradient formed in a dtype is as wrong as its rounding, whatever is done with it then.
    assert_close(mean.double(), exact_mean, rtol=8 * eps, atol=0)
    assert_close(deviations.double(), exact, rtol=100 * eps + 20 * eps * ratio, atol=0)


def test_gradients_that_are_all_equal_have_no_variance():
    one = Made(1).outer(4, 1, 5)
    factor = Outer(one.left.expand(6, 4, 1), one.right.expand(6, 1, 5))
    _, deviations = moments(factor)
    assert (deviations >= 0).all()
    assert deviations.max() < 1e-28


@pytest.mark.parametrize("functional", [False, True])
def test_squares_whose_factors_overflow(functional):
    make = Made(3)
    factor = Outer((make.normal(3, 4, 1) * 1e25).float(), (make.normal(3, 1, 5) * 1e-25).float())
    squared = square_sum(factor, functional=functional)
    assert_close(squared.double(), expected(factor)[0], rtol=1e-5, atol=0)


def test_columns_times_rows_form_no_gradient():
    factor = Made(64).outer(30, 1, 40)
    for run in (square_sum, moments):
        with Largest() as largest:
            run(factor)
        assert largest.numel <= 64 * 40


def test_rows_are_not_spread_out():
    factor = Made(64).rows(300, 3, 2)
    for run in (square_sum, moments):
        with Largest() as largest:
            run(factor)
        assert largest.numel <= 64 * 3 * 2 + 300 * 2


@pytest.mark.parametrize("case", ["dense", "outer", "conv"])
def test_pieces_keep_to_the_scratch_memory(case):
    factor = made(case, 64)
    one, most = moments(factor)[0].numel(), max(x.numel() for x in operands(factor))
    with options(scratch_bytes=8 * one * 4), Largest() as largest:
        moments(factor)
    assert largest.numel <= max(4 * one, most)


def test_moments_are_recomputed_only_where_digits_are_lost(monkeypatch):
    calls, run = [], module._two_passes
    monkeypatch.setattr(module, "_two_passes", lambda *args: calls.append(args) or run(*args))
    factor = Made(40, torch.float32).outer(4, 1, 5)
    moments(factor)
    assert not calls
    moments(factor, functional=True)
    moments(Outer(1e6 + factor.left, 1 + factor.right / 1e6))
    assert len(calls) == 2


def test_what_the_first_pass_has_wrong_is_mended(monkeypatch):
    factor, run = made("outer"), module.weighted_sum
    monkeypatch.setattr(module, "weighted_sum", lambda *args, **kwargs: run(*args, **kwargs) * 1.01)
    assert_close(moments(factor), expected(factor)[1:])


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (3, 0), (1, 1), (5, 2)])
def test_merging_two_sets_of_samples(counts):
    parts = [made("outer", n, seed=n) for n in counts]
    both = Outer(torch.cat([p.left for p in parts]), torch.cat([p.right for p in parts]))
    first, second = map(moments, parts)
    assert_close(merged(first, counts[0], second, counts[1]), expected(both)[1:])


@pytest.mark.parametrize("case", FEW)
def test_derivatives_and_vmap(case):
    factor = made(case, 3)
    tensors = [x.clone().requires_grad_() for x in operands(factor)]

    def both(*x):
        one = with_operands(factor, x)
        return square_sum(one), *moments(one)

    assert torch.autograd.gradcheck(both, tensors, fast_mode=True)
    stacked = [torch.stack([x.detach(), 1 - x.detach()]) for x in tensors]
    found = torch.func.vmap(both)(*stacked)
    for number in range(2):
        one = with_operands(factor, [x[number] for x in stacked])
        assert_close(tuple(x[number] for x in found), expected(one))


@pytest.mark.parametrize("case", ["outer-1", "rows"])
def test_a_gradient_that_is_not_finite_shows(case):
    factor = made(case)
    tensors = [x.clone() for x in operands(factor)]
    tensors[-1][1] = float("nan")
    factor = with_operands(factor, tensors)
    assert_close((square_sum(factor), *moments(factor)), expected(factor), equal_nan=True)
