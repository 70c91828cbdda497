"""Norms that a fast way would get wrong: cancellation, squares beyond the dtype's range, numbers that are not finite; and samples apart."""

from __future__ import annotations

from math import inf, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from per_sample._factors import ConvGeometry, ConvOuter, Dense, Outer, Rows, Sum, add
from per_sample._kernels.outer_norm import outer_sq_norm
from per_sample._options import options
from per_sample.quantities import sq_norm as module
from per_sample.quantities.norm import norm
from per_sample.quantities.precision import mapped
from per_sample.quantities.sq_norm import inner, norm_algorithm, sq_norm
from test_norms_factors import FACTORS, Maker, flat, gradients

SQUARE = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)


def truth(factor):
    return flat(gradients(factor)).abs().square().sum(1)


def norms_close(found, expected, rtol=1e-5):
    assert_close(found.sqrt(), expected.sqrt(), rtol=rtol, atol=0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7]),
    st.integers(1, 4),
    st.booleans(),
)
def test_outer_products_that_cancel(dtype, remainder, pairs, functional):
    """Positions in pairs, the second the first's negative but for a remainder."""
    maker = Maker(3, dtype)
    left, right = maker(70, pairs), maker(pairs, 90)
    factor = Outer(torch.cat((left, -left * (1 + remainder)), -1), torch.cat((right, right), -2))
    expected, found = truth(factor), sq_norm(factor, functional=functional)
    assert norm_algorithm(factor) == "gram"
    assert (found >= 0).all()
    scale = (left.double().norm() * right.double().norm()) ** 2
    # Without a look at the result, what is lost is far below the rounding of the gradients' own operands.
    assert_close(found, expected, rtol=1e-4, atol=float(scale) * (1e-14 if functional else 0))
    if not functional:
        norms_close(found, expected, 1e-4)


def test_the_fast_way_alone_would_not_do():
    maker = Maker(3, torch.float32)
    left, right = maker(70, 2), maker(2, 90)
    factor = Outer(torch.cat((left, -left * (1 + 1e-4)), -1), torch.cat((right, right), -2))
    value, floor = outer_sq_norm(factor.left, factor.right, "gram")
    assert floor is not None
    assert ((value - truth(factor)).abs() > 0.01 * truth(factor)).any()
    assert (value < floor).all()


@pytest.mark.parametrize("geometry", [SQUARE, ConvGeometry((3, 3), (2, 3), (1, 1), (1, 1), 1)], ids=["pixel_gram", "gram"])
def test_convolutions_that_cancel(geometry):
    maker = Maker(3, torch.float32)
    factor = maker.conv(geometry, 64, 48, 4, 4)
    opposite = ConvOuter(torch.cat((factor.x, factor.x), 1), torch.cat((factor.g, -factor.g * (1 + 1e-4)), 1), geometry)
    assert norm_algorithm(opposite) != "pieces"
    norms_close(sq_norm(opposite), truth(opposite), 1e-6)
    norms_close(sq_norm(add(factor, ConvOuter(factor.x, -factor.g * (1 + 1e-4), geometry))), truth(opposite), 1e-6)


