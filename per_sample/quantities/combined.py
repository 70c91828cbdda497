"""Results of leaves and runs put together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from per_sample._kernels.functional import must_be_functional


def widest(dtypes: list[torch.dtype]) -> torch.dtype:
    """The dtype that holds the numbers of all."""
    first, *rest = dtypes
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first


def promoted(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in the widest dtype among them, on the first one's device."""
    dtype = widest([x.dtype for x in tensors])
    return [x.to(tensors[0].device, dtype) for x in tensors]


def total(tensors: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    first, *rest = promoted(tensors)
    for x in rest:
        first = first + x
    return first


def root(square: Tensor) -> Tensor:
    """The square root; of zero with a derivative of zero."""
    if not must_be_functional(square):
        return square.sqrt()
    positive = square != 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def vector_norm(sizes: Tensor, ord: float) -> Tensor:
    """The norm of each row of absolute values ``[n, k]``, whose powers need not be representable; of zeros with a derivative of zero."""
    if ord == 1 or not sizes.shape[1]:
        return sizes.sum(1)
    largest = sizes.amax(1)
    if ord == math.inf:
        return largest
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1).detach()
    powers = (sizes / scale.unsqueeze(1)) ** ord
    total = powers.sum(1)
    positive = total != 0
    return torch.where(positive, torch.where(positive, total, 1) ** (1 / ord), 0) * scale
