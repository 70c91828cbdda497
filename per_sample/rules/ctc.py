"""The CTC loss, which has a batch axis of its own: the samples' sequences come one behind the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import physical, samples
from per_sample._registry import rule

aten = torch.ops.aten


def _sequences(log_probs: Any, n: int) -> Tensor:
    """``[n, t, b, c]`` to ``[t, n * b, c]``."""
    return physical(log_probs, n).transpose(0, 1).flatten(1, 2)


def _in_a_row(x: Any, n: int) -> Any:
    """``[n * b, ...]``; a list of lengths is every sample's, and so is a length without an axis, of a sequence without a batch axis."""
    if not isinstance(x, Tensor):
        return list(x) * n
    rows = physical(x, n)
    return rows.flatten(0, 1) if rows.dim() > 1 else rows


@rule(aten._ctc_loss.default, aten._ctc_loss.Tensor)
def ctc_loss(log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, blank: int = 0, zero_infinity: bool = False) -> Any:
    n = samples(log_probs, targets, input_lengths, target_lengths)
    rows = [_in_a_row(x, n) for x in (targets, input_lengths, target_lengths)]
    losses, alpha = aten._ctc_loss(_sequences(log_probs, n), *rows, blank, zero_infinity)
    return losses.view(n, -1), alpha.unflatten(0, (n, -1))


@rule(aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor)
def ctc_loss_backward(
    grad: Any,
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    neg_log_likelihood: Any,
    log_alpha: Any,
    blank: int,
    zero_infinity: bool = False,
) -> Any:
    n = samples(grad, log_probs, targets, input_lengths, target_lengths, neg_log_likelihood, log_alpha)
    rows = [_in_a_row(x, n) for x in (targets, input_lengths, target_lengths, neg_log_likelihood, log_alpha)]
    found = aten._ctc_loss_backward(_in_a_row(grad, n), _sequences(log_probs, n), *rows, blank, zero_infinity)
    return found.unflatten(1, (n, -1)).transpose(0, 1)
