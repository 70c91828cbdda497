"""The norm of every sample's gradient, together with the form of the gradients to keep for a weighted sum."""

from __future__ import annotations

from math import prod

from torch import Tensor

from per_sample._factors import Dense, Factor
from per_sample.quantities.pieces import count, wide_dtype
from per_sample.quantities.precision import operand_bytes, widened
from per_sample.quantities.sq_norm import norm_algorithm, sq_norm


def settled(factor: Factor, *, functional: bool = False) -> tuple[Tensor, Factor]:
    """The squared norms ``[n]``, and the form of the factor that is best to keep for a weighted sum later.

    That is the gradients themselves where the norm forms them anyway and they take no more memory than the factor's operands.
    """
    sizes = (count(factor), *factor.shape)
    if all(type(size) is int for size in sizes) and norm_algorithm(factor, functional=functional) == "pieces":
        dtype = wide_dtype(factor.like.dtype)
        if prod(sizes) * dtype.itemsize <= operand_bytes(factor):
            factor = Dense(widened(factor).materialize(functional=functional))
    return sq_norm(factor, functional=functional), factor
