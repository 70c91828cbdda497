"""Every way to a squared norm, forced, against the gradients themselves."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from per_sample._factors import ConvGeometry, ConvOuter, Outer
from per_sample._kernels import gram_norm, outer_norm
from per_sample._kernels.conv_norm import conv_norm_algorithm, conv_sq_norm
from per_sample._kernels.gram_norm import gram
from per_sample._kernels.onednn import available
from per_sample._kernels.outer_norm import outer_norm_algorithm, outer_sq_norm
from per_sample._options import options
from per_sample.quantities.sq_norm import norm_algorithm, sq_norm
from test_conv_kernels import cases, loop, operands


def squared(gradients):
    """The oracle: each sample's numbers, squared and added."""
    return (gradients.double() ** 2).reshape(gradients.shape[0], prod(gradients.shape[1:])).sum(1)


def sides(n, e, o, t, i, dtype=torch.float64, seed=5):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n, *e, o, t, dtype=torch.float64, generator=generator).to(dtype)
    return left, torch.randn(n, *e, t, i, dtype=torch.float64, generator=generator).to(dtype)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from([0, 1, 3]),
    st.sampled_from([(), (2,), (2, 7)]),
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(1, 9),
    st.sampled_from([1, 500, 2**26]),
    st.booleans(),
)
def test_outer_products(n, e, o, t, i, scratch, functional):
    left, right = sides(n, e, o, t, i)
    expected = squared(torch.einsum("n...ot,n...ti->n...oi", left, right))
    with options(scratch_bytes=scratch):
        for name in ("gram", "product") if t == 1 else ("gram",):
            assert_close(outer_sq_norm(left, right, name, functional=functional)[0], expected)
            # Of any strides.
            swapped = left.transpose(-1, -2).contiguous().transpose(-1, -2)
            assert_close(outer_sq_norm(swapped, right[..., :1].expand_as(right), name)[0], squared(left @ right[..., :1].expand_as(right)))
        assert_close(sq_norm(Outer(left, right), functional=functional), expected)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(cases(), st.sampled_from([1, 3000, 2**26]), st.booleans())
def test_convolutions(case, scratch, functional):
    geometry, n, b, sizes, i, o = case
    x, g = operands(geometry, n, b, sizes, i, o)
    expected = squared(loop(x, g, geometry))
    with options(scratch_bytes=scratch):
        if geometry.groups == 1 and b:
            for name in ("gram", "pixel_gram"):
                assert_close(conv_sq_norm(x, g, geometry, name, functional=functional)[0], expected)
        assert_close(sq_norm(ConvOuter(x, g, geometry), functional=functional), expected)


