"""Sums of squares that keep the digits of their summands, whatever their number."""

from __future__ import annotations

import torch
from torch import Tensor

# In single precision, a sum over more elements than these would lose digits.
_BLOCK = 4096


def square_sums(x: Tensor, *, functional: bool = False) -> Tensor:
    """The sum of the squares of each row of ``x [m, d]``, real, ``[m]`` in float64 (where the device has it).

    Unless ``functional``, squares are taken in the precision of ``x``, and may leave its range.
    """
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    width = x.shape[1]
    if functional or type(width) is not int or width == 0:
        return x.to(dtype).square().sum(1)
    if width <= _BLOCK:
        return torch.linalg.vector_norm(x, dim=1).to(dtype).square()
    whole = width - width % _BLOCK
    rest = torch.linalg.vector_norm(x[:, whole:], dim=1).to(dtype).square()
    blocks = torch.linalg.vector_norm(x[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)), dim=2)
    return blocks.to(dtype).square().sum(1) + rest