def test_a_tied_matrix_whose_uses_cancel():
    maker = Maker(3, torch.float32)
    rows = Rows(torch.arange(4).expand(3, 4) * 7, maker(4, 50), 100)
    left = torch.zeros(3, 100, 4)
    left[:, torch.arange(4) * 7, torch.arange(4)] = -1
    factor = Sum((rows, Outer(left, rows.g * (1 + 1e-4))))
    assert norm_algorithm(factor) == "terms"
    norms_close(sq_norm(factor), truth(factor), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("scale", [1e25, 1e-22])
@pytest.mark.parametrize("name", [name for name in FACTORS if name != "no elements"])
def test_squares_beyond_float32(name, scale, dtype):
    """The gradient fits into float32, its square does not; one sample among ordinary ones."""
    factor = FACTORS[name][0](Maker(3, dtype))
    mixed = factor.scale(torch.tensor([1.0, scale, 1.0]).to(dtype))
    expected = truth(mixed)
    for functional in (False, True):
        norms_close(sq_norm(mixed, functional=functional), expected)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(("left_scale", "right_scale"), [(1e-25, 1e25), (1e25, 1e-25), (1e-20, 1e18), (1e30, 1e5), (1e-21, 1e-2)])
@pytest.mark.parametrize("t", [1, 3])
def test_operands_of_unlike_sizes(t, left_scale, right_scale, functional):
    maker = Maker(3, torch.float32)
    factor = Outer(maker(70, t) * left_scale, maker(t, 90) * right_scale)
    norms_close(sq_norm(factor, functional=functional), truth(factor))
    geometry = SQUARE
    conv = ConvOuter(maker(1, 64, 3, 4) * left_scale, maker(1, 48, 3, 4) * right_scale, geometry)
    assert norm_algorithm(conv) == "pixel_gram"
    norms_close(sq_norm(conv, functional=functional), truth(conv))


@pytest.mark.parametrize("t", [1, 3])
def test_operands_of_unlike_sizes_in_double_precision(t):
    maker = Maker(3, torch.float64)
    for scales in ((1e-200, 1e200), (1e-170, 1e150), (1e170, 1e-150)):
        factor = Outer(maker(70, t) * scales[0], maker(t, 90) * scales[1])
        norms_close(sq_norm(factor), truth(factor))


def spoiled(factor, sample, value):
    """The factor with one number of each operand of one sample replaced."""

    def spoil(x):
        x = x.clone()
        if x[sample].numel():
            x[sample].view(-1)[x[sample].numel() // 2] = value
        return x

    return mapped(factor, spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in FACTORS if name not in ("mask", "no elements", "no positions", "no rows")])
def test_a_number_that_is_not_finite_stays_with_its_sample(name, dtype, value):
    factor = FACTORS[name][0](Maker(4, dtype))
    bad = spoiled(factor, 2, value)
    expected = truth(bad)
    for functional in (False, True):
        before, found = sq_norm(factor, functional=functional), sq_norm(bad, functional=functional)
        assert found.isfinite().tolist() == expected.isfinite().tolist()
        others = torch.tensor([0, 1, 3])
        assert_close(found[others], before[others], rtol=1e-6, atol=0)
        for ord in (1, float("inf")):
            assert norm(bad, ord, functional=functional).isfinite().tolist() == expected.isfinite().tolist()


def test_what_is_not_counted_may_be_anything():
    g = torch.randn(2, 3, 5)
    g[0, 1], g[1, 2] = float("nan"), float("inf")
    factor = Rows(torch.tensor([[4, -1, 4], [0, 9, -7]]), g, 20)
    expected = torch.stack([(g[0, 0] + g[0, 2]).square().sum(), g[1, :2].square().sum()])
    for functional in (False, True):
        assert_close(sq_norm(factor, functional=functional).float(), expected)
        assert inner(factor, Outer(torch.randn(2, 20, 2), torch.randn(2, 2, 5)), functional=functional).isfinite().all()
        assert norm(factor, 3, functional=functional).isfinite().all()


def test_zero_gradients_are_zero_and_cost_nothing(monkeypatch):
    formed = []
    original = module.formed_pieces
    monkeypatch.setattr(module, "formed_pieces", lambda *args, **kwargs: formed.append(1) or original(*args, **kwargs))
    maker = Maker(4, torch.float32)
    outer, conv = Outer(maker(70, 3), maker(3, 90)), maker.conv(SQUARE, 64, 48, 4, 5)
    outer.left[1], conv.g[1] = 0, 0
    for factor in (outer, conv):
        norms = sq_norm(factor)
        assert norms[1] == 0
        assert (norms[[0, 2, 3]] > 0).all()
    assert not formed
    outer.right[1, 0, 0] = float("inf")
    assert sq_norm(outer)[1].isnan(), "zero times infinity"


def test_high_orders():
    """The powers lie beyond float64, the norms do not."""
    maker = Maker(3, torch.float32)
    for scale in (1e25, 1e-20):
        for factor in (Outer(maker(7, 1) * scale, maker(1, 5)), Outer(maker(7, 9) * scale, maker(9, 5)), Dense(torch.zeros(3, 4))):
            largest = flat(gradients(factor)).abs().amax(1)
            for functional in (False, True):
                found = norm(factor, 200, functional=functional)
                assert_close(found, norm(factor, inf, functional=functional), rtol=0.05, atol=0)
                assert (found >= largest * (1 - 1e-5)).all()


def test_long_sums_of_float32():
    # A running sum of so many squares in float32 would be wrong in the fourth digit.
    x = torch.randn(1, 2**24 + 5, generator=torch.Generator().manual_seed(1))
    assert_close(sq_norm(Dense(x)), x.double().square().sum(1), rtol=1e-6, atol=0)
    assert_close(sq_norm(Dense(x.expand(2, -1)[:, None].transpose(1, 2))), x.double().square().sum(1).expand(2), rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returned with memory of its own."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        new = all(one.alias_info is None for one in func._schema.returns)
        for x in tree_leaves(out) if new else ():
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.dtype.itemsize)
        return out


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("product", lambda m: Outer(m(300, 1), m(1, 400))),
        ("gram", lambda m: Outer(m(300, 5), m(5, 400))),
        ("pixel_gram", lambda m: m.conv(SQUARE, 128, 96, 4, 5)),
        ("gram", lambda m: m.conv(ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1), 1), 128, 96, 5, 6)),
        ("rows", lambda m: Rows(m.places(9, 9000), m(9, 50), 9000)),
        ("terms", lambda m: add(Rows(m.places(9, 900), m(9, 50), 900), Outer(m(900, 4), m(4, 50)))),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_no_gradient_is_formed(name, make, functional):
    factor = make(Maker(8, torch.float32))
    assert norm_algorithm(factor, functional=functional) == name
    operands = []
    mapped(factor, lambda x: operands.append(x.numel()) or x)
    with Largest() as largest:
        sq_norm(factor, functional=functional)
    # As float64 an operand's memory is twice its own.
    assert largest.elements <= 8 * prod(factor.shape) // 3


