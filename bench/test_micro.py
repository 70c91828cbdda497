"""Micro-benchmarks of one op: `pytest bench --benchmark-only`. The answer is checked before the time is taken.

A group holds one shape, its rows the methods: the gradient summed over samples (plain), `vmap(grad)`, this library.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as plain_grad

from per_sample import per_sample_grad

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.benchmark(disable_gc=True, warmup="on"),
]

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PLAIN_CONV = {d: getattr(plain_grad, f"conv{d}d_weight") for d in CONV}


@dataclass(frozen=True)
class Conv:
    """Input `(n, c, *s)`, weight `(o, c / groups, *k)`."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def options(self) -> tuple[int, int, int, int]:
        """In the order of torch.nn.grad."""
        return self.stride, self.padding, self.dilation, self.groups

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        """The convolution, of a batch or of one sample."""
        out: Tensor = CONV[len(self.input) - 2](x, weight, None, *self.options)
        return out


CONVS = (
    Conv("mnist-first", (256, 1, 28, 28), (16, 1, 8, 8), stride=2, padding=3),
    Conv("mnist-second", (256, 16, 13, 13), (32, 16, 4, 4), stride=2),
    Conv("resnet-early", (8, 64, 32, 32), (64, 64, 3, 3), padding=1),
    Conv("resnet-late", (8, 512, 4, 4), (512, 512, 3, 3), padding=1),
    Conv("resnet-short", (8, 64, 32, 32), (128, 64, 1, 1), stride=2),
    Conv("depthwise", (32, 64, 14, 14), (64, 1, 3, 3), padding=1, groups=64),
    Conv("dilated", (16, 32, 20, 20), (32, 32, 3, 3), padding=2, dilation=2),
    Conv("audio", (16, 1, 8000), (64, 1, 80), stride=4),
    Conv("video", (4, 8, 8, 16, 16), (16, 8, 3, 3, 3), padding=1),
)
# n, positions (0: none), in, out
LINEARS = (
    (128, 0, 784, 1024),
    (256, 0, 512, 32),
    (8, 0, 16, 32),
    (16, 64, 256, 1024),
    (16, 64, 256, 1000),
    (4, 1024, 64, 64),
)
# n, positions, vocabulary, dim
EMBEDDINGS = ((16, 64, 1000, 256), (8, 128, 5000, 32))

Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """As in the big table."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


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
    _assert_close(run(loss, weight, *args), want)
    benchmark.group = group
    benchmark(run, loss, weight, *args)


def _assert_close(got: Tensor, want: Tensor) -> None:
    """Rounding of long float32 sums is relative to the largest entry, not to each."""
    scale = float(want.abs().max())
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=1e-4)


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
    _assert_close(kernel(x, case.weight, g, *case.options), want.sum(0) if method == "plain" else want)
    benchmark.group = f"conv weight {case.name}"
    benchmark(kernel, x, case.weight, g, *case.options)
