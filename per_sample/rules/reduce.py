"""Reductions, scans, sorts and transforms along axes."""

from __future__ import annotations

from typing import Any

import torch

from per_sample._batched import Batched
from per_sample._combinators import axis, dims, reduce, reduce_all, table
from per_sample._registry import register, rule

aten = torch.ops.aten

table(
    reduce,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.nansum.default,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.std.correction,
    aten.var_mean.correction,
    aten.std_mean.correction,
    aten.logsumexp.default,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
)
table(
    dims,
    aten.any.dim,
    aten.all.dim,
    aten.prod.dim_int,
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.nanmedian.dim,
    aten._fft_c2c.default,
    aten._fft_c2r.default,
    aten._fft_r2c.default,
    aten.linalg_cross.default,
    aten.kthvalue.default,
    aten.mode.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.logcumsumexp.default,
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
    aten.glu.default,
    aten.glu_backward.default,
    aten._softmax.default,
    aten._log_softmax.default,
    aten._safe_softmax.default,
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
)


def _median(value: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.median(value, dim).values


def _nanmedian(value: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.nanmedian(value, dim).values


for _op, _over in (
    (aten.prod.default, torch.prod),
    (aten.max.default, torch.amax),
    (aten.min.default, torch.amin),
    (aten.any.default, torch.any),
    (aten.all.default, torch.all),
    (aten._is_any_true.default, torch.any),
    (aten._is_all_true.default, torch.all),
    (aten.median.default, _median),
    (aten.nanmedian.default, _nanmedian),
    (aten.norm.Scalar, torch.linalg.vector_norm),
):
    register(_op, reduce_all(_op, _over), "rule")


@rule(aten.sum.default)
def sum_all(self: Any, *, dtype: Any = None) -> Any:
    value = self.physical
    ndim = value.dim()
    if ndim == 1:
        value, ndim = value.unsqueeze(1), 2
    return torch.sum(value, list(range(1, ndim)), dtype=dtype)


@rule(aten.mean.default)
def mean_all(self: Any, *, dtype: Any = None) -> Any:
    value = self.physical
    ndim = value.dim()
    if ndim == 1:
        value, ndim = value.unsqueeze(1), 2
    return torch.mean(value, list(range(1, ndim)), dtype=dtype)


def _arg(op: Any) -> Any:
    """`argmax` and `argmin` number the elements of one sample where no axis is given."""

    def run(self: Any, dim: int | None = None, keepdim: bool = False) -> Any:
        value = self.physical
        if dim is not None and self.dim() > 0:
            return op(value, axis(dim, self.dim()), keepdim)
        flat = op(value.reshape(self.n, -1), 1)
        return flat.view(self.n, *(1,) * self.dim()) if keepdim else flat

    run.__qualname__ = f"arg({op})"
    return run


register(aten.argmax.default, _arg(torch.argmax), "rule")
register(aten.argmin.default, _arg(torch.argmin), "rule")


def _any_of_axes(one: Any) -> Any:
    """`any` and `all` over a list of axes, where an empty list reduces nothing."""

    def run(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if self.dim() == 0:
            return NotImplemented
        where = list(range(1, self.dim() + 1)) if dim is None else [axis(d, self.dim()) for d in dim]
        return one(self.physical, where, keepdim)

    run.__qualname__ = f"axes({one})"
    return run


register(aten.any.dims, _any_of_axes(aten.any.dims), "rule")
register(aten.all.dims, _any_of_axes(aten.all.dims), "rule")


@rule(aten.dist.default)
def dist(self: Any, other: Any, p: float = 2) -> Any:
    a, b = (x.physical if type(x) is Batched else x for x in (self, other))
    if self.dim() != other.dim():
        return NotImplemented
    difference = a - b
    return torch.linalg.vector_norm(difference.reshape(difference.shape[0], -1), p, dim=1)


@rule(aten.renorm.default)
def renorm(self: Any, p: Any, dim: int, maxnorm: Any) -> Any:
    """Slices along one axis are scaled each by itself, so the samples' slices come one behind the other."""
    at = axis(dim, self.dim())
    slices = self.physical.movedim(at, 1)
    return torch.renorm(slices.flatten(0, 1), p, 0, maxnorm).view(slices.shape).movedim(1, at)