def test_gradients_are_formed_within_the_scratch_memory():
    maker = Maker(16, torch.float32)
    for factor in (Outer(maker(70, 80), maker(80, 90)), maker.conv(SQUARE, 16, 32, 14, 15)):
        assert norm_algorithm(factor) == "pieces"
        one = prod(factor.shape)
        for samples in (1, 3):
            with options(scratch_bytes=4 * one * samples), Largest() as largest:
                sq_norm(factor)
                norm(factor, 1)
            assert largest.elements <= one * max(samples, 2)


def test_gram_matrices_within_the_scratch_memory():
    maker = Maker(64, torch.float32)
    factor = Outer(maker(70, 20), maker(20, 90))
    assert norm_algorithm(factor) == "gram"
    with options(scratch_bytes=4 * 3 * 400 * 5), Largest() as largest:
        sq_norm(factor)
    assert largest.elements <= 400 * 5


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_norms_differentiate_and_batch(name):
    """Through `vmap` over another axis and through derivatives; the oracle goes through the gradients themselves."""
    factor = FACTORS[name][0](Maker(3, torch.float64))
    leaves = []
    mapped(factor, lambda x: leaves.append(x) or x)

    def norm_of(function):
        def total(*operands):
            left = iter(operands)
            return function(mapped(factor, lambda x: next(left)))

        return total

    def direct(f):
        grads = f.materialize(functional=True)
        return (grads * grads).reshape(3, prod(grads.shape[1:])).sum(1)

    outside = [torch.stack((x, x.flip(0) * 0.5)) for x in leaves]
    assert_close(torch.vmap(norm_of(sq_norm))(*outside), torch.vmap(norm_of(direct))(*outside))
    jacobians = [torch.func.jacrev(norm_of(each), tuple(range(len(leaves))))(*leaves) for each in (sq_norm, direct)]
    assert_close(*jacobians)
    # Single precision has ways of its own.
    single = [x.float().requires_grad_() for x in leaves]
    double = [x.detach().double().requires_grad_() for x in single]
    found = torch.autograd.grad(norm_of(sq_norm)(*single).sum(), single)
    expected = torch.autograd.grad(norm_of(direct)(*double).sum(), double)
    assert_close([x.double() for x in found], list(expected), rtol=1e-4, atol=1e-4)
    stacked = torch.vmap(norm_of(sq_norm))(*(x.float() for x in outside))
    assert_close(stacked, torch.vmap(norm_of(direct))(*outside), rtol=1e-5, atol=0)
