"""How large the parts are that every sample's gradient is a sum of: what rounding in such sums is relative to."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View
from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.gram_norm import finest
from per_sample.quantities.pieces import wide


def sq_condition(factor: Factor, square: Tensor) -> Tensor:
    """The square of a bound on the sum of the norms of the parts of each sample's gradient, ``[n]``; ``square``: its squared norms."""
    return square.detach() if _is_one_part(factor) else _condition(factor).square()


def _is_one_part(factor: Factor) -> bool:
    """Whether there is nothing that could cancel: gradients that are formed, or one outer product a sample."""
    if isinstance(factor, View):
        return _is_one_part(factor.base)
    t = factor.left.shape[-1] if isinstance(factor, Outer) else None
    return isinstance(factor, Dense) or (type(t) is int and t == 1)


def _condition(factor: Factor) -> Tensor:
    """The bound."""
    if isinstance(factor, View):
        return _condition(factor.base)
    if isinstance(factor, Sum):
        first, *rest = [_condition(term) for term in factor.terms]
        for other in rest:
            first = first + other
        return first
    if isinstance(factor, Hadamard):
        by = factor.by.abs().amax() if factor.by.dtype != torch.bool and factor.by.numel() else 1
        return _condition(factor.base) * by
    # By the inequality of Cauchy and Schwarz over the positions.
    if isinstance(factor, Outer):
        return _size(factor.left) * _size(factor.right)
    if isinstance(factor, ConvOuter):
        return _size(factor.g) * _size(factor.x) * prod(factor.geometry.kernel) ** 0.5
    if isinstance(factor, Rows):
        return _size(factor.g) * max(1, factor.g.shape[1]) ** 0.5
    assert isinstance(factor, Dense)
    return _size(factor.value)


def _size(x: Tensor) -> Tensor:
    # Rounding has no derivative.
    x = wide(x.detach())
    dtype = finest(x.device)
    if must_be_functional(x):
        return _norm(x.to(torch.promote_types(x.dtype, dtype)))
    found = _norm(x).to(dtype)
    # Squares in single precision may have left its range.
    doubtful = ~((found > 1e-15) & found.isfinite())
    if bool(doubtful.any()):
        numbers = doubtful.nonzero().flatten()
        found = found.index_copy(0, numbers, _norm(x[numbers].to(torch.promote_types(x.dtype, dtype))))
    return found


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, 2, tuple(range(1, x.dim()))) if x.dim() > 1 else x.abs()
