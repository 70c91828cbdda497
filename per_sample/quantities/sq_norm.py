"""The squared norm of every sample's gradient, without the gradients where structure allows.

A clipping bound rests on it, so it must not be too small: where a fast way may have lost its digits (terms that cancel, squares beyond the
range of the dtype) the samples concerned are computed once more, directly and in float64.
"""

from __future__ import annotations

from math import inf, prod

import torch
from torch import Tensor

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View
from per_sample._kernels.conv_norm import conv_norm_algorithm, conv_sq_norm
from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.gram_norm import CANCELLATION, finest
from per_sample._kernels.outer_norm import outer_norm_algorithm, outer_sq_norm
from per_sample._kernels.rows import rows_sq_norm
from per_sample._kernels.squares import square_sums
from per_sample.quantities.formed import compact, formed_pieces, held_at_once, joined, real
from per_sample.quantities.inner import inner
from per_sample.quantities.pieces import chosen, wide, wide_dtype
from per_sample.quantities.precision import doubled, mapped, operands, real_dtype

__all__ = ["inner", "norm_algorithm", "sq_norm"]


def sq_norm(factor: Factor, *, functional: bool = False) -> Tensor:
    """The squared norm of each sample's gradient.

    Args:
        factor: the gradients.
        functional: use out-of-place differentiable operators and no branch on values; implied where a derivative, a functorch transform or
            a trace is under way.

    Returns:
        ``[n]``, real, in float64 (on devices that have it), for its range: the square of a float32 norm always fits. Not finite for
        exactly those samples whose gradient or its square is not.
    """
    functional = functional or must_be_functional(*operands(factor))
    value, floor = _norm(factor, functional)
    if functional or (isinstance(floor, float) and floor == 0):
        return value
    doubtful = ~((value >= floor) & (value < inf))
    return _recomputed(factor, value, doubtful) if bool(doubtful.any()) else value


def norm_algorithm(factor: Factor, *, functional: bool = False) -> str:
    """The name of the way that `sq_norm` takes for the same arguments, for `explain`.

    "pieces" forms the gradients of a few samples at a time, "rows" those rows of them that receive anything; "square" finds them formed.
    """
    functional = functional or must_be_functional(*operands(factor))
    if isinstance(factor, View):
        return norm_algorithm(factor.base, functional=functional)
    if isinstance(factor, Sum):
        terms = factor.merged()
        return norm_algorithm(terms[0], functional=functional) if len(terms) == 1 else _sum_algorithm(terms, functional)
    if isinstance(factor, Outer):
        return outer_norm_algorithm(factor.left, factor.right, functional=functional)
    if isinstance(factor, ConvOuter):
        return conv_norm_algorithm(factor.x, factor.g, factor.geometry, functional=functional)
    if isinstance(factor, Rows):
        return "rows" if compact(factor) else "pieces"
    return "square" if isinstance(factor, Dense) else "pieces"


def _norm(factor: Factor, functional: bool) -> tuple[Tensor, Tensor | float]:
    """The squared norms by the way chosen, and the bound at or above which each of them is right."""
    if isinstance(factor, View):
        return _norm(factor.base, functional)
    if isinstance(factor, Sum):
        terms = factor.merged()
        if len(terms) == 1:
            return _norm(terms[0], functional)
        if _sum_algorithm(terms, functional) == "terms":
            return _norm_of_terms(terms, functional)
        return _formed_norm(factor, functional)
    algorithm = norm_algorithm(factor, functional=functional)
    if isinstance(factor, Outer) and algorithm != "pieces":
        value, floor = outer_sq_norm(factor.left, factor.right, algorithm, functional=functional)
    elif isinstance(factor, ConvOuter) and algorithm != "pieces":
        value, floor = conv_sq_norm(factor.x, factor.g, factor.geometry, algorithm, functional=functional)
    elif isinstance(factor, Rows) and algorithm == "rows" and not functional and not factor.g.is_complex():
        wide_g = wide(factor.g)
        return rows_sq_norm(factor.index, wide_g), _least(wide_g)
    else:
        return _formed_norm(factor, functional)
    return value, 0.0 if floor is None else floor


