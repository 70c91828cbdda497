"""Squared norms, norms of any order and inner products of every form of gradients, against the gradients of each sample."""

from __future__ import annotations

from math import inf, prod

import pytest
import torch
from torch.testing import assert_close

from per_sample._factors import ConvGeometry, ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View, add
from per_sample._options import options
from per_sample.quantities.norm import norm
from per_sample.quantities.precision import operands as operands_of
from per_sample.quantities.settle import settled
from per_sample.quantities.sq_norm import inner, norm_algorithm, sq_norm
from test_conv_kernels import loop

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128]
PLAIN = ConvGeometry((3, 2), (1, 2), (1, 1), (1, 1), 1)
TINY = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
GROUPED = ConvGeometry((2,), (2,), (1,), (2,), 3)


class Maker:
    """Random operands of one dtype."""

    def __init__(self, n: int, dtype: torch.dtype, seed: int = 11) -> None:
        self.n, self.dtype = n, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        return torch.randn(self.n, *shape, dtype=wide, generator=self.generator).to(self.dtype)

    def places(self, t: int, rows: int) -> torch.Tensor:
        return torch.randint(-1, rows, (self.n, t), generator=self.generator)

    def conv(self, geometry: ConvGeometry, c: int, o: int, *sizes: int, b: int = 1) -> ConvOuter:
        return ConvOuter(self(b, c, *sizes), self(b, o, *geometry.locations(sizes)), geometry)


FACTORS = {
    # name: what makes the factor, the way its norm goes in float32 (None: that of the whole is not looked at)
    "dense": (lambda m: Dense(m(7, 5)), "square"),
    "scalar": (lambda m: Dense(m()), "square"),
    "no elements": (lambda m: Dense(m(4, 0)), "square"),
    "one position": (lambda m: Outer(m(7, 1), m(1, 5)), "product"),
    "blocks, one position": (lambda m: Outer(m(2, 4, 7, 1), m(2, 4, 1, 5)), "product"),
    "few positions": (lambda m: Outer(m(70, 3), m(3, 90)), "gram"),
    "blocks, few positions": (lambda m: Outer(m(2, 70, 3), m(2, 3, 90)), "gram"),
    "many positions": (lambda m: Outer(m(7, 40), m(40, 5)), "pieces"),
    "no positions": (lambda m: Outer(m(7, 0), m(0, 5)), "pieces"),
    "conv": (lambda m: m.conv(PLAIN, 4, 5, 9, 8), "pieces"),
    "deep conv": (lambda m: m.conv(TINY, 64, 48, 4, 5), "pixel_gram"),
    "deep conv, batch of its own": (lambda m: m.conv(TINY, 64, 48, 3, 2, b=2), "pixel_gram"),
    "deep strided conv": (lambda m: m.conv(ConvGeometry((3, 3), (2, 3), (1, 1), (1, 1), 1), 64, 48, 7, 8), "gram"),
    "grouped conv": (lambda m: m.conv(GROUPED, 6, 9, 11), "pieces"),
    "rows": (lambda m: Rows(m.places(9, 30), m(9, 5), 30), "rows"),
    "rows, few places": (lambda m: Rows(m.places(9, 4), m(9, 5), 4), "pieces"),
    "no rows": (lambda m: Rows(m.places(0, 4), m(0, 5), 4), "rows"),
    "view": (lambda m: View(Outer(m(70, 3), m(3, 90)), (7, 10, 90)), "gram"),
    "mask": (lambda m: Hadamard(Outer(m(7, 3), m(3, 5)), torch.arange(35).reshape(7, 5) % 3 > 0), "pieces"),
    "two outer products": (lambda m: add(Outer(m(70, 2), m(2, 90)), Outer(m(70, 3), m(3, 90))), "gram"),
    "two rows": (lambda m: add(Rows(m.places(4, 30), m(4, 5), 30), Rows(m.places(6, 30), m(6, 5), 30)), "rows"),
    "two convs": (lambda m: add(m.conv(TINY, 64, 48, 3, 2), m.conv(TINY, 64, 48, 3, 2)), "pixel_gram"),
    "two convs of other sizes": (lambda m: add(m.conv(TINY, 64, 48, 3, 2), m.conv(TINY, 64, 48, 4, 5)), "pieces"),
    "two dense": (lambda m: add(Dense(m(7, 5)), Dense(m(7, 5))), "pieces"),
    "two views": (lambda m: add(View(Outer(m(70, 2), m(2, 90)), (6300,)), View(Outer(m(70, 2), m(2, 90)), (6300,))), "gram"),
    "two unlike views": (lambda m: add(View(Outer(m(6, 2), m(2, 10)), (60,)), View(Outer(m(12, 2), m(2, 5)), (60,))), "pieces"),
    "tied": (lambda m: add(Rows(m.places(9, 100), m(9, 50), 100), Outer(m(100, 4), m(4, 50))), "terms"),
    "tied, many positions": (lambda m: add(Rows(m.places(9, 10), m(9, 5), 10), Outer(m(10, 14), m(14, 5))), "pieces"),
    "everything": (
        lambda m: Sum((Rows(m.places(9, 10), m(9, 5), 10), Outer(m(10, 2), m(2, 5)), Dense(m(10, 5)), Outer(m(10, 1), m(1, 5)))),
        "pieces",
    ),
}


