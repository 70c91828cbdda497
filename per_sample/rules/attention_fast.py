"""The fused transformer layers that torch takes in evaluation mode where nothing in them is differentiated: by the same fold."""

from __future__ import annotations

from typing import Any

import torch

from per_sample._batched import Batched, samples
from per_sample._registry import rule
from per_sample.rules.attention import _folded, _unfolded

aten = torch.ops.aten

# The kinds of mask: `[t, t]` for all, `[b, t]`, and `[b, h, t, t]`.
_FOR_ALL = 0


def _mask(mask: Any, kind: int | None, n: int) -> Any:
    """A mask of the folded batch."""
    return mask if mask is None or kind == _FOR_ALL else _folded(mask, n)


def _differs(*args: Any) -> bool:
    return any(type(a) is Batched for a in args)


@rule(aten._native_multi_head_attention.default)
def native_multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim: int,
    num_head: int,
    qkv_weight: Any,
    qkv_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    mask: Any = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """The kernel tells self-attention by its inputs being the same tensor, so they stay that."""
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    if _differs(*weights) or (mask_type == _FOR_ALL and _differs(mask)):
        return NotImplemented
    n = samples(query, key, value, mask)
    q = _folded(query, n)
    k = q if key is query else _folded(key, n)
    v = k if value is key else _folded(value, n)
    out, attention = aten._native_multi_head_attention(
        q, k, v, embed_dim, num_head, *weights, _mask(mask, mask_type, n), need_weights, average_attn_weights, mask_type
    )
    return _unfolded(out, n), attention if attention is None else _unfolded(attention, n)


@rule(aten._transformer_encoder_layer_fwd.default)
def transformer_encoder_layer_fwd(
    src: Any,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Any,
    qkv_bias: Any,
    proj_weight: Any,
    proj_bias: Any,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Any,
    norm_bias_1: Any,
    norm_weight_2: Any,
    norm_bias_2: Any,
    ffn_weight_1: Any,
    ffn_bias_1: Any,
    ffn_weight_2: Any,
    ffn_bias_2: Any,
    mask: Any = None,
    mask_type: int | None = None,
) -> Any:
    attention = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    rest = (norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2, ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2)
    if _differs(*attention, *rest) or (mask_type == _FOR_ALL and _differs(mask)):
        return NotImplemented
    n = samples(src, mask)
    options = (use_gelu, norm_first, eps)
    out = aten._transformer_encoder_layer_fwd(
        _folded(src, n), embed_dim, num_heads, *attention, *options, *rest, _mask(mask, mask_type, n), mask_type
    )
    return _unfolded(out, n)