@pytest.mark.parametrize("name", ["gram", "pixel_gram"])
def test_output_gradients_that_leave_out_locations(name):
    # As a transposed convolution has them: its `x` is the output's gradient, and not all of it was reached.
    geometry = ConvGeometry((3, 2), (2, 3), (1, 0), (1, 1), 1)
    x, g = operands(geometry, 3, 2, (10, 11), 4, 5)
    g = g[..., :-1, :-2]
    full = torch.nn.functional.pad(g, (0, 2, 0, 1))
    assert_close(conv_sq_norm(x, g, geometry, name)[0], squared(loop(x, full, geometry)))
    assert_close(sq_norm(ConvOuter(x, g, geometry)), squared(loop(x, full, geometry)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("functional", [False, True])
def test_lower_precision(dtype, functional):
    left, right = sides(3, (), 70, 5, 90, dtype)
    expected = squared(left.double() @ right.double())
    found, _ = outer_sq_norm(left, right, "gram", functional=functional)
    assert_close(found, expected, rtol=1e-6, atol=0)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    x, g = (each.to(dtype) for each in operands(geometry, 3, 1, (5, 4), 6, 7))
    expected = squared(loop(x.double(), g.double(), geometry))
    for name in ("gram", "pixel_gram"):
        assert_close(conv_sq_norm(x, g, geometry, name, functional=functional)[0], expected, rtol=1e-6, atol=0)


def conv_sizes(c, o, kernel, stride, padding, size, groups=1, b=1):
    geometry = ConvGeometry((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), groups)
    return torch.empty(2, b, c, size, size), torch.empty(2, b, o, *geometry.locations((size, size))), geometry


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((64, 64, 3, 1, 1, 32), "pieces"),
        ((128, 128, 3, 1, 1, 28), "pieces"),
        ((256, 256, 3, 1, 1, 8), "pixel_gram"),
        ((256, 256, 3, 1, 1, 14), "pixel_gram"),
        ((512, 512, 3, 1, 1, 7), "pixel_gram"),
        ((128, 256, 3, 2, 1, 16), "gram"),
        ((512, 2048, 1, 1, 0, 7), "gram"),
        ((64, 128, 1, 2, 0, 32), "pieces"),
        ((512, 512, 3, 1, 1, 7, 512), "pieces"),
        ((512, 512, 3, 1, 1, 7, 32), "pieces"),
        ((512, 512, 3, 1, 1, 7, 1, 40), "pieces"),
        ((3, 8, 16, 16, 0, 224), "pieces"),
    ],
    ids=str,
)
def test_the_way_of_convolutions(sizes, expected):
    x, g, geometry = conv_sizes(*sizes)
    assert conv_norm_algorithm(x, g, geometry) == expected
    assert norm_algorithm(ConvOuter(x, g, geometry)) == expected
    # In float64 no product is exact enough for norms that nobody may look at.
    assert conv_norm_algorithm(x.double(), g.double(), geometry, functional=True) == "pieces"


@pytest.mark.parametrize(
    ("o", "t", "i", "expected"),
    [
        (768, 1, 768, "product"),
        (768, 2, 768, "gram"),
        (768, 256, 768, "gram"),
        (768, 512, 768, "pieces"),
        (10, 2, 512, "gram"),
        (10, 64, 512, "pieces"),
        (0, 2, 512, "pieces"),
        (10, 0, 512, "pieces"),
    ],
)
def test_the_way_of_outer_products(o, t, i, expected):
    left, right = torch.empty(2, o, t), torch.empty(2, t, i)
    assert outer_norm_algorithm(left, right) == expected
    assert norm_algorithm(Outer(left, right)) == expected
    complexes = outer_norm_algorithm(left.to(torch.complex64), right.to(torch.complex64))
    assert complexes == "pieces"
    assert outer_norm_algorithm(left.double(), right.double(), functional=True) == ("product" if t == 1 else "pieces")
    if expected == "gram" and t == 256:
        assert outer_norm_algorithm(left, right, functional=True) == "pieces", "float64 costs twice as much"


@pytest.mark.skipif(not available(), reason="this build of torch has no oneDNN product")
def test_gram_by_onednn(monkeypatch):
    monkeypatch.setattr(gram_norm, "fast_mm", lambda: False)
    calls = []
    original = gram_norm.inner_product
    monkeypatch.setattr(gram_norm, "inner_product", lambda *args: calls.append(1) or original(*args))
    x = sides(3, (), 64, 70, 260, torch.float32)[1]
    assert_close(gram(x, functional=False), x @ x.mT, rtol=1e-5, atol=1e-4)
    assert len(calls) == 3
    gram(x, functional=True), gram(x.double(), functional=False)
    assert len(calls) == 3


def test_rounded_products_are_not_used(monkeypatch):
    """Where the user lets products of float32 matrices be rounded (TF32, bfloat16), Gram matrices are taken in float64."""
    left, right = sides(3, (), 70, 5, 90, torch.float32)
    seen = []
    original = outer_norm.gram
    monkeypatch.setattr(outer_norm, "gram", lambda x, **kwargs: seen.append(x.dtype) or original(x, **kwargs))
    sq_norm(Outer(left, right))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = sq_norm(Outer(left, right))
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [torch.float32] * 2 + [torch.float64] * 2
    assert_close(found, squared(left.double() @ right.double()))
