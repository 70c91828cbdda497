"""Random numbers that are a function of where they stand: the same in whatever order, pieces or place they are asked for.

A 64-bit counter goes through the finalizer of SplitMix64 (Steele, Lea and Flood 2014). Its products wrap, as torch's own kernels have it on
every device; shifts are masked, since torch's keep the sign.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    x &= _MASK
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def mixed(x: Tensor) -> Tensor:
    """The finalizer, on int64."""
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def _mixed_number(x: int) -> int:
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def key(*numbers: int) -> int:
    """One number of 64 bits for a few, signed."""
    found = 0
    for number in numbers:
        found = _mixed_number((found ^ _mixed_number(number & _MASK)) + _GOLDEN & _MASK)
    return _signed(found)


# One op to a compiler: in the C++ that inductor writes, a signed product must not wrap, and numbers come out wrong.
@torch.library.custom_op("per_sample::words", mutates_args=())
def words(stream: int, rows: int, columns: Tensor) -> Tensor:
    """Random int64 ``[rows, *columns.shape]``: each a function of the stream, the row's number and the number in ``columns``."""
    row = mixed(torch.arange(1, rows + 1, device=columns.device) * _signed(_GOLDEN) + stream)
    return mixed(row.reshape(-1, *(1,) * columns.dim()) + (columns + 1) * _signed(_GOLDEN))


@words.register_fake
def _words_shape(stream: int, rows: int, columns: Tensor) -> Tensor:
    return columns.new_empty((rows, *columns.shape))


def normal(stream: int, rows: int, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Normal numbers ``[rows, *columns.shape]``, by Box and Muller: a word gives two rows."""
    word = words(stream, (rows + 1) // 2, columns)
    # A half more than the integer: the logarithm is finite.
    first = (_shifted(word, 32).to(dtype) + 0.5) * 2.0**-32
    second = (word & (2**32 - 1)).to(dtype) * (2 * pi * 2.0**-32)
    radius = (-2 * first.log()).clamp(min=0).sqrt()
    return torch.stack((radius * second.cos(), radius * second.sin()), 1).flatten(0, 1)[:rows]


def signs(stream: int, rows: int, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers 1 and -1 ``[rows, *columns.shape]``: a word gives 64 rows."""
    word = words(stream, -(-rows // 64), columns).unsqueeze(1)
    place = torch.arange(64, device=columns.device).reshape(1, 64, *(1,) * columns.dim())
    bits = ((word >> place) & 1).flatten(0, 1)[:rows]
    return (1 - 2 * bits).to(dtype)


def below(stream: int, limits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """For each limit (under 2**31) numbers from 0 to it, and signs as 0 or 1: both ``[len(limits), *columns.shape]`` of int64."""
    word = words(stream, limits.shape[0], columns)
    limits = limits.reshape(-1, *(1,) * columns.dim())
    return ((word & (2**32 - 1)) * limits) >> 32, _shifted(word, 63)
