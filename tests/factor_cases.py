"""Factors of every form, and what they stand for by plain loops and sums."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View
from per_sample._kernels.conv import ConvGeometry
from per_sample.quantities.precision import mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def dense(factor: Factor) -> Tensor:
    """The gradients in float64, without the library's kernels."""
    if isinstance(factor, Dense):
        return factor.value.to(double(factor))
    if isinstance(factor, Outer):
        return torch.einsum("n...ot,n...ti->n...oi", factor.left.to(double(factor)), factor.right.to(double(factor)))
    if isinstance(factor, ConvOuter):
        return conv_dense(factor)
    if isinstance(factor, Rows):
        out = torch.zeros(len(factor.index), *factor.shape, dtype=double(factor))
        for n, (index, g) in enumerate(zip(factor.index.tolist(), factor.g, strict=True)):
            for row, value in zip(index, g, strict=True):
                if row >= 0:
                    out[n, row] += value
        return out
    if isinstance(factor, Sum):
        return sum(dense(term) for term in factor.terms)
    if isinstance(factor, Hadamard):
        return dense(factor.base) * factor.by
    value = dense(factor.base)
    return value.reshape(len(value), *factor.shape)


def double(factor: Factor) -> torch.dtype:
    return torch.complex128 if factor.like.is_complex() else torch.float64


