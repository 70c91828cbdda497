"""The ways to a quantity that are weighed against each other, and what each costs, for `explain`."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View
from per_sample._kernels.conv_norm import conv_norm_costs, conv_norm_scratch
from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.outer_norm import ELEMENT, outer_norm_costs, outer_norm_scratch
from per_sample.quantities.formed import held_at_once
from per_sample.quantities.pieces import count, wide_dtype
from per_sample.quantities.precision import operands
from per_sample.quantities.sq_norm import norm_algorithm
from per_sample.quantities.weighted_sum import sum_algorithm


class Way(NamedTuple):
    """What a way costs for all samples."""

    # As the choice counts them: the arithmetic, and for every element that is written and read again some more.
    multiply_adds: float
    # Memory beyond operands and result.
    scratch_bytes: int


def way_of(factor: Factor, question: str, *, functional: bool = False, order: float = 2) -> tuple[str, dict[str, Way]]:
    """The name of the way that a method of `LeafGrads` takes, and the costs of all ways that it has the choice of.

    Args:
        factor: the gradients.
        question: the name of the method.
        functional: as for the method.
        order: of the norm.
    """
    if question in ("materialize", "formed"):
        while isinstance(factor, View):
            factor = factor.base
        return "" if isinstance(factor, Dense) else factor.algorithm(functional=functional), {}
    if question in ("sq_norm", "settled") or (question == "norm" and order == 2):
        return norm_algorithm(factor, functional=functional), norm_ways(factor, functional=functional)
    if question == "weighted_sum":
        return sum_algorithm(factor, functional=functional), {}
    return "", {}


def norm_ways(factor: Factor, *, functional: bool = False) -> dict[str, Way]:
    """The ways to the squared norms by what they cost, of which `norm_algorithm` names the cheapest; none where form alone decides."""
    functional = functional or must_be_functional(*operands(factor))
    if isinstance(factor, View):
        return norm_ways(factor.base, functional=functional)
    if isinstance(factor, Sum) and len(terms := factor.merged()) == 1:
        return norm_ways(terms[0], functional=functional)
    n = count(factor)
    if isinstance(factor, Outer):
        blocks = n * prod(factor.left.shape[1:-2])
        costs = outer_norm_costs(factor.left, factor.right, functional=functional)
        return {
            name: Way(
                blocks * cost, _scratch(factor) if name == "pieces" else outer_norm_scratch(factor.left, factor.right, name, functional)
            )
            for name, cost in costs.items()
        }
    if isinstance(factor, ConvOuter):
        costs = conv_norm_costs(factor.x, factor.g, factor.geometry, functional=functional)
        own = (factor.x, factor.g, factor.geometry)
        return {
            name: Way(n * cost, _scratch(factor) if name == "pieces" else conv_norm_scratch(*own, name, functional))
            for name, cost in costs.items()
        }
    if norm_algorithm(factor, functional=functional) != "pieces":
        return {}
    return {"pieces": Way(forming(factor) + ELEMENT * n * prod(factor.shape), _scratch(factor))}


def _scratch(factor: Factor) -> int:
    """What is formed at once."""
    dtype: torch.dtype = wide_dtype(factor.like.dtype)
    return min(count(factor), held_at_once(factor)) * prod(factor.shape) * dtype.itemsize


def forming(factor: Factor) -> int:
    """The multiply-adds of the gradients themselves, which are those of their sum, too."""
    if isinstance(factor, Outer):
        return factor.left.numel() * factor.right.shape[-1]
    if isinstance(factor, ConvOuter):
        return factor.g.numel() * prod(factor.shape[1:])
    if isinstance(factor, Rows):
        return factor.g.numel()
    if isinstance(factor, Sum):
        return sum(forming(term) for term in factor.terms)
    if isinstance(factor, View | Hadamard):
        return forming(factor.base)
    return 0
