"""Attention written out in differentiable ops, for callers that differentiate once more than the fused kernels can."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of the sum that the softmax divides by."""
    k, v = _all_heads(q, k), _all_heads(q, v)
    scores = _scores(q, k, mask, is_causal, scale)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    wide_k, wide_v = _all_heads(q, k), _all_heads(q, v)
    weights = torch.softmax(_scores(q, wide_k, mask, is_causal, scale), -1)
    grad_weights = g @ wide_v.transpose(-1, -2)
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * _scale(q, scale)
    grad_k, grad_v = grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g
    return grad_scores @ wide_k, _own_heads(grad_k, k), _own_heads(grad_v, v)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def _scores(q: Tensor, k: Tensor, mask: Any, is_causal: bool, scale: float | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * _scale(q, scale)
    if is_causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~past, -math.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _all_heads(q: Tensor, k: Tensor) -> Tensor:
    """Keys that serve a group of queries, once for each."""
    repeats = q.shape[1] // k.shape[1]
    return k if repeats == 1 else k.repeat_interleave(repeats, 1)


def _own_heads(grad: Tensor, k: Tensor) -> Tensor:
    return grad if grad.shape == k.shape else grad.unflatten(1, (k.shape[1], -1)).sum(2)
