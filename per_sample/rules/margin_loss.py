"""Margin losses over the classes of each row: rows of all samples at once, then the reduction within each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._registry import rule

aten = torch.ops.aten
_NONE, _MEAN, _SUM = range(3)


def _rows(x: Any, rank: int, n: int) -> Tensor:
    """``[n * rows, ...]``; ``rank`` is that of a sample of several rows."""
    value = physical(x, n).contiguous()
    return value if x.dim() < rank else value.flatten(0, 1)


def _reduced(losses: Tensor, like: Any, n: int, reduction: int) -> Tensor:
    """From ``[n * rows]``; ``like`` is the input, of one row or several."""
    losses = losses.view(n, *like.shape[:-1])
    if reduction == _NONE:
        return losses
    total = losses.reshape(n, -1)
    return total.sum(1) if reduction == _SUM else total.mean(1)


def _by_row(grad: Any, like: Any, n: int, reduction: int) -> Tensor:
    """The gradient of each row's loss, ``[n * rows]``."""
    g = physical(grad, n)
    rows = like.shape[:-1].numel()
    if reduction == _MEAN:
        g = g / rows
    return (g.reshape(n, rows) if reduction == _NONE else g.reshape(n, 1).expand(n, rows)).reshape(n * rows)


@rule(aten.multi_margin_loss.default)
def multi_margin_loss(self: Any, target: Any, p: Any = 1, margin: Any = 1, weight: Any = None, reduction: int = _MEAN) -> Any:
    if self.dim() == 0 or type(weight) is Batched:
        return NotImplemented
    n = samples(self, target)
    losses = aten.multi_margin_loss(_rows(self, 2, n), _rows(target, 1, n), p, margin, weight, _NONE)
    return _reduced(losses, self, n, reduction)


@rule(aten.multi_margin_loss_backward.default)
def multi_margin_loss_backward(
    grad_output: Any, self: Any, target: Any, p: Any, margin: Any, weight: Any = None, reduction: int = _MEAN
) -> Any:
    if self.dim() == 0 or type(weight) is Batched:
        return NotImplemented
    n = samples(grad_output, self, target)
    g = _by_row(grad_output, self, n, reduction)
    grad = aten.multi_margin_loss_backward(g, _rows(self, 2, n), _rows(target, 1, n), p, margin, weight, _NONE)
    return grad.view(n, *self.shape)


@rule(aten.multilabel_margin_loss_forward.default)
def multilabel_margin_loss_forward(self: Any, target: Any, reduction: int) -> Any:
    if self.dim() == 0:
        return NotImplemented
    n = samples(self, target)
    losses, is_target = aten.multilabel_margin_loss_forward(_rows(self, 2, n), _rows(target, 2, n), _NONE)
    return _reduced(losses, self, n, reduction), is_target.view(n, *target.shape)


@rule(aten.multilabel_margin_loss_backward.default)
def multilabel_margin_loss_backward(grad_output: Any, self: Any, target: Any, reduction: int, is_target: Any) -> Any:
    if self.dim() == 0:
        return NotImplemented
    n = samples(grad_output, self, target, is_target)
    g = _by_row(grad_output, self, n, reduction)
    rows = [_rows(x, 2, n) for x in (self, target, is_target)]
    return aten.multilabel_margin_loss_backward(g, rows[0], rows[1], _NONE, rows[2]).view(n, *self.shape)
