"""Inner products of all pairs of gradients, against dense float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from factor_cases import CASES, FEW, POINT, WAYS, Largest, Made, dense, flat, made, with_operands
from per_sample import options
from per_sample._factors import Dense, Outer, Rows, Sum, View
from per_sample.quantities import gram as module
from per_sample.quantities.gram import gram, gram_algorithm
from per_sample.quantities.precision import operands
from per_sample.quantities.sq_norm import sq_norm

# Where pairs of positions are cheaper, and where they are not.
POSITIONS = ["outer-1", "outer-wide", "outer", "conv-point", "rows-few", "sum-tied-wide", "view", "view-rows"]
ROWS = ["dense", "outer-long", "outer-extra", "conv", "conv-grouped", "masked", "sum-mixed", "sum-conv"]


def expected(a, b=None):
    ours = flat(dense(a))
    theirs = ours if b is None else flat(dense(b))
    return torch.einsum("ne,me->nm", ours, theirs.conj()).real.clone()


@pytest.mark.parametrize(("n", "dtype", "functional", "scratch"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_gram(case, n, dtype, functional, scratch):
    a, b = made(case, n, dtype), made(case, 5, dtype, seed=6)
    before = [x.clone() for x in operands(a) + operands(b)]
    with options(scratch_bytes=scratch):
        found, own = gram(a, b, functional=functional), gram(a, a, functional=functional)
        turned = gram(b, a, functional=functional)
    assert_close(found, expected(a, b))
    assert_close(turned, expected(b, a))
    assert_close(own, expected(a))
    assert torch.equal(own, own.mT)
    assert_close(operands(a) + operands(b), before, rtol=0, atol=0)


@pytest.mark.parametrize("case", POSITIONS)
def test_pairs_of_positions_where_they_are_cheaper(case):
    assert gram_algorithm(made(case), made(case, 5)) == "positions"


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_the_leaf_where_they_are_cheaper(case):
    assert gram_algorithm(made(case), made(case, 5)) == "rows"


@pytest.mark.parametrize("case", CASES)
def test_both_ways_agree(case, monkeypatch):
    a, b = made(case), made(case, 5, seed=6)
    for way, costs in {"rows": (1, 0), "positions": (0, 1)}.items():
        monkeypatch.setattr(module, "_positions_cost", lambda *_, cost=costs[0]: cost)
        monkeypatch.setattr(module, "_rows_cost", lambda *_, cost=costs[1]: cost)
        if way == "rows":
            assert gram_algorithm(a, b) == "rows"
        assert_close(gram(a, b), expected(a, b))
        assert_close(gram(a, a), expected(a))


@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_summed_in_single(case):
    a, b = made(case, 4, torch.bfloat16), made(case, 3, torch.bfloat16, seed=6)
    found, own = gram(a, b), gram(a, a)
    assert found.dtype == own.dtype == torch.float32
    assert_close(found.double(), expected(a, b), rtol=1e-4, atol=1e-3)
    assert_close(own.double(), expected(a), rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(*(st.integers(0, 4) for _ in range(6)), st.sampled_from([200, 2**26]))
def test_products_of_any_size(n, m, o, t, s, i, scratch):
    a, b = Made(n).outer(o, t, i), Made(m, seed=6).outer(o, s, i)
    with options(scratch_bytes=scratch):
        assert_close(gram(a, b), expected(a, b))
        assert_close(gram(a, a), expected(a))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(*(st.integers(0, 4) for _ in range(6)), st.booleans())
def test_pairs_of_different_forms(n, m, t, s, num, i, tied):
    rows, other = Made(n).rows(num + 1, t, i), Made(m, seed=6).rows(num + 1, s, i)
    product = Made(m, seed=7).outer(num + 1, 2, i)
    b = Sum((other, product)) if tied else product
    assert_close(gram(rows, b), expected(rows, b))
    assert_close(gram(b, rows), expected(b, rows))


def test_a_view_and_what_it_views():
    a, b = made("outer"), made("outer", 5, seed=6)
    for ours, theirs in ((View(a, (28,)), View(b, (28,))), (View(a, (28,)), View(View(b, (2, 14)), (28,)))):
        assert_close(gram(ours, theirs), expected(a, b))


@pytest.mark.parametrize("case", ["outer-1", "outer-wide", "rows-few", "sum-tied-wide", "conv-point"])
def test_no_gradient_is_formed(case, monkeypatch):
    n = 10
    a, b = made(case, n, torch.float32), made(case, n, torch.float32, seed=6)
    # The norms on the diagonal have tests of their own.
    monkeypatch.setattr(module, "sq_norm", lambda *_, **__: torch.zeros(n))
    assert gram_algorithm(a, b) == "positions"
    with Largest() as largest:
        gram(a, a)
        gram(a, b)
    assert largest.numel < n * flat(dense(a)).shape[1]


@pytest.mark.parametrize("case", ["outer-long", "conv", "conv-grouped", "outer-extra", "masked"])
def test_rows_keep_to_the_scratch_memory(case):
    n = 50
    a, b = made(case, n), made(case, n, seed=6)
    size, row = flat(dense(a)).shape[1], dense(a)[0, 0].numel()
    with options(scratch_bytes=2 * n * row * 8), Largest() as largest:
        gram(a, b)
    assert largest.numel <= max(n * n, 2 * max(x.numel() for x in operands(a)), n * size // 2)


def cancelling(n, dtype):
    """Gradients that are a millionth of the parts they are the sum of."""
    make = Made(n)
    left, right, rest = make.normal(n, 40, 1), make.normal(n, 1, 50), make.normal(n, 40, 1)
    # Not the very negative: products of it would cancel to the last digit.
    factor = Outer(torch.cat((left, 1e-6 * rest - left), 2), torch.cat((right, right), 1))
    return Outer(factor.left.to(dtype), factor.right.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_much_smaller_than_their_parts(dtype):
    a, b = cancelling(4, dtype), cancelling(3, dtype)
    found, own = gram(a, b).double(), gram(a, a).double()
    size = dense(a).flatten(1).norm(dim=1)
    for result, exact, other in ((found, expected(a, b), dense(b).flatten(1).norm(dim=1)), (own, expected(a), size)):
        # Relative to the product of the norms; a gradient's own rounding is that of its parts.
        error = (result - exact).abs() / (size[:, None] * other)
        assert error.max() < (5e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("case", FEW)
def test_the_diagonal_holds_the_squared_norms(case):
    factor = made(case, dtype=torch.float32)
    assert torch.equal(gram(factor, factor).diagonal(), sq_norm(factor).float())


@pytest.mark.parametrize("functional", [False, True])
def test_products_that_leave_the_range_of_single_precision(functional):
    make = Made(3)
    a = Outer((make.normal(3, 40, 1) * 1e25).float(), (make.normal(3, 1, 50) * 1e-25).float())
    b = Outer((make.normal(3, 40, 1) * 1e-25).float(), (make.normal(3, 1, 50) * 1e25).float())
    assert_close(gram(a, b, functional=functional).double(), expected(a, b), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("case", [*FEW, "outer-wide", "rows-few"])
def test_a_sample_that_is_not_finite_leaves_the_others(case):
    a, b = made(case), made(case, 4, seed=6)
    tensors = [x.clone() for x in operands(a)]
    tensors[0][1] = float("nan")
    bad = with_operands(a, tensors)
    found, own = gram(bad, b), gram(bad, bad)
    assert_close(found[[0, 2]], expected(a, b)[[0, 2]])
    assert_close(own[[0, 2]][:, [0, 2]], expected(a)[[0, 2]][:, [0, 2]])
    assert own[1, 1].isnan()
    assert torch.equal(own.isnan(), own.isnan().mT)


@pytest.mark.parametrize("case", [*FEW, "outer-wide"])
def test_derivatives_and_vmap(case):
    a, b = made(case, 2), made(case, 3, seed=6)
    ours, theirs = ([x.clone().requires_grad_() for x in operands(f)] for f in (a, b))
    count = len(ours)

    def both(*x):
        one = with_operands(a, x[:count])
        return gram(one, with_operands(b, x[count:])), gram(one, one)

    assert torch.autograd.gradcheck(both, (*ours, *theirs), fast_mode=True)
    stacked = [torch.stack([x.detach(), 1 - x.detach()]) for x in (*ours, *theirs)]
    found = torch.func.vmap(both)(*stacked)
    for number in range(2):
        one, other = with_operands(a, [x[number] for x in stacked[:count]]), with_operands(b, [x[number] for x in stacked[count:]])
        assert_close((found[0][number], found[1][number]), (expected(one, other), expected(one)))


def test_dense_with_a_product_and_rows_with_none():
    a, b = made("outer"), Dense(Made(5).normal(5, 4, 7))
    assert_close(gram(a, b), expected(a, b))
    nothing = Rows(torch.full((3, 2), -1), torch.full((3, 2, 3), float("nan"), dtype=torch.float64), 7)
    assert torch.equal(gram(nothing, nothing), torch.zeros(3, 3, dtype=torch.float64))


def test_another_number_of_positions():
    a, b = Made(3).conv(POINT, (5, 3), i=6, o=7), Made(4).conv(POINT, (3, 6), i=6, o=7)
    assert_close(gram(a, b), expected(a, b))