def exact(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def gradients(factor: Factor) -> torch.Tensor:
    """The oracle: every sample's gradient in float64, by loops and einsum."""
    if isinstance(factor, Dense):
        return exact(factor.value)
    if isinstance(factor, Outer):
        return torch.einsum("n...ot,n...ti->n...oi", exact(factor.left), exact(factor.right))
    if isinstance(factor, ConvOuter):
        return loop(exact(factor.x), exact(factor.g), factor.geometry)
    if isinstance(factor, Rows):
        out = torch.zeros(factor.index.shape[0], *factor.shape, dtype=exact(factor.g).dtype)
        for n, places in enumerate(factor.index.tolist()):
            for t, place in enumerate(places):
                if place >= 0:
                    out[n, place] += factor.g[n, t]
        return out
    if isinstance(factor, Hadamard):
        return gradients(factor.base) * factor.by
    if isinstance(factor, View):
        base = gradients(factor.base)
        return base.reshape(base.shape[0], *factor.shape)
    assert isinstance(factor, Sum)
    return torch.stack([gradients(term) for term in factor.terms]).sum(0)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], prod(x.shape[1:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FACTORS)
def test_sq_norm(name, dtype):
    make, way = FACTORS[name]
    for n in (0, 1, 3):
        factor = make(Maker(n, dtype))
        grads = gradients(factor)
        expected = flat(grads).abs().square().sum(1)
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if grads.dtype == dtype else {"rtol": 5e-6, "atol": 0}
        for functional in (False, True):
            found = sq_norm(factor, functional=functional)
            assert found.dtype == torch.float64
            assert_close(found, expected, **tolerance)
            with options(scratch_bytes=1):
                assert_close(sq_norm(factor, functional=functional), expected, **tolerance)
            norms, kept = settled(factor, functional=functional)
            assert_close(norms, expected, **tolerance)
            # Half precision is widened before anything is formed, unless nothing is.
            assert_close(
                exact(kept.materialize()), grads, rtol=3e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-1 if dtype.itemsize == 2 else 1e-4
            )
    if dtype == torch.float32:
        assert norm_algorithm(factor) == way


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("name", FACTORS)
def test_norms_of_any_order(name, dtype):
    factor = FACTORS[name][0](Maker(3, dtype))
    sizes = flat(gradients(factor)).abs()
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype != torch.float32 else {"rtol": 2e-5, "atol": 0}
    for ord in (0.5, 1, 2, 3, 40, inf):
        if ord == inf:
            expected = sizes.amax(1) if sizes.shape[1] else sizes.sum(1)
        else:
            expected = (sizes**ord).sum(1) ** (1 / ord)
        for functional in (False, True):
            assert_close(norm(factor, ord, functional=functional), expected, **tolerance)
            with options(scratch_bytes=1):
                assert_close(norm(factor, ord, functional=functional), expected, **tolerance)


PAIRS = {
    "outer, rows": lambda m: (Outer(m(10, 3), m(3, 6)), Rows(m.places(7, 10), m(7, 6), 10)),
    "rows, outer": lambda m: (Rows(m.places(7, 10), m(7, 6), 10), Outer(m(10, 3), m(3, 6))),
    "outer, outer": lambda m: (Outer(m(10, 3), m(3, 6)), Outer(m(10, 4), m(4, 6))),
    "rows, rows": lambda m: (Rows(m.places(7, 10), m(7, 6), 10), Rows(m.places(5, 10), m(5, 6), 10)),
    "conv, dense": lambda m: (m.conv(PLAIN, 4, 5, 9, 8), Dense(m(5, 4, 3, 2))),
    "view, view": lambda m: (View(Outer(m(10, 3), m(3, 6)), (60,)), View(Rows(m.places(7, 10), m(7, 6), 10), (60,))),
    "view, dense": lambda m: (View(Outer(m(10, 3), m(3, 6)), (60,)), Dense(m(60))),
    "sum, outer": lambda m: (add(Outer(m(10, 3), m(3, 6)), Dense(m(10, 6))), Outer(m(10, 4), m(4, 6))),
    "scalars": lambda m: (Dense(m()), Dense(m())),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_inner(name, dtype):
    for n in (0, 1, 3):
        a, b = PAIRS[name](Maker(n, dtype))
        expected = (flat(gradients(a)).conj() * flat(gradients(b))).real.sum(1)
        same = exact(a.like).dtype == dtype
        for scratch in (1, 2**26):
            for functional in (False, True):
                with options(scratch_bytes=scratch):
                    found = inner(a, b, functional=functional)
                assert_close(found, expected, rtol=1e-10 if same else 1e-4, atol=1e-10 if same else 1e-3)


@pytest.mark.parametrize("name", FACTORS)
def test_what_is_kept_takes_no_more_memory(name):
    factor = FACTORS[name][0](Maker(3, torch.float32))
    _, kept = settled(factor)
    before, after = (sum(x.numel() for x in operands_of(each)) for each in (factor, kept))
    assert after <= before
    formed = norm_algorithm(factor) == "pieces" and 3 * prod(factor.shape) <= before
    assert isinstance(kept, Dense) if formed else kept is factor
