"""Rows of the table for layers: norms, pooling, resampling, attention, losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from case import Case, Input, ints, real, unit
from versions import FUSED_WITHOUT_BATCH_AXIS

if TYPE_CHECKING:
    from collections.abc import Callable


def _norm(name: str, fn: Callable[..., Any], width: tuple[int, ...], *shape: int, **options: Any) -> Case:
    return Case(name, lambda p, x: fn(x, *p), (real(*width), real(*width)), (real(*shape),), ("Dense", "Dense"), **options)


def _fixed(x: torch.Tensor, w: Any, b: Any) -> torch.Tensor:
    mean = torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
    return F.batch_norm(x, mean, mean.exp(), w, b)


NORMS = [
    _norm("layer_norm", lambda x, w, b: F.layer_norm(x, (5,), w, b), (5,), 2, 4, 5),
    _norm("layer_norm-2d", lambda x, w, b: F.layer_norm(x, (4, 5), w, b), (4, 5), 2, 4, 5),
    _norm("layer_norm-vector", lambda x, w, b: F.layer_norm(x, (5,), w, b), (5,), 5),
    Case("layer_norm-bare", lambda p, x: F.layer_norm(x * p[0], (5,)), (real(5),), (real(4, 5),)),
    Case(
        "layer_norm-per-sample",
        lambda p, x, y: F.layer_norm(x, (5,), p[0] * y, p[1] * y),
        (real(5), real(5)),
        (real(4, 5), real(5)),
    ),
    _norm("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), (6,), 2, 6, 4, 5),
    _norm("group_norm-keep", lambda x, w, b: F.group_norm(x, 2, w, b), (6,), 6, 4, 5, keep_batch_dim=True),
    Case("group_norm-bare", lambda p, x: F.group_norm(x * p[0], 2), (real(6, 1),), (real(2, 6, 4),)),
    Case(
        "group_norm-per-sample",
        lambda p, x, y: F.group_norm(x, 2, p[0] * y, p[1] * y),
        (real(6), real(6)),
        (real(2, 6, 4), real(6)),
    ),
    _norm("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b), (6,), 2, 6, 4, 5),
    _norm("instance_norm-keep", lambda x, w, b: F.instance_norm(x, None, None, w, b), (6,), 6, 4, keep_batch_dim=True),
    _norm("batch_norm-eval", _fixed, (6,), 2, 6, 4, 5),
    _norm("batch_norm-eval-keep", _fixed, (6,), 6, 4, 5, keep_batch_dim=True),
    _norm("batch_norm-eval-vector", _fixed, (6,), 6, keep_batch_dim=True),
    Case("batch_norm-eval-bare", lambda p, x: _fixed(x * p[0], None, None), (real(6, 1),), (real(2, 6, 4),)),
    Case(
        "batch_norm-eval-per-sample",
        lambda p, x, y: F.batch_norm(x, torch.zeros(6).double(), torch.ones(6).double(), p[0] * y, p[1] * y),
        (real(6), real(6)),
        (real(2, 6, 4), real(6)),
    ),
    Case(
        "batch_norm-own-statistics",
        lambda p, x: F.batch_norm(x, None, None, p[0], p[1], training=True),
        (real(6), real(6)),
        (real(2, 6, 4),),
    ),
    Case("rms_norm", lambda p, x: F.rms_norm(x, (5,), p[0]), (real(5),), (real(2, 4, 5),), ("Dense",)),
    Case(
        "local_response_norm",
        lambda p, x: F.local_response_norm(x * p[0], 2),
        (real(4, 1),),
        (real(2, 4, 5),),
        reference=False,
    ),
]


def _map(name: str, fn: Callable[..., Any], *shape: int, **options: Any) -> Case:
    """An op on an image that has gone through one weight for each channel; with a batch axis and without."""
    return Case(name, lambda p, x: fn(x * p[0]), (real(4, *(1,) * (len(shape) - 1)),), (real(*shape),), **options)


def _both(name: str, fn: Callable[..., Any], *shape: int) -> list[Case]:
    return [_map(name, fn, *shape), _map(f"{name}-batch", lambda x: fn(x.unsqueeze(0).expand(2, *x.shape)), *shape)]


def _batched_only(name: str, *shape: int, **options: Any) -> Case:
    return _map(name, lambda x: F.interpolate(x.unsqueeze(0), **options), *shape)


IMAGES = [
    *_both("max_pool1d", lambda x: F.max_pool1d(x, 2, 2), 4, 8),
    *_both("max_pool2d", lambda x: F.max_pool2d(x, 2, 2, padding=1), 4, 8, 9),
    *_both("max_pool3d", lambda x: F.max_pool3d(x, 2), 4, 6, 7, 5),
    *_both("avg_pool1d", lambda x: F.avg_pool1d(x, 2), 4, 8),
    *_both("avg_pool2d", lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False), 4, 8, 9),
    *_both("avg_pool3d", lambda x: F.avg_pool3d(x, 2, divisor_override=5), 4, 6, 7, 5),
    *_both("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 5), 4, 8),
    *_both("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x, (5, 2)), 4, 8, 9),
    *_both("adaptive_avg_pool2d-global", lambda x: F.adaptive_avg_pool2d(x, 1), 4, 8, 9),
    *_both("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 2), 4, 6, 7, 5),
    *_both("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 5), 4, 8),
    *_both("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x, 5), 4, 8, 9),
    *_both("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, 2), 4, 6, 7, 5),
    *_both("max_unpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 4, 8, 6),
    *_both("lp_pool2d", lambda x: F.lp_pool2d(x.square() + 1, 2.0, 2), 4, 8, 9),
    *_both("reflect1d", lambda x: F.pad(x, (1, 2), mode="reflect"), 4, 8),
    *_both("reflect3d", lambda x: F.pad(x, (1, 2, 1, 1, 0, 1), mode="reflect"), 4, 6, 7, 5),
    *_both("replicate1d", lambda x: F.pad(x, (1, 2), mode="replicate"), 4, 8),
    *_both("replicate3d", lambda x: F.pad(x, (1, 2, 1, 1, 0, 1), mode="replicate"), 4, 6, 7, 5),
    *_both("pixel_shuffle", lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2).sin(), 2), 4, 6, 5),
    _map("channel_shuffle", lambda x: F.channel_shuffle(x.unsqueeze(0), 2), 4, 6, 5),
    *(_batched_only(f"{mode}1d", 4, 8, scale_factor=2, mode=mode) for mode in ("nearest", "nearest-exact", "linear")),
    *(_batched_only(f"{mode}2d", 4, 8, 9, size=(10, 7), mode=mode) for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")),
    *(_batched_only(f"{mode}-aa", 4, 8, 9, size=(5, 7), mode=mode, antialias=True) for mode in ("bilinear", "bicubic")),
    *(_batched_only(f"{mode}3d", 4, 6, 7, 5, scale_factor=2, mode=mode) for mode in ("nearest", "nearest-exact", "trilinear")),
    Case(
        "grid_sample",
        lambda p, x, g: F.grid_sample((x * p[0]).unsqueeze(0), (g * p[1]).unsqueeze(0), align_corners=False),
        (real(4, 1, 1), real(2)),
        (real(4, 8, 9), real(5, 6, 2)),
    ),
    Case(
        "grid_sample3d",
        lambda p, x, g: F.grid_sample((x * p[0]).unsqueeze(0), (g * p[1]).unsqueeze(0), align_corners=False),
        (real(4, 1, 1, 1), real(3)),
        (real(4, 6, 7, 5), real(2, 5, 6, 3)),
        reference=False,
    ),
]


def _attention(p: Any, x: torch.Tensor, mask: Any = None, **options: Any) -> torch.Tensor:
    """Self-attention with two heads on ``x [..., t, 8]``."""
    q, k, v = (F.linear(x, w).unflatten(-1, (2, 4)).transpose(-2, -3) for w in p)
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


_FLASH = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": "rule",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": "rule",
}


def _sdpa(name: str, shape: tuple[int, ...], mask: Input | None = None, **options: Any) -> Case:
    routes = options.pop("routes", _FLASH)
    keep = options.pop("keep_batch_dim", False)
    samples = (real(*shape),) if mask is None else (real(*shape), mask)
    return Case(
        f"attention-{name}",
        lambda p, x, *m: _attention(p, x, *m, **options),
        (real(8, 8), real(8, 8), real(8, 8)),
        samples,
        ("Outer", "Outer", "Outer"),
        routes,
        keep_batch_dim=keep,
    )


ATTENTION = [
    _sdpa("batch", (2, 5, 8)),
    _sdpa("causal", (2, 5, 8), is_causal=True),
    _sdpa("scale", (2, 5, 8), scale=0.3),
    _sdpa("keep", (5, 8), keep_batch_dim=True, is_causal=True),
    _sdpa("plain", (5, 8), routes=_FLASH if FUSED_WITHOUT_BATCH_AXIS else {"aten._safe_softmax.default": "rule"}),
    _sdpa("mask-per-sample", (2, 5, 8), real(2, 1, 5, 5)),
    _sdpa("mask-per-sample-2d", (2, 5, 8), real(5, 5)),
    Case(
        "attention-mask-shared",
        lambda p, x: _attention(p, x, torch.ones(2, 1, 5, 5).tril().log().double()),
        (real(8, 8), real(8, 8), real(8, 8)),
        (real(2, 5, 8),),
        routes=_FLASH,
    ),
    Case(
        "attention-shared-key",
        lambda p, x: F.scaled_dot_product_attention(x, p[0], p[1]),
        (real(2, 6, 5, 4), real(2, 6, 5, 4)),
        (real(2, 6, 7, 4),),
        routes=_FLASH,
    ),
]


def _loss(name: str, fn: Callable[..., Any], target: Input, *shape: int, **options: Any) -> list[Case]:
    return [
        Case(
            f"{name}-{reduction}",
            lambda p, x, y, r=reduction: fn(x * p[0], y, reduction=r),
            (real(shape[-1]),),
            (real(*shape), target),
            **options,
        )
        for reduction in ("none", "mean", "sum")
    ]


_WEIGHT = torch.linspace(0.5, 2, 5, dtype=torch.float64)


def _smoothed(x: torch.Tensor, y: torch.Tensor, reduction: str) -> torch.Tensor:
    return F.cross_entropy(x, y, label_smoothing=0.1, ignore_index=1, reduction=reduction)


def _images_last(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y, reduction: fn(x.movedim(-1, 1), y, reduction=reduction)


def _nll(x: torch.Tensor, y: torch.Tensor, reduction: str, **options: Any) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(x, 1 if x.dim() > 1 else 0), y, reduction=reduction, **options)


LOSSES = [
    *_loss("cross_entropy", F.cross_entropy, ints(5), 5),
    *_loss("cross_entropy-batch", F.cross_entropy, ints(5, 4), 4, 5),
    *_loss("cross_entropy-smoothed", _smoothed, ints(5, 4), 4, 5, reference=False),
    *_loss("nll-weight", lambda x, y, reduction: _nll(x, y, reduction, weight=_WEIGHT), ints(5), 5),
    *_loss("nll-ignore", lambda x, y, reduction: _nll(x, y, reduction, weight=_WEIGHT, ignore_index=1), ints(5, 9), 9, 5),
    *_loss("nll2d", _images_last(_nll), ints(5, 2, 4, 6), 2, 4, 6, 5),
    *_loss(
        "nll2d-ignore",
        _images_last(lambda x, y, reduction: _nll(x, y, reduction, weight=_WEIGHT, ignore_index=1)),
        ints(5, 2, 4, 6),
        2,
        4,
        6,
        5,
    ),
    Case(
        "cross_entropy-probabilities",
        lambda p, x, y: F.cross_entropy(x * p[0], y),
        (real(5),),
        (real(4, 5), unit(4, 5)),
    ),
    *_loss("mse", F.mse_loss, real(4, 5), 4, 5),
    *_loss("mse-scalar", lambda x, y, reduction: F.mse_loss(x.sum(), y, reduction=reduction), real(), 5),
    *_loss("l1", F.l1_loss, real(4, 5), 4, 5),
    *_loss("smooth_l1", lambda x, y, reduction: F.smooth_l1_loss(x, y, beta=0.5, reduction=reduction), real(4, 5), 4, 5),
    *_loss("huber", lambda x, y, reduction: F.huber_loss(x, y, delta=0.5, reduction=reduction), real(4, 5), 4, 5),
    *_loss("soft_margin", F.soft_margin_loss, real(4, 5), 4, 5),
    *_loss(
        "bce",
        lambda x, y, reduction: F.binary_cross_entropy(x.sigmoid(), y, _WEIGHT, reduction=reduction),
        unit(4, 5),
        4,
        5,
    ),
    *_loss(
        "bce_logits",
        lambda x, y, reduction: F.binary_cross_entropy_with_logits(x, y, _WEIGHT, pos_weight=_WEIGHT + 1, reduction=reduction),
        unit(4, 5),
        4,
        5,
    ),
    Case("kl_div", lambda p, x, y: F.kl_div(x * p[0], y, reduction="sum"), (real(5),), (real(4, 5), unit(4, 5))),
]

LAYERS = [*NORMS, *IMAGES, *ATTENTION, *LOSSES]
