"""The sum over samples of a convolution's weight gradients, by every way, against a loop over samples of plain autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from per_sample._kernels.conv_geometry import ConvGeometry
from per_sample._kernels.conv_sum import SUMS, conv_sum_algorithm, conv_weight_sum
from per_sample._options import options
from test_conv_kernels import GROUPED, SQUARE, cases, loop, operands


@settings(deadline=None, max_examples=50, derandomize=True)
@given(cases().filter(lambda case: case[1] and case[2]), st.sampled_from([1, 3000, 2**26]))
def test_every_way_agrees_with_the_loop(case, scratch):
    geometry, n, b, sizes, i, o = case
    x, g = operands(geometry, n, b, sizes, i, o)
    expected = loop(x, g, geometry).sum(0)
    with options(scratch_bytes=scratch):
        for name in (None, *SUMS):
            assert_close(conv_weight_sum(x, g, geometry, algorithm=name), expected)
        assert_close(conv_weight_sum(x, g, geometry, functional=True), expected)


def test_output_gradients_that_leave_out_locations():
    geometry = ConvGeometry((3, 2), (2, 3), (1, 0), (1, 1), 1)
    x, g = operands(geometry, 3, 2, (10, 11), 4, 5)
    g = g[..., :-1, :-2]
    expected = loop(x, torch.nn.functional.pad(g, (0, 2, 0, 1)), geometry).sum(0)
    for name in (None, *SUMS):
        assert_close(conv_weight_sum(x, g, geometry, algorithm=name), expected)


@pytest.mark.parametrize("geometry", [SQUARE, GROUPED], ids=["square", "grouped"])
@pytest.mark.parametrize("name", SUMS)
def test_strided_operands(name, geometry):
    x, g = operands(geometry, b=2)
    x_strided = x.movedim(2, -1).contiguous().movedim(-1, 2)
    g_strided = g.transpose(0, -1).contiguous().transpose(0, -1)
    assert_close(conv_weight_sum(x_strided, g_strided, geometry, algorithm=name), loop(x, g, geometry).sum(0))


@pytest.mark.parametrize(
    ("n", "c", "o", "kernel", "size", "groups", "expected"),
    [
        (8, 512, 512, 3, 4, 1, "product"),
        (32, 512, 512, 3, 4, 1, "plain"),
        (8, 64, 64, 3, 32, 1, "plain"),
        (16, 64, 2, 1, 16, 1, "product"),
        (16, 64, 32, 1, 16, 1, "plain"),
        (8, 96, 96, 7, 14, 96, "formed"),
        (8, 96, 96, 7, 3, 96, "plain"),
        (8, 96, 96, 3, 14, 96, "plain"),
        (8, 128, 128, 3, 28, 32, "formed"),
        (16, 256, 256, 3, 14, 32, "plain"),
        (8, 32, 96, 5, 14, 32, "product"),
        (8, 32, 96, 1, 14, 32, "plain"),
    ],
    ids=str,
)
def test_the_way_by_shape(n, c, o, kernel, size, groups, expected):
    geometry = ConvGeometry((kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1), groups)
    x, g = torch.empty(n, 1, c, size, size), torch.empty(n, 1, o, size, size)
    assert conv_sum_algorithm(x, g, geometry) == expected
    # Scratch memory for the unfolded input must be granted; derivatives and other devices get what torch has.
    with options(scratch_bytes=1):
        assert conv_sum_algorithm(x, g, geometry) == (expected if expected == "formed" else "plain")
    assert conv_sum_algorithm(x, g, geometry, functional=True) == "plain"
    assert conv_sum_algorithm(x.requires_grad_(), g, geometry) == "plain"
    assert conv_sum_algorithm(x.to("meta"), g.to("meta"), geometry) == "plain"


def test_the_way_of_volumes_and_of_one_channel():
    volume = ConvGeometry((3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, 1)
    for c, expected in ((3, "plain"), (8, "formed"), (16, "plain")):
        assert conv_sum_algorithm(torch.empty(4, 1, c, 8, 16, 16), torch.empty(4, 1, 32, 8, 16, 16), volume) == expected
    planar = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert conv_sum_algorithm(torch.empty(4, 1, 32, 16, 16), torch.empty(4, 1, 1, 16, 16), planar) == "formed"


def test_no_samples():
    x, g = operands(SQUARE, n=0)
    assert conv_sum_algorithm(x, g, SQUARE) == "plain"
