"""Rows of the table for single ops on tensors: pointwise, views, reductions, indexing, in-place writes, factories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from case import Case, Input, ints, order, real

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_SHAPE = (4, 5)


def _unary(name: str, fn: Callable[[Tensor], Any], *shape: int, **options: Any) -> Case:
    """``fn`` of a per-sample tensor that hangs on a parameter of its own shape."""
    shape = shape or _SHAPE
    return Case(name, lambda p, x: fn(p[0] * x), (real(*shape),), (real(*shape),), **options)


def _indexed(name: str, fn: Callable[..., Any], index: Input, *shape: int, **options: Any) -> Case:
    shape = shape or _SHAPE
    return Case(name, lambda p, x, i: fn(p[0] * x, i), (real(*shape),), (real(*shape), index), **options)


_POINTWISE = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "logsigmoid": F.logsigmoid,
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "prelu": lambda x: F.prelu(x, x[:1, 0].detach()),
    "prelu-vector": lambda x: F.prelu(x, x[0]),
    "glu": lambda x: F.glu(x, 0),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "pow": lambda x: (x.square() + 1).pow(1.5),
    "where": lambda x: torch.where(x > 0, x, x[0]),
    "lerp": lambda x: torch.lerp(x, x[0], x.sigmoid()),
    "addcmul": lambda x: torch.addcmul(x[0], x, x, value=2),
    "maximum": lambda x: torch.maximum(x, x[0]),
    "rsub": lambda x: 2 - x,
    "scalar-promotion": lambda x: x.sum() * torch.ones(4).int(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.5),
    "masked_fill-value": lambda x: x.masked_fill(x > 0, x.sum()),
    "masked_fill-shared": lambda x: x.masked_fill(torch.eye(5)[:4].bool(), x.sum()),
    "to": lambda x: x.float().sin().double(),
    "fill": lambda x: torch.fill(x, x.sum()),
    "rank-mismatch": lambda x: x[0] + x,
    "scalar": lambda x: x.sum() * x + x.sum() * 2.5,
    "rounding": lambda x: x.floor() + x * x.sign() + x.frac(),
    "complex": lambda x: torch.complex(x, x + 1).abs(),
}

_IN_PLACE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "relu_": lambda y, x: F.relu(y, inplace=True),
    "add_": lambda y, x: y.add_(x[0], alpha=2),
    "mul_-scalar-tensor": lambda y, x: y.mul_(x.sum()),
    "copy_-row": lambda y, x: y[1].copy_(x[0]),
    "fill_": lambda y, x: y[1].fill_(x.sum()),
    "zero_": lambda y, x: y[:, 2].zero_(),
    "masked_fill_": lambda y, x: y.masked_fill_(x > 0, 0.5),
    "masked_fill_-value": lambda y, x: y.masked_fill_(x > 0, x.sum()),
    "slice-assign": lambda y, x: y.__setitem__((slice(None), slice(1, 3)), x[:, :2]),
    "index_put_": lambda y, x: y.__setitem__(torch.tensor([2, 0]), x[:2]),
    "mask-assign": lambda y, x: y.__setitem__(x > 0, 0.5),
    "shared-mask-assign": lambda y, x: y.__setitem__(torch.tensor([True, False, True, False]), x[0]),
    "add_-mixed-dtype": lambda y, x: y.add_(x.float()),
    "scalar-mixed-dtype": lambda y, x: y[0, 0].add_(x.sum().float()),
    "squeeze_": lambda y, x: y.unsqueeze_(1).mul_(2).squeeze_(1),
    "t_": lambda y, x: y.t_().add_(x.t()),
    "transpose_": lambda y, x: y.transpose_(0, 1).mul_(x.t()),
}

_NOT_BY_VMAP = ("mask-assign", "clone-channels-last", "to-channels-last")


def _written(name: str, write: Callable[[Tensor, Tensor], Any]) -> Case:
    def fn(p: Any, x: Tensor) -> Tensor:
        y = (p[0] * x).clone()
        write(y, x)
        return y

    return Case(f"in-place-{name}", fn, (real(*_SHAPE),), (real(*_SHAPE),), reference=name not in _NOT_BY_VMAP)


_VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "as_strided": lambda x: x.as_strided((2, 6), (40, 5)),
    "as_strided-overlap": lambda x: x.as_strided((4, 6), (2, 1), 3),
    "tril_": lambda x: (x + 1).tril_() + (x + 2).triu_(1),
    "view": lambda x: x.view(2, -1),
    "reshape": lambda x: x.transpose(0, 1).reshape(4, 20),
    "flatten": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(1, (2, 4)),
    "permute": lambda x: x.permute(2, 0, 1),
    "movedim": lambda x: x.movedim(-1, 0),
    "transpose": lambda x: x.transpose(-1, 0),
    "t": lambda x: x[0].t(),
    "t-vector": lambda x: x[0, 0].t(),
    "select": lambda x: x[:, 2],
    "select-last": lambda x: x.select(-1, -2),
    "slice": lambda x: x[:, 1:7:2],
    "slice-default-axis": lambda x: x[1:],
    "split": lambda x: x.split(3, 1)[1],
    "split-sizes": lambda x: x.split([2, 6], 1)[1],
    "chunk": lambda x: x.chunk(3, -2)[0],
    "unsafe_chunk": lambda x: x.unsafe_chunk(2, 1)[1],
    "unbind": lambda x: x.unbind(1)[3],
    "unbind-default": lambda x: x.unbind()[1],
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "squeeze": lambda x: x[:1, :, :1].squeeze(),
    "squeeze-dim": lambda x: x[:1].squeeze(0),
    "squeeze-dims": lambda x: x[:1, :1].squeeze((0, 1)),
    "squeeze-nothing": lambda x: x.squeeze(0),
    "expand": lambda x: x[:, :1].expand(2, 4, 5),
    "expand-more": lambda x: x.expand(6, 4, 2, 8, 5)[0],
    "expand-as": lambda x: x[0, 0].expand(7, -1),
    "diagonal": lambda x: x.diagonal(1, 1, 2),
    "diagonal-default": lambda x: x.diagonal(),
    "unfold": lambda x: x.unfold(1, 4, 2),
    "flip": lambda x: x.flip(0, -1),
    "roll": lambda x: x.roll(2, 1),
    "roll-flat": lambda x: x.roll(3),
    "repeat": lambda x: x.repeat(2, 1, 1, 3),
    "tile": lambda x: x.tile(2),
    "tril": lambda x: x.tril(-1),
    "triu": lambda x: x.triu(1),
    "diag_embed": lambda x: x[0].diag_embed(1),
    "rot90": lambda x: x.rot90(1, (0, 1)),
    "cat": lambda x: torch.cat([x, x[:1], torch.ones(1, 8, 5).double()]),
    "cat-axis": lambda x: torch.cat([x, x.sin()], -1),
    "cat-empty": lambda x: torch.cat([x[0, 0, :0], x], 1),
    "stack": lambda x: torch.stack([x[0], x[1], torch.ones(8, 5).double()], -1),
    "contiguous": lambda x: x.transpose(0, 1).contiguous().view(-1),
    "clone-channels-last": lambda x: x[None].clone(memory_format=torch.channels_last),
    "to-channels-last": lambda x: x[None].to(torch.float32, memory_format=torch.channels_last).double(),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "select_scatter": lambda x: x.select_scatter(x[:, 1] * 2, 1, 4),
    "slice_scatter": lambda x: x.slice_scatter(x[:, :2], 1, 3, 5),
    "diagonal_scatter": lambda x: x.diagonal_scatter(x.diagonal(0, 0, 2).sin(), 0, 0, 2),
    "view_as": lambda x: x.view_as(x.new_zeros(2, 8, 5)),
    "narrow": lambda x: x.narrow(1, 2, 4),
    "hstack": lambda x: torch.hstack([x[0], x[1]]),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[1, 1], indexing="ij")[0],
    "detach": lambda x: x + x.detach(),
    "zero-dim": lambda x: x.sum().view(1).expand(4).unsqueeze(0).squeeze(),
    "zero-dim-transpose": lambda x: x.sum().transpose(0, -1),
    "kron": lambda x: torch.kron(x[0, :2, :2], x[1, :2]),
    "tensordot": lambda x: torch.tensordot(x[0], x[1], dims=([0], [0])),
    "broadcast_to": lambda x: x[0, 0].broadcast_to(4, 5),
}

_REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "fft": lambda x: torch.fft.fft2(x, dim=(0, 2)),
    "rfft": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=5, dim=-1),
    "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:], dim=1),
    "nanmedian": lambda x: x.nanmedian() + x.nanmedian(1).values.sum(),
    "sum": lambda x: x.sum(),
    "sum-dim": lambda x: x.sum(-1),
    "sum-dims": lambda x: x.sum((0, 2), keepdim=True),
    "sum-empty": lambda x: x.sum(dim=[]),
    "sum-dtype": lambda x: x.sum(0, dtype=torch.float32).double(),
    "sum-integers": lambda x: (x > 0).sum() * x + (x > 0).sum(1).unsqueeze(1) * x,
    "sum-scalar": lambda x: x.sum().sum().sum(0).sum(-1, keepdim=True),
    "mean": lambda x: x.mean(),
    "mean-dim": lambda x: x.mean((0, 1)),
    "mean-scalar": lambda x: x.sum().mean() + x.sum().mean(0),
    "nansum": lambda x: x.nansum(1),
    "amax": lambda x: x.amax((0, 1)),
    "amin": lambda x: x.amin(),
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max-dim": lambda x: x.max(1).values,
    "min-dim": lambda x: x.min(-1, keepdim=True)[0],
    "argmax": lambda x: x * (x.argmax() + x.argmax(1, keepdim=True) + x.argmax(keepdim=True)),
    "argmin": lambda x: x * x.argmin(0, keepdim=True),
    "any": lambda x: x * (x > 2).any() + x * (x > 2).any(1, keepdim=True) + x * (x > 1).any((0, 1)),
    "all": lambda x: x * (x < 2).all() + x * (x < 1).all(0),
    "prod": lambda x: x[0, :2].prod(),
    "prod-dim": lambda x: x.prod(0),
    "var": lambda x: x.var(),
    "var-dim": lambda x: x.var(1, correction=0, keepdim=True),
    "std": lambda x: x.std((0, 1)),
    "var_mean": lambda x: torch.var_mean(x, 1)[0] + torch.var_mean(x, 1)[1],
    "std_mean": lambda x: torch.std_mean(x)[0],
    "logsumexp": lambda x: x.logsumexp((0, 1)),
    "norm": lambda x: x.norm() + x.norm(dim=1).sum() + torch.linalg.vector_norm(x, 3),
    "frobenius": lambda x: torch.linalg.matrix_norm(x[0]),
    "vector_norm-dim": lambda x: torch.linalg.vector_norm(x, 1, (0, 2), keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cosine": lambda x: F.cosine_similarity(x[0], x[1]),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(0),
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "cummax": lambda x: x.cummax(1).values,
    "sort": lambda x: x.sort().values,
    "sort-axis": lambda x: x.sort(dim=1, descending=True, stable=True).values,
    "topk": lambda x: x.topk(2).values,
    "topk-axis": lambda x: x.topk(4, 1).values,
    "kthvalue": lambda x: x.kthvalue(2, 1).values,
    "median": lambda x: x.median() + x.median(1).values.sum(),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax-float": lambda x: x.float().softmax(0, dtype=torch.float64),
    "trace": lambda x: x[0].trace(),
    "dist": lambda x: torch.dist(x[0], x[1]),
    "argsort": lambda x: x * x.argsort(1),
}

_K = torch.tensor([2, 0, 1])

INDEXING = [
    _indexed("gather", lambda x, i: x.gather(1, i), ints(5, 4, 2)),
    Case("gather-shared", lambda p, i: p[0].gather(1, i), (real(*_SHAPE),), (ints(5, 4, 2),)),
    _indexed("take_along_dim", lambda x, i: x.take_along_dim(i, 1), ints(5, 4, 2)),
    _indexed("scatter", lambda x, i: x.scatter(1, i, x[:, :2] * 2), order(5, 4, 2)),
    _indexed("scatter-value", lambda x, i: x.scatter(1, i, 0.5), order(5, 4, 2)),
    _indexed("scatter_add", lambda x, i: x.scatter_add(1, i, x[:, :2]), ints(5, 4, 2)),
    _indexed("scatter_add_", lambda x, i: torch.zeros_like(x).scatter_add_(1, i, x[:, :2]), ints(5, 4, 2)),
    _indexed("scatter_reduce", lambda x, i: x.scatter_reduce(1, i, x[:, :2], "amax"), ints(5, 4, 2)),
    _indexed("index_select", lambda x, i: x.index_select(1, i), ints(5, 2)),
    Case("index_select-table", lambda p, i: p[0].index_select(0, i), (real(*_SHAPE),), (ints(4, 2),)),
    _unary("index_select-fixed", lambda x: x.index_select(0, _K)),
    _indexed("index_add", lambda x, i: x.index_add(0, i, x[:2], alpha=2), ints(4, 2)),
    _unary("index_add-fixed", lambda x: x.index_add(0, _K, x[:3])),
    _indexed("index_add_", lambda x, i: x.clone().index_add_(0, i, x[:2]), ints(4, 2)),
    _indexed("index_fill", lambda x, i: x.index_fill(0, i, 0.5), ints(4, 2)),
    _unary("index_fill-fixed", lambda x: x.index_fill(0, _K, 0.5)),
    _indexed("index_copy", lambda x, i: x.index_copy(0, i, x[:2]), order(4, 2)),
    _unary("index_copy-fixed", lambda x: x.index_copy(0, _K, x[:3])),
    _unary("index-fixed", lambda x: x[_K]),
    _unary("index-fixed-second", lambda x: x[:, _K]),
    _unary("index-fixed-apart", lambda x: x[_K, :, _K], 4, 5, 6),
    _unary("index-mask-fixed", lambda x: x[torch.tensor([True, False, True, True])]),
    _indexed("index", lambda x, i: x[i], ints(4, 2)),
    _indexed("index-second", lambda x, i: x[:, i], ints(5, 2)),
    _indexed("index-apart", lambda x, i: x[i, :, i], ints(4, 2), 4, 5, 6),
    _indexed("index-late", lambda x, i: x[:, i, i.unsqueeze(1)], ints(5, 2), 4, 5, 6),
    _indexed("index-mixed", lambda x, i: x[:, i, _K[:2]], ints(5, 2), 4, 5, 6),
    Case("index-table-second", lambda p, i: p[0][:, i], (real(4, 5, 6),), (ints(5, 2),)),
    Case("index-table-apart", lambda p, i: p[0][i, :, i], (real(4, 5, 6),), (ints(4, 2),)),
    _indexed("index_put-add", lambda x, i: x.index_put((i,), x[:2], accumulate=True), ints(4, 2)),
    _indexed("index_put-late", lambda x, i: x.index_put((torch.arange(4)[:, None], i), x[:, :2]), order(5, 2)),
]

FACTORIES = [
    _unary("new_zeros", lambda x: torch.cat([x, x.new_zeros(2, 5), x.new_ones(1, 5), x.new_full((1, 5), 0.5)])),
    _unary("like", lambda x: x + torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 2.5)),
    _unary(
        "like-channels-last",
        lambda x: x + torch.ones_like(x, memory_format=torch.channels_last),
        2,
        4,
        5,
        6,
        reference=False,
    ),
    _unary("new_empty", lambda x: x.new_empty(4, 5).copy_(x)),
    _unary("write-loop", lambda x: _rows_written(x)),
]


def _rows_written(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.shape[0]):
        out[i] = x[i] * (i + 1)
    return out


TENSORS = [
    *(_unary(f"pointwise-{name}", fn) for name, fn in _POINTWISE.items()),
    *(_written(name, write) for name, write in _IN_PLACE.items()),
    *(_unary(f"view-{name}", fn, 2, 8, 5, reference=name not in _NOT_BY_VMAP) for name, fn in _VIEWS.items()),
    *(_unary(f"reduce-{name}", fn, 2, 4, 5) for name, fn in _REDUCTIONS.items()),
    *INDEXING,
    *FACTORIES,
]
