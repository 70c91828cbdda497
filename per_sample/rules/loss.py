"""Losses that reduce inside one op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._combinators import at_rank, table
from per_sample._registry import rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload

aten = torch.ops.aten
_NONE, _MEAN, _SUM = range(3)


def _lined_up(args: Any) -> tuple[list[Any], torch.Size]:
    """The tensors lined up behind the sample axis, and the shape of one sample's loss before it is reduced."""
    shape = torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, Tensor)))
    return [at_rank(a, len(shape)) for a in args], shape


def _reduced(value: Tensor, reduction: int) -> Tensor:
    if reduction == _NONE:
        return value
    flat = value.reshape(value.shape[0], -1)
    return flat.sum(1) if reduction == _SUM else flat.mean(1)


def _loss(op: OpOverload) -> Callable[..., Any]:
    """A loss by element, then the reduction within each sample."""
    names = [a.name for a in op._schema.arguments]
    at = names.index("reduction")

    def run(*args: Any, **kwargs: Any) -> Any:
        reduction = args[at] if len(args) > at else _MEAN
        tensors, shape = _lined_up(args[:at])
        whole = [t if t is None or i > 1 else t.expand(samples(*args), *shape) for i, t in enumerate(tensors)]
        missing = [None] * (at - len(whole))
        return _reduced(op(*whole, *missing, _NONE, *args[at + 1 :], **kwargs), reduction)

    run.__qualname__ = f"loss({op})"
    return run


def _loss_backward(op: OpOverload) -> Callable[..., Any]:
    names = [a.name for a in op._schema.arguments]
    at = names.index("reduction")

    def run(*args: Any, **kwargs: Any) -> Any:
        reduction = args[at] if len(args) > at else _MEAN
        grad, *rest = args[:at]
        tensors, shape = _lined_up(rest)
        n = samples(*args)
        # One number for each sample, or, in forward mode, one for each element even of a loss that is reduced.
        g = at_rank(grad, len(shape))
        if reduction == _MEAN:
            g = g / shape.numel()
        values = [v if v is None else v.expand(n, *shape) for v in (g, *tensors)]
        return op(*values, *[None] * (at - len(values)), _NONE, *args[at + 1 :], **kwargs)

    run.__qualname__ = f"loss_backward({op})"
    return run


table(
    _loss,
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
)
table(
    _loss_backward,
    aten.mse_loss_backward.default,
    aten.smooth_l1_loss_backward.default,
    aten.huber_loss_backward.default,
    aten.soft_margin_loss_backward.default,
    aten.binary_cross_entropy_backward.default,
)


def _class_weights(target: Tensor, weight: Any, ignore_index: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets count, a target that is safe to index with, and each one's weight: zero where it is ignored."""
    kept = target != ignore_index
    safe = torch.where(kept, target, 0)
    if weight is None:
        return kept, safe, kept.to(like.dtype)
    if type(weight) is Batched:
        value = weight.physical
        picked = value.gather(1, safe.reshape(safe.shape[0], -1)).view(safe.shape)
    else:
        picked = weight[safe]
    return kept, safe, torch.where(kept, picked, 0)


@rule(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def nll_loss_forward(self: Any, target: Any, weight: Any, reduction: int, ignore_index: int) -> Any:
    """Results are the loss and the sum of the targets' weights that a mean divides by."""
    n = samples(self, target, weight)
    log_p, index = physical(self, n), physical(target, n)
    if index.is_floating_point():
        raise RuntimeError(f"A class, the target of nll_loss or cross_entropy, must be an integer; got {index.dtype}.")
    classes = 1 if self.dim() == 1 else 2
    kept, safe, scale = _class_weights(index, weight, ignore_index, log_p)
    picked = log_p.gather(classes, safe.unsqueeze(classes)).squeeze(classes)
    # An ignored target must not bring in the NaN of an infinite log-probability.
    loss = torch.where(kept, -picked * scale, 0)
    if reduction == _NONE:
        return loss, log_p.new_zeros(n)
    total, weights = loss.reshape(n, -1).sum(1), scale.reshape(n, -1).sum(1)
    return (total / weights if reduction == _MEAN else total), weights


@rule(aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
def nll_loss_backward(grad_output: Any, self: Any, target: Any, weight: Any, reduction: int, ignore_index: int, total_weight: Any) -> Any:
    n = samples(grad_output, self, target, weight, total_weight)
    g, index = physical(grad_output, n), physical(target, n)
    classes = 1 if self.dim() == 1 else 2
    kept, safe, scale = _class_weights(index, weight, ignore_index, g)
    if reduction == _MEAN:
        g = g / physical(total_weight, n)
    if reduction != _NONE:
        g = g.view(n, *(1,) * (index.dim() - 1))
    # Where every target is ignored the mean's divisor is zero, and the gradient still is, too.
    values = torch.where(kept, -g * scale, 0)
    zeros = torch.zeros((n, *self.shape), dtype=values.dtype, device=values.device)
    return zeros.scatter(classes, safe.unsqueeze(classes), values.unsqueeze(classes))
