"""Rows of the table for convolutions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from case import Case, real

CONV = ("ConvOuter", "Dense")
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_SIZES = (8, 9, 7)
_KERNEL = (4, 2, 5)
_RULE = {"aten.convolution.default": "rule", "aten.convolution_backward.default": "rule"}


def _conv(d: int, name: str, weight: tuple[int, int] = (5, 4), *lead: int, kernel: Any = None, **options: Any) -> Case:
    groups = options.get("groups", 1)
    return Case(
        f"conv{d}d-{name}",
        lambda p, x: _CONV[d](x, p[0], p[1], **options),
        (real(*weight, *(kernel or _KERNEL[:d])), real(weight[0])),
        (real(*lead, weight[1] * groups, *_SIZES[:d]),),
        CONV,
        _RULE,
    )


def _transposed(d: int, name: str, weight: tuple[int, int] = (4, 5), *lead: int, **options: Any) -> Case:
    groups = options.get("groups", 1)
    return Case(
        f"conv_transpose{d}d-{name}",
        lambda p, x: _TRANSPOSED[d](x, p[0], p[1], **options),
        (real(*weight, *_KERNEL[:d]), real(weight[1] * groups)),
        (real(*lead, weight[0], *_SIZES[:d]),),
        CONV,
        _RULE,
    )


def _padded(mode: str) -> Case:
    """As ``nn.Conv2d(padding_mode=...)`` does it."""
    return Case(
        f"conv2d-{mode}",
        lambda p, x: F.conv2d(F.pad(x, (1, 2, 2, 1), mode=mode), p[0], p[1]),
        (real(5, 4, 2, 2), real(5)),
        (real(4, 8, 9),),
        CONV,
        _RULE,
    )


CONVOLUTIONS = [
    *(_conv(d, "plain") for d in (1, 2, 3)),
    *(_conv(d, "same", padding="same") for d in (1, 2, 3)),
    *(_conv(d, "batch", (5, 4), 2, padding=1) for d in (1, 2)),
    _conv(1, "same-dilated", padding="same", dilation=2, kernel=(5,)),
    _conv(2, "same-odd", padding="same", kernel=(5, 3)),
    _conv(2, "valid", padding="valid"),
    _conv(2, "stride", stride=(2, 3), padding=(1, 0)),
    _conv(2, "dilation", dilation=(1, 2), padding=2),
    _conv(2, "groups", (6, 2), groups=2),
    _conv(2, "depthwise", (10, 1), groups=5, padding=1),
    _conv(2, "pointwise", kernel=(1, 1)),
    _conv(3, "stride-groups", (6, 2), groups=2, stride=2, padding=1),
    *(_transposed(d, "plain") for d in (1, 2, 3)),
    _transposed(2, "output-padding", stride=2, padding=1, output_padding=1),
    _transposed(2, "groups-batch", (4, 5), 6, groups=2, stride=(1, 2), dilation=(2, 1)),
    # Output padding beyond the stride: the weight gradient is left to the fallback.
    Case(
        "conv_transpose1d-wide-output-padding",
        lambda p, x: F.conv_transpose1d(x, p[0], dilation=4, padding=2, output_padding=2),
        (real(4, 5, 2),),
        (real(4, 8),),
        loose=frozenset({"aten.convolution_backward.default"}),
    ),
    *(_padded(mode) for mode in ("circular", "reflect", "replicate", "constant")),
    Case("conv2d-no-bias", lambda p, x: F.conv2d(x, p[0]), (real(5, 4, 2, 2),), (real(4, 8, 9),), ("ConvOuter",)),
    Case(
        "conv1d-weight-per-sample",
        lambda p, x, y: F.conv1d(x, p[0] * y, groups=2),
        (real(6, 2, 5),),
        (real(4, 8), real(6, 2, 5)),
        ("Dense",),
    ),
    Case(
        "conv_transpose1d-weight-per-sample",
        lambda p, x, y: F.conv_transpose1d(x, p[0] * y, p[1] * y.sum(), groups=2),
        (real(4, 2, 5), real(4)),
        (real(4, 8), real(4, 2, 5)),
        ("Dense", "Dense"),
    ),
    Case("conv1d-shared-input", lambda p, x: F.conv1d(p[0], p[1]) * x, (real(4, 8), real(5, 4, 2)), (real(5, 7),)),
    Case(
        "unfold-fold",
        lambda p, x: F.fold(F.unfold(x * p[0], (2, 4), padding=1), (8, 9), (2, 4), padding=1),
        (real(4, 1, 1),),
        (real(4, 8, 9),),
    ),
]
