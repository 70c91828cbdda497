"""Norms of any order of every sample's gradient."""

from __future__ import annotations

from math import prod

from torch import Tensor

from per_sample._factors import Factor, Outer, Sum, View
from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.gram_norm import finest
from per_sample.quantities.combined import root, vector_norm
from per_sample.quantities.formed import formed_pieces, joined
from per_sample.quantities.precision import doubled, operands
from per_sample.quantities.sq_norm import sq_norm


def norm(factor: Factor, ord: float = 2, *, functional: bool = False) -> Tensor:
    """The vector norm of each sample's gradient.

    Args:
        factor: the gradients.
        ord: a positive number or ``inf``.
        functional: use out-of-place differentiable operators only; implied where a derivative, a functorch transform or a trace is under
            way.

    Returns:
        ``[n]``, in float64 on devices that have it.
    """
    functional = functional or must_be_functional(*operands(factor))
    if ord == 2:
        return root(sq_norm(factor, functional=functional))
    if isinstance(factor, View):
        return norm(factor.base, ord, functional=functional)
    if isinstance(factor, Sum) and len(terms := factor.merged()) == 1:
        return norm(terms[0], ord, functional=functional)
    if isinstance(factor, Outer) and factor.left.dim() == 3 and _is_one(factor.left.shape[2]):
        # Each of one side meets each of the other.
        return _reduced(doubled(factor.left), ord) * _reduced(doubled(factor.right), ord)
    return joined([_reduced(grads, ord) for grads in formed_pieces(factor, functional=functional)])


def _is_one(size: int) -> bool:
    # A size unknown to a trace must not be compared.
    return type(size) is int and size == 1


def _reduced(grads: Tensor, ord: float) -> Tensor:
    return vector_norm(grads.abs().reshape(grads.shape[0], prod(grads.shape[1:])).to(finest(grads.device)), ord)
