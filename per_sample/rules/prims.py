"""Torch's primitive ops, which its decompositions of derivatives call: those that act on each element alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch._prims
from torch import Tensor

from per_sample._batched import context_of
from per_sample._combinators import at_rank, is_inexact, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload

_NAMES = """
    abs acos acosh asin asinh atan atanh cos cosh bessel_i0 bessel_i0e bessel_i1 bessel_i1e bessel_j0 bessel_j1 bitwise_not cbrt ceil
    conj_physical digamma erf erf_inv erfc erfcx exp expm1 exp2 floor isfinite lgamma log log1p log2 log10 ndtri neg reciprocal round sign
    signbit sin sinh spherical_bessel_j0 sqrt tan tanh trunc rsqrt
    add atan2 bitwise_and bitwise_or bitwise_xor div eq fmax fmin fmod gcd ge gt hypot igamma igammac le lt maximum minimum mul ne nextafter
    pow remainder shift_left shift_right_arithmetic sub zeta
    where convert_element_type
"""

_NAMESAKES: dict[str, Callable[..., Any]] = {"convert_element_type": torch.Tensor.to, "erf_inv": torch.erfinv}


def _elementwise(op: OpOverload) -> Any:
    """Unlike `aten`, these ops want tensors of one shape, and have no derivatives: a caller's are those of their namesakes."""
    name = op._schema.name.removeprefix("prims::")
    namesake: Callable[..., Any] = _NAMESAKES.get(name, getattr(torch, name, op))

    def run(*args: Any) -> Any:
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        ndim = max(args[i].dim() for i in places)
        filled = list(args)
        values = torch.broadcast_tensors(*(at_rank(args[i], ndim) for i in places))
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        differentiable = context_of(*args).functional and is_inexact(values[-1])
        return namesake(*filled) if differentiable else op(*filled)

    run.__qualname__ = f"elementwise({op})"
    return run


table(_elementwise, *(getattr(torch.ops.prims, name).default for name in _NAMES.split()), route="pointwise")