def _sum_algorithm(terms: list[Factor], functional: bool) -> str:
    """Only an embedding whose matrix is the head's too has a cross term that is cheaper than the gradients."""
    kinds = {type(term): term for term in terms}
    if len(terms) != 2 or set(kinds) != {Outer, Rows}:
        return "pieces"
    return "pieces" if "pieces" in [norm_algorithm(term, functional=functional) for term in terms] else "terms"


def _norm_of_terms(terms: list[Factor], functional: bool) -> tuple[Tensor, Tensor | float]:
    norms = [_norm(term, functional) for term in terms]
    a, b = terms
    value = norms[0][0] + norms[1][0] + 2 * inner(a, b, functional=functional)
    if functional:
        return value.clamp_min(0), 0.0
    # What the terms may lose when they cancel one another: as much as when the parts of one of them do.
    least = CANCELLATION[wide_dtype(a.like.dtype)]
    floors = [torch.maximum(own * least, torch.as_tensor(floor, dtype=own.dtype, device=own.device)) for own, floor in norms]
    return value, (floors[0].sqrt() + floors[1].sqrt()).square()


def _formed_norm(factor: Factor, functional: bool) -> tuple[Tensor, float]:
    """The squared norms by the gradients themselves."""
    found = []
    for grads in formed_pieces(factor, functional=functional):
        found.append(_square_sums(grads, functional))
    return joined(found), 0.0 if functional else _least(grads)


def _least(grads: Tensor) -> float:
    """Below which squares in the gradients' own precision have lost digits."""
    return 0.0 if real_dtype(grads.dtype) == finest(grads.device) else 1e10 * torch.finfo(grads.dtype).tiny


def _square_sums(grads: Tensor, functional: bool) -> Tensor:
    """The sum of the squares of each sample's numbers, ``[n, *shape]`` to ``[n]``."""
    x = real(grads)
    return square_sums(x.reshape(x.shape[0], prod(x.shape[1:])), functional=functional)


def _recomputed(factor: Factor, value: Tensor, doubtful: Tensor) -> Tensor:
    """The norms with those of some samples computed in float64, in the end directly, unless their gradient is plainly zero."""
    numbers = doubtful.nonzero().flatten()
    found = []
    for some in numbers.split(held_at_once(factor)):
        piece = chosen(factor, some)
        # Samples without a gradient are many, and need no second look: zero times what is finite.
        again = ~(_vanishes(piece) & _finite(piece))
        norms = torch.zeros_like(value[some])
        if bool(again.any()):
            norms[again] = _wider_norm(chosen(piece, again.nonzero().flatten()))
        found.append(norms)
    return value.index_put((numbers,), torch.cat(found))


def _wider_norm(factor: Factor) -> Tensor:
    """By the fast way once more where float64 can better it."""
    wider = mapped(factor, doubled)
    return _formed_norm(factor, False)[0] if wider.like.dtype == factor.like.dtype else sq_norm(wider)


def _finite(factor: Factor) -> Tensor:
    """Whether all that each sample's gradient is made of is finite, ``[n]``."""
    if isinstance(factor, Sum):
        return torch.stack([_finite(term) for term in factor.terms]).all(0)
    if isinstance(factor, View):
        return _finite(factor.base)
    if isinstance(factor, Hadamard):
        return _finite(factor.base) & factor.by.isfinite().all()
    return torch.stack([x.isfinite().reshape(x.shape[0], prod(x.shape[1:])).all(1) for x in operands(factor)]).all(0)


def _vanishes(factor: Factor) -> Tensor:
    """Whether each sample's gradient is zero because of an operand that is, ``[n]``."""
    if isinstance(factor, Sum):
        return torch.stack([_vanishes(term) for term in factor.terms]).all(0)
    if isinstance(factor, View | Hadamard):
        return _vanishes(factor.base)
    if isinstance(factor, Rows):
        return ~((factor.g != 0) & (factor.index >= 0).unsqueeze(2)).flatten(1).any(1)
    return torch.stack([~(x != 0).reshape(x.shape[0], prod(x.shape[1:])).any(1) for x in operands(factor)]).any(0)
