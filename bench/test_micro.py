"""Micro-benchmarks of one op: `pytest bench --benchmark-only`. The answer is checked before the time is taken.

A group holds one shape, its rows the methods: the gradient summed over samples (plain), `vmap(grad)`, this library.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as plain_grad

from bench.micro import CONVS, EMBEDDINGS, LINEARS, Conv, assert_close
from per_sample import per_sample_grad

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.benchmark(disable_gc=True, warmup="on"),
]

PLAIN_CONV = {d: getattr(plain_grad, f"conv{d}d_weight") for d in (1, 2, 3)}
Loss = Callable[..., Tensor]


def _summed(loss: Loss, weight: Tensor, *args: Tensor) -> Tensor:
    leaf = weight.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *args), leaf)[0]


def _vmap(loss: Loss, weight: Tensor, *args: Tensor) -> Tensor:
    grads: Tensor = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(args)))(weight, *args)
    return grads


def _ours(loss: Loss, weight: Tensor, *args: Tensor) -> Tensor:
    grads: Tensor = per_sample_grad(loss)(weight, *args)
    return grads


METHODS = {"plain": _summed, "vmap": _vmap, "ours": _ours}
each_method = pytest.mark.parametrize("method", METHODS)


def _bench(benchmark: Any, method: str, group: str, loss: Loss, weight: Tensor, *args: Tensor) -> None:
    """Check and time: one op and the gradient of its weight, through the transform."""
    samples = [[a[i].double() if a.is_floating_point() else a[i] for a in args] for i in range(len(args[0]))]
    rows = torch.stack([_summed(loss, weight.double(), *sample) for sample in samples])
    want = rows.sum(0) if method == "plain" else rows
    run = METHODS[method]
    assert_close(run(loss, weight, *args), want)
    benchmark.group = group
    benchmark(run, loss, weight, *args)


def _vmapped(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def kernel(x: Tensor, weight_size: tuple[int, ...], g: Tensor, *options: int) -> Tensor:
        out: Tensor = torch.func.vmap(lambda x, g: plain(x[None], weight_size, g[None], *options))(x, g)
        return out

    return kernel


@each_method
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_linear(benchmark: Any, method: str, shape: tuple[int, int, int, int]) -> None:
    """`F.linear` without and with positions."""
    n, t, i, o = shape
    lead = (n, t) if t else (n,)
    x, g, weight = torch.randn(*lead, i), torch.randn(*lead, o), torch.randn(o, i)
    _bench(benchmark, method, f"linear {shape}", lambda w, x, g: (F.linear(x, w) * g).sum(), weight, x, g)


@each_method
@pytest.mark.parametrize("shape", EMBEDDINGS, ids=str)
def test_embedding(benchmark: Any, method: str, shape: tuple[int, int, int, int]) -> None:
    """`F.embedding`, whose dense result is mostly zeros."""
    n, t, v, d = shape
    index, g, weight = torch.randint(v, (n, t)), torch.randn(n, t, d), torch.randn(v, d)
    _bench(benchmark, method, f"embedding {shape}", lambda w, x, g: (F.embedding(x, w) * g).sum(), weight, index, g)


@each_method
@pytest.mark.parametrize("case", CONVS, ids=lambda c: c.name)
def test_conv(benchmark: Any, method: str, case: Conv) -> None:
    """A convolution, forward and the gradient of its weight."""
    x, weight = torch.randn(case.input), torch.randn(case.weight)
    g = torch.randn_like(case.forward(weight, x))
    _bench(benchmark, method, f"conv {case.name}", lambda w, x, g: (case.forward(w, x) * g).sum(), weight, x, g)


@each_method
@pytest.mark.parametrize("case", CONVS, ids=lambda c: c.name)
def test_conv_weight(benchmark: Any, method: str, case: Conv) -> None:
    """The weight gradient alone: `per_sample.grad.conv2d_weight` against `torch.nn.grad.conv2d_weight`."""
    x, d = torch.randn(case.input), len(case.input) - 2
    g = torch.randn_like(case.forward(torch.randn(case.weight), x))
    plain = PLAIN_CONV[d]
    if method == "ours":
        try:
            kernel = getattr(importlib.import_module("per_sample.grad"), f"conv{d}d_weight")
        except (ImportError, AttributeError) as err:
            pytest.skip(f"no kernel: {err}")
    elif method == "vmap":
        kernel = _vmapped(plain)
    else:
        kernel = plain
    rows = [plain(x[i : i + 1].double(), case.weight, g[i : i + 1].double(), *case.options) for i in range(len(x))]
    want = torch.stack(rows)
    assert_close(kernel(x, case.weight, g, *case.options), want.sum(0) if method == "plain" else want)
    benchmark.group = f"conv weight {case.name}"
    benchmark(kernel, x, case.weight, g, *case.options)
