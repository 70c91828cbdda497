"""Fused scaled dot product attention: the samples go into the kernels' batch axis.

The fused backward kernels have no derivative of their own. Where the caller differentiates once more, the plain
mathematical form takes their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._registry import rule
from per_sample.rules import attention_math
from per_sample.rules.norm import context

aten = torch.ops.aten


def _differentiated(*args: Any) -> bool:
    """Whether the caller wants derivatives that the fused kernels do not have."""
    caller = context(*args).caller
    return caller is not None and caller.differentiates


def _folded(x: Any, n: int) -> Tensor:
    """``[n * b, h, t, e]``."""
    return physical(x, n).flatten(0, 1)


def _folded_mask(mask: Any, b: int, n: int) -> Any:
    """A mask that all samples share broadcasts as it is, unless it tells the program's own batch apart."""
    if mask is None:
        return None
    if type(mask) is not Batched and (mask.dim() < 4 or mask.shape[0] == 1):
        return mask
    value = physical(mask, n)
    value = value.reshape(n, *(1,) * (5 - value.dim()), *value.shape[1:])
    return value.expand(n, b, *value.shape[2:]).flatten(0, 1)


def _unfolded(x: Tensor, n: int) -> Tensor:
    return x.unflatten(0, (n, -1))


def _flag(x: Any, n: int) -> Any:
    """A result that is no per-sample tensor (a seed, a placeholder) as one, for it is saved for the backward."""
    return x.expand(n, *x.shape) if isinstance(x, Tensor) else x


def _unflag(x: Any) -> Any:
    return x.physical[0] if type(x) is Batched else x


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_attention_for_cpu(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> Any:
    n = samples(query, key, value, attn_mask)
    q, k, v = (_folded(x, n) for x in (query, key, value))
    mask = _folded_mask(attn_mask, query.shape[0], n)
    if _differentiated(query, key, value, attn_mask):
        out, logsumexp = attention_math.forward(q, k, v, mask, is_causal, scale)
    else:
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)
    return _unfolded(out, n), _unfolded(logsumexp, n)


@rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_attention_for_cpu_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> Any:
    n = samples(grad_out, query, key, value, attn_mask)
    g, q, k, v = (_folded(x, n) for x in (grad_out, query, key, value))
    mask = _folded_mask(attn_mask, query.shape[0], n)
    if _differentiated(grad_out, query, key, value, attn_mask):
        grads = attention_math.backward(g, q, k, v, mask, is_causal, scale)
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, _folded(out, n), _folded(logsumexp, n), dropout_p, is_causal, attn_mask=mask, scale=scale
        )
    return tuple(_unfolded(x, n) for x in grads)


@rule(aten._scaled_dot_product_flash_attention.default)
def flash_attention(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    if dropout_p:
        return NotImplemented
    n = samples(query, key, value)
    out, logsumexp, *rest = aten._scaled_dot_product_flash_attention(
        _folded(query, n), _folded(key, n), _folded(value, n), 0.0, is_causal, return_debug_mask, scale=scale
    )
    return _unfolded(out, n), _unfolded(logsumexp, n), *(_flag(x, n) for x in rest)


@rule(aten._scaled_dot_product_flash_attention_backward.default)
def flash_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Any,
    philox_offset: Any,
    *,
    scale: float | None = None,
) -> Any:
    n = samples(grad_out, query, key, value)
    grads = aten._scaled_dot_product_flash_attention_backward(
        *(_folded(x, n) for x in (grad_out, query, key, value, out, logsumexp)),
        _unflag(cum_seq_q),
        _unflag(cum_seq_k),
        max_q,
        max_k,
        dropout_p,
        is_causal,
        _unflag(philox_seed),
        _unflag(philox_offset),
        scale=scale,
    )
    return tuple(_unfolded(x, n) for x in grads)


@rule(aten._scaled_dot_product_efficient_attention.default)
def efficient_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    if dropout_p:
        return NotImplemented
    n = samples(query, key, value, attn_bias)
    out, logsumexp, *rest = aten._scaled_dot_product_efficient_attention(
        _folded(query, n),
        _folded(key, n),
        _folded(value, n),
        _full_mask(attn_bias, query.shape[0], n),
        compute_log_sumexp,
        0.0,
        is_causal,
        scale=scale,
    )
    return _unfolded(out, n), _unfolded(logsumexp, n), *(_flag(x, n) for x in rest)


def _full_mask(bias: Any, b: int, n: int) -> Any:
    """A bias of the whole folded shape, as the kernels on a GPU want it."""
    if bias is None:
        return None
    value = physical(bias, n)
    return value.expand(n, b, *value.shape[2:]).flatten(0, 1)


@rule(aten._scaled_dot_product_efficient_attention_backward.default)
def efficient_attention_backward(
    grad_out_: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any,
    out: Any,
    logsumexp: Any,
    philox_seed: Any,
    philox_offset: Any,
    dropout_p: float,
    grad_input_mask: Any,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    n = samples(grad_out_, query, key, value, attn_bias)
    grads = aten._scaled_dot_product_efficient_attention_backward(
        *(_folded(x, n) for x in (grad_out_, query, key, value)),
        _full_mask(attn_bias, query.shape[0], n),
        _folded(out, n),
        _folded(logsumexp, n),
        _unflag(philox_seed),
        _unflag(philox_offset),
        dropout_p,
        grad_input_mask,
        is_causal,
        scale=scale,
    )
    return tuple(_unfolded(x, n) if isinstance(x, Tensor) else x for x in grads)
