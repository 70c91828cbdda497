"""The cuDNN and the vendor-supplied attention kernels, by the same fold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import samples
from per_sample._registry import rule
from per_sample.rules.attention import _flag, _folded, _full_mask, _unflag, _unfolded

aten = torch.ops.aten


@rule(aten._scaled_dot_product_cudnn_attention.default)
def cudnn_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    if dropout_p:
        return NotImplemented
    n = samples(query, key, value, attn_bias)
    out, logsumexp, *rest = aten._scaled_dot_product_cudnn_attention(
        _folded(query, n),
        _folded(key, n),
        _folded(value, n),
        _full_mask(attn_bias, query.shape[0], n),
        compute_log_sumexp,
        0.0,
        is_causal,
        return_debug_mask,
        scale=scale,
    )
    return _unfolded(out, n), _unfolded(logsumexp, n), *(_flag(x, n) for x in rest)


@rule(aten._scaled_dot_product_cudnn_attention_backward.default)
def cudnn_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    philox_seed: Any,
    philox_offset: Any,
    attn_bias: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> Any:
    n = samples(grad_out, query, key, value, attn_bias)
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *(_folded(x, n) for x in (grad_out, query, key, value, out, logsumexp)),
        _unflag(philox_seed),
        _unflag(philox_offset),
        _full_mask(attn_bias, query.shape[0], n),
        _unflag(cum_seq_q),
        _unflag(cum_seq_k),
        max_q,
        max_k,
        dropout_p,
        is_causal,
        scale=scale,
    )
    return tuple(_unfolded(x, n) for x in grads)


@rule(aten._scaled_dot_product_fused_attention_overrideable.default)
def fused_attention_overrideable(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    if dropout_p:
        return NotImplemented
    n = samples(query, key, value, attn_bias)
    out, logsumexp, *rest = aten._scaled_dot_product_fused_attention_overrideable(
        _folded(query, n),
        _folded(key, n),
        _folded(value, n),
        _full_mask(attn_bias, query.shape[0], n),
        0.0,
        is_causal,
        return_debug_mask,
        scale=scale,
    )
    return _unfolded(out, n), _unfolded(logsumexp, n), *(_flag(x, n) for x in rest)


@rule(aten._scaled_dot_product_fused_attention_overrideable_backward.default)
def fused_attention_overrideable_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any,
    grad_input_mask: Any,
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
    n = samples(grad_out, query, key, value, attn_bias)
    grads = aten._scaled_dot_product_fused_attention_overrideable_backward(
        *(_folded(x, n) for x in (grad_out, query, key, value)),
        _full_mask(attn_bias, query.shape[0], n),
        grad_input_mask,
        _folded(out, n),
        _folded(logsumexp, n),
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
    return tuple(_unfolded(x, n) if isinstance(x, Tensor) else x for x in grads)
