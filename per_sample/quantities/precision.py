"""The precision in which the operands of factors are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View
from per_sample._options import current_options
from per_sample.quantities.pieces import chosen, count, wide, wide_dtype

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def mapped(factor: Factor, change: Callable[[Tensor], Tensor]) -> Factor:
    """The factor with each of its operands of a floating dtype changed, none of them in shape."""
    if isinstance(factor, Dense):
        return Dense(change(factor.value))
    if isinstance(factor, Outer):
        return Outer(change(factor.left), change(factor.right))
    if isinstance(factor, ConvOuter):
        return ConvOuter(change(factor.x), change(factor.g), factor.geometry)
    if isinstance(factor, Rows):
        return Rows(factor.index, change(factor.g), factor.num_rows)
    if isinstance(factor, Sum):
        return Sum(tuple(mapped(term, change) for term in factor.terms))
    if isinstance(factor, Hadamard):
        by = factor.by
        return Hadamard(mapped(factor.base, change), by if by.dtype == torch.bool else change(by))
    assert isinstance(factor, View)
    return View(mapped(factor.base, change), factor.shape)


def widened(factor: Factor) -> Factor:
    """The factor with operands of half precision as float32."""
    return mapped(factor, wide)


def widened_pieces(factor: Factor) -> Iterator[tuple[slice, Factor]]:
    """The factor in pieces of samples whose operands are float32 or wider: one piece where they are that already."""
    n, like = count(factor), factor.like
    if wide(like[:0]).dtype == like.dtype or type(n) is not int or n == 0:
        yield slice(None), widened(factor)
        return
    step = max(1, n * current_options().scratch_bytes // max(1, 2 * operand_bytes(factor)))
    for start in range(0, n, step):
        some = slice(start, min(start + step, n))
        yield some, widened(factor if step >= n else chosen(factor, some))


def operands(factor: Factor) -> list[Tensor]:
    """The factor's tensors of a floating dtype."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    mapped(factor, keep)
    return found


def operand_bytes(factor: Factor) -> int:
    """The memory of all operands."""
    return sum(x.numel() * x.dtype.itemsize for x in operands(factor))


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of absolute values: real, float32 or wider."""
    # Dynamo knows no `dtype.to_real`.
    return _REAL.get(dtype, wide_dtype(dtype))


def doubled(x: Tensor) -> Tensor:
    """As float64, in which no product of float32 numbers overflows and sums of them lose nothing; unchanged on devices without it."""
    x = wide(x)
    return x if x.device.type == "mps" else x.to(_DOUBLE.get(x.dtype, x.dtype))
