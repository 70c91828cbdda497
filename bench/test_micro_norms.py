"""Micro-benchmarks of the norms of one weight's gradients: `pytest bench --benchmark-only -k norm`.

From what the backward pass yields for the weight. A group holds one shape, its rows the ways: the gradient summed over samples
(plain), every gradient formed and squared (formed), each way of the kernels, and the one that is chosen (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import grad as plain_grad

from bench.micro import CONVS, EMBEDDINGS, LINEARS, Conv, assert_close
from per_sample._factors import ConvOuter, Factor, Outer, Rows
from per_sample._kernels.conv_geometry import ConvGeometry
from per_sample._kernels.conv_norm import conv_sq_norm
from per_sample._kernels.outer_norm import outer_sq_norm
from per_sample.quantities.sq_norm import sq_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.benchmark(disable_gc=True, warmup="on"),
]

FEW = ("plain", "formed", "ours")


def _formed(factor: Factor) -> Tensor:
    return factor.materialize().flatten(1).square().sum(1)


def _first(kernel: Callable[..., Any], *args: Any) -> Callable[[], Tensor]:
    """The kernel's norms, without what says where they are doubtful."""
    return lambda: kernel(*args)[0]


def _bench(benchmark: Any, group: str, method: str, factor: Factor, ways: dict[str, Callable[[], Tensor]]) -> None:
    """Check and time; ``ways`` besides those of every factor, plain among them."""
    ways = {"formed": partial(_formed, factor), "ours": partial(sq_norm, factor), **ways}
    run = ways[method]
    grads = factor.materialize().double()
    assert_close(run(), grads.sum(0) if method == "plain" else grads.flatten(1).square().sum(1))
    benchmark.group = f"norm {group}"
    benchmark(run)


# Larger Gram matrices of pixels than this, all samples together, take seconds.
MOST_PAIRS = 2**26


def _kernels(case: Conv) -> tuple[str, ...]:
    """Those worth a row; none knows groups, for which the gradients are formed a few samples at a time."""
    if case.groups > 1:
        return ()
    return ("gram", "pixel_gram") if case.input[0] * prod(case.input[2:]) ** 2 <= MOST_PAIRS else ("gram",)


LINEAR_ROWS = [(shape, way) for shape in LINEARS for way in (*FEW, "gram" if shape[1] else "product")]
CONV_ROWS = [(case, way) for case in CONVS for way in (*FEW, *_kernels(case))]


@pytest.mark.parametrize(("shape", "method"), LINEAR_ROWS, ids=str)
def test_linear_norm(benchmark: Any, shape: tuple[int, int, int, int], method: str) -> None:
    """A linear layer's weight, without and with positions."""
    n, t, i, o = shape
    left, right = torch.randn(n, o, max(t, 1)), torch.randn(n, max(t, 1), i)
    kernels = {way: _first(outer_sq_norm, left, right, way) for way in ("gram", "product")}
    summed = lambda: left.transpose(0, 1).flatten(1) @ right.flatten(0, 1)  # noqa: E731
    _bench(benchmark, f"linear {shape}", method, Outer(left, right), {"plain": summed, **kernels})


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("shape", EMBEDDINGS, ids=str)
def test_embedding_norm(benchmark: Any, shape: tuple[int, int, int, int], method: str) -> None:
    """An embedding's matrix."""
    n, t, v, d = shape
    index, g = torch.randint(v, (n, t)), torch.randn(n, t, d)
    summed = lambda: torch.zeros(v, d).index_add_(0, index.flatten(), g.flatten(0, 1))  # noqa: E731
    _bench(benchmark, f"embedding {shape}", method, Rows(index, g, v), {"plain": summed})


@pytest.mark.parametrize(("case", "method"), CONV_ROWS, ids=lambda value: value.name if isinstance(value, Conv) else value)
def test_conv_norm(benchmark: Any, case: Conv, method: str) -> None:
    """A convolution's weight."""
    x, weight = torch.randn(case.input), torch.randn(case.weight)
    g = torch.randn_like(case.forward(weight, x))
    d = len(case.input) - 2
    geometry = ConvGeometry(case.weight[2:], (case.stride,) * d, (case.padding,) * d, (case.dilation,) * d, case.groups)
    factor = ConvOuter(x.unsqueeze(1), g.unsqueeze(1), geometry)
    summed = partial(getattr(plain_grad, f"conv{d}d_weight"), x, case.weight, g, *case.options)
    kernels = {way: _first(conv_sq_norm, factor.x, factor.g, geometry, way) for way in ("gram", "pixel_gram")}
    _bench(benchmark, f"conv {case.name}", method, factor, {"plain": summed, **kernels})
