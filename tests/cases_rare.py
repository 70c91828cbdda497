"""Rows of the table for ops that programs seldom name: untagged in-place forms, and ops reached by name alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from case import Case, cplx, order, real

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

aten = torch.ops.aten
_SHAPE = (4, 5)


def _rare(name: str, fn: Callable[[Tensor], Any], *shape: int, **options: Any) -> Case:
    shape = shape or _SHAPE
    return Case(f"rare-{name}", lambda p, x: fn(p[0] * x), (real(*shape),), (real(*shape),), **options)


def _compared(x: Tensor) -> Tensor:
    """Each comparison writes zeros and ones into a copy, which then weighs ``x``."""
    total = x
    for op in ("eq_", "ne_", "lt_", "le_", "gt_", "ge_"):
        with_number, with_row = x.detach().clone(), x.detach().clone()
        total = total + x * getattr(with_number, op)(0.5) + x * getattr(with_row, op)(x[0].detach())
    return total


def _changed(x: Tensor) -> Tensor:
    """Untagged in-place ops one after the other."""
    y = x.clone().abs_().mul_(2)
    y = F.threshold_(y, 0.3, 0.2)
    y = aten.hardswish_(y * 2)
    y = aten.mish_(y + 1)
    y = aten.gelu_(y * 3)
    y = y.copysign_(x[0].detach()) + y.clone().copysign_(0.5)
    with torch.no_grad():
        steps = torch.heaviside(x, x[0]).heaviside_(x) + x.clone().floor_divide_(0.5) + x.clone().floor_divide_(x[0] + 4)
        steps = steps + x.floor_divide(0.5) + torch.floor_divide(x, x[0] + 4) + aten.zero(x) + aten.fill(x, 0.5)
    return y * steps + aten.rsub(x[0], x) + torch.full_like(x, 2).xlogy_(3)


def _split(x: Tensor) -> Tensor:
    return torch.unsafe_split_with_sizes(x, [1, 3], 0)[1] + aten.view_copy(x, [5, 4])[:3, :1]


RARE = [
    _rare("comparisons", _compared),
    _rare("in-place", _changed),
    _rare("split", _split, reference=False),
    _rare("aliases", lambda x: aten.alias(x) + aten.lift_fresh(x) + aten._reshape_alias(x, [4, 5], [5, 1]), reference=False),
    _rare("norms", lambda x: aten.norm.Scalar(x, 3) + aten.norm.ScalarOpt_dim(x, 2, [1])),
    _rare("cummin", lambda x: x.cummin(1).values + x.mode(1, keepdim=True).values),
    _rare("all-axes", lambda x: x * (x < 2).all((0, 1)) + x * (x < 1).all((1,), keepdim=True)),
    _rare("rrelu", lambda x: F.rrelu(x, training=False), reference=False),
    _rare("rrelu-backward", lambda x: aten.rrelu_with_noise_backward(x, x, x.detach(), 0.1, 0.3, True, False).detach() * x),
    _rare("reflect2d", lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), 2, 4, 5),
    _rare("replicate2d", lambda x: F.pad(x.unsqueeze(0), (1, 2, 2, 1), mode="replicate"), 2, 4, 5),
    _rare("max_unpool3d", lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), 2, 4, 6, 8),
    Case("rare-neg-view", lambda p, x: (p[0] * x).conj().imag, (cplx(*_SHAPE),), (cplx(*_SHAPE),), reference=False),
    Case(
        "rare-scatter_",
        lambda p, x, i: torch.zeros_like(x).scatter_(1, i, (x * p[0])[:, :2]),
        (real(*_SHAPE),),
        (real(*_SHAPE), order(5, 4, 2)),
    ),
]