def conv_dense(factor: ConvOuter) -> Tensor:
    geometry, dtype = factor.geometry, double(factor)
    grads = [torch.zeros(0, *factor.shape, dtype=dtype)]
    for x, g in zip(factor.x.to(dtype), factor.g.to(dtype), strict=True):
        weight = torch.zeros(factor.shape, dtype=dtype, requires_grad=True)
        if 0 in (*x.shape, *g.shape, *factor.shape):
            grads.append(weight.detach()[None])
            continue
        out = CONV[len(geometry.kernel)](x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        for axis, size in enumerate(g.shape[2:], start=2):
            out = out.narrow(axis, 0, size)
        grads.append(torch.autograd.grad(out, weight, g)[0][None])
    return torch.cat(grads)


class Made:
    """Makes operands, the same ones for the same seed."""

    def __init__(self, n: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> None:
        self.n, self.dtype, self.generator = n, dtype, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, generator=self.generator)

    def shared(self, *shape: int) -> Tensor:
        """What does not depend on the samples or their number."""
        return torch.randn(shape, dtype=self.dtype, generator=torch.Generator().manual_seed(11))

    def outer(self, o: int, t: int, i: int, *e: int) -> Outer:
        return Outer(self.normal(self.n, *e, o, t), self.normal(self.n, *e, t, i))

    def turned(self, o: int, t: int, i: int) -> Outer:
        """In the strides that a linear layer leaves."""
        return Outer(self.normal(self.n, t, o).transpose(1, 2), self.normal(self.n, t, i))

    def rows(self, num: int, t: int, i: int, low: int = -1) -> Rows:
        return Rows(torch.randint(low, num, (self.n, t), generator=self.generator), self.normal(self.n, t, i), num)

    def conv(
        self, geometry: ConvGeometry, sizes: Sequence[int], b: int = 1, i: int = 2, o: int = 5, missing: Sequence[int] = (0, 0, 0)
    ) -> ConvOuter:
        locations = [size - less for size, less in zip(geometry.locations(sizes), missing, strict=False)]
        x = self.normal(self.n, b, i * geometry.groups, *sizes)
        return ConvOuter(x, self.normal(self.n, b, o * geometry.groups, *locations), geometry)


PLAIN = ConvGeometry((3, 2), (2, 1), (1, 0), (1, 2), 1)
GROUPED = ConvGeometry((2, 3), (1, 2), (2, 0), (2, 1), 3)
LINE = ConvGeometry((3,), (2,), (1,), (1,), 1)
SOLID = ConvGeometry((2, 1, 3), (1, 2, 1), (0, 1, 1), (1, 1, 1), 1)
POINT = ConvGeometry((3, 2), (1, 1), (0, 0), (1, 1), 1)

CASES: dict[str, Callable[[Made], Factor]] = {
    "dense": lambda m: Dense(m.normal(m.n, 4, 5)),
    "number": lambda m: Dense(m.normal(m.n)),
    "vector": lambda m: Dense(m.normal(m.n, 6)),
    "no-elements": lambda m: Dense(m.normal(m.n, 0, 3)),
    "outer-1": lambda m: m.outer(4, 1, 5),
    "outer": lambda m: m.outer(4, 3, 7),
    "outer-turned": lambda m: m.turned(6, 3, 9),
    "outer-long": lambda m: m.outer(2, 9, 5),
    "outer-wide": lambda m: m.outer(40, 2, 50),
    "outer-extra": lambda m: m.outer(4, 3, 6, 2),
    "outer-extras-1": lambda m: m.outer(4, 1, 6, 2, 3),
    "outer-0": lambda m: m.outer(4, 0, 5),
    "outer-no-rows": lambda m: m.outer(0, 3, 5),
    "conv": lambda m: m.conv(PLAIN, (9, 7)),
    "conv-b": lambda m: m.conv(PLAIN, (9, 7), b=2),
    "conv-no-b": lambda m: m.conv(PLAIN, (9, 7), b=0),
    "conv-line": lambda m: m.conv(LINE, (8,)),
    "conv-solid": lambda m: m.conv(SOLID, (4, 5, 3), b=2),
    "conv-grouped": lambda m: m.conv(GROUPED, (6, 8), b=2, i=2, o=4),
    "conv-depthwise": lambda m: m.conv(GROUPED, (6, 8), i=1, o=1),
    "conv-less": lambda m: m.conv(PLAIN, (9, 7), missing=(1, 2)),
    "conv-point": lambda m: m.conv(POINT, (3, 2), i=6, o=7),
    "rows": lambda m: m.rows(7, 6, 3),
    "rows-all": lambda m: m.rows(4, 9, 3, low=0),
    "rows-few": lambda m: m.rows(90, 3, 2),
    "rows-0": lambda m: m.rows(7, 0, 3),
    "sum-outers": lambda m: Sum((m.outer(6, 2, 5), m.outer(6, 1, 5), m.turned(6, 3, 5))),
    "sum-tied": lambda m: Sum((m.outer(7, 2, 3), m.rows(7, 4, 3))),
    "sum-tied-wide": lambda m: Sum((m.outer(70, 2, 30), m.rows(70, 4, 30))),
    "sum-conv": lambda m: Sum((m.conv(POINT, (4, 3)), View(m.outer(5, 2, 12), (5, 2, 3, 2)))),
    "sum-mixed": lambda m: Sum((m.outer(4, 2, 6), Dense(m.normal(m.n, 4, 6)), View(m.outer(3, 2, 8), (4, 6)))),
    "view": lambda m: View(m.outer(4, 3, 6), (2, 2, 6)),
    "view-same-rows": lambda m: View(m.outer(4, 3, 6), (4, 3, 2)),
    "view-rows": lambda m: View(m.rows(7, 2, 3), (21,)),
    "view-conv": lambda m: View(m.conv(GROUPED, (6, 8)), (15, 12)),
    "masked": lambda m: Hadamard(m.outer(4, 3, 6), m.shared(4, 6).abs() > 0.5),
    "times": lambda m: Hadamard(m.outer(4, 1, 6), m.shared(4, 6)),
    "times-conv": lambda m: Hadamard(m.conv(PLAIN, (9, 7)), m.shared(5, 2, 3, 2)),
}
# One of each way, where every combination would take too long.
FEW = ["dense", "outer-1", "outer", "outer-extra", "conv", "conv-grouped", "rows", "sum-tied", "view", "masked"]
# Samples, dtype, functional, scratch memory: enough of the combinations that each pair of values meets.
WAYS = [
    (4, torch.float64, False, 2**26),
    (3, torch.float64, True, 300),
    (3, torch.complex128, False, 300),
    (2, torch.complex128, True, 2**26),
    (1, torch.float64, False, 300),
    (0, torch.float64, False, 2**26),
    (0, torch.complex128, True, 300),
]


def made(case: str, n: int = 3, dtype: torch.dtype = torch.float64, seed: int = 5) -> Factor:
    return CASES[case](Made(n, dtype, seed))


def direction_for(factor: Factor) -> Tensor:
    generator = torch.Generator().manual_seed(23)
    return torch.randn(factor.shape, dtype=double(factor), generator=generator)


def with_operands(factor: Factor, tensors: Sequence[Tensor]) -> Factor:
    """The factor with these operands in place of its own."""
    following = iter(tensors)
    return mapped(factor, lambda _: next(following))


def flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), prod(x.shape[1:]))


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an op returned, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Memory for results is asked of the C library by a tensor of bytes that nothing touches.
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.dtype != torch.uint8]
        self.numel = max([self.numel, *sizes])
        return out
