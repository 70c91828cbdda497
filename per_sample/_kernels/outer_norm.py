"""Squared norms of a product of matrices for each sample, without the products."""

from __future__ import annotations

from math import inf, prod

import torch
from torch import Tensor

from per_sample._kernels.gram_norm import HALF, gram, gram_piece, joined, norm_of_grams, product_dtype
from per_sample._kernels.squares import square_sums

# The cost of one element of a product beyond its arithmetic, in multiply-adds: writing it, reading it, squaring it.
ELEMENT = 8


def outer_norm_algorithm(left: Tensor, right: Tensor, *, functional: bool = False) -> str:
    """The way to the squared norms of ``left (n, *e, o, t)`` times ``right (n, *e, t, i)``.

    Returns:
        "product" of the norms of both sides, for one position; "gram": by the Gram matrices of the positions; "pieces": the products
        themselves, of a few samples at a time.
    """
    costs = outer_norm_costs(left, right, functional=functional)
    return min(costs, key=costs.__getitem__)


def outer_norm_costs(left: Tensor, right: Tensor, *, functional: bool = False) -> dict[str, float]:
    """What each way that there is costs for one product, in multiply-adds; of two that cost the same the first is taken."""
    (o, t), i = left.shape[-2:], right.shape[-1]
    costs = {"pieces": direct_cost(t, o, i)}
    if left.dtype.is_complex or right.dtype.is_complex or not all(type(size) is int for size in (o, t, i)) or 0 in (o, t, i):
        return costs
    if t == 1:
        return {"product": o + i, **costs}
    dtype = torch.promote_types(left.dtype, right.dtype)
    return costs | {"gram": gram_cost(t, o + i, dtype, left.device, functional)}


def gram_cost(t: int, width: int, dtype: torch.dtype, device: torch.device, functional: bool) -> float:
    """Multiply-adds for Gram matrices of ``t`` positions, of vectors whose lengths add up to ``width``; infinite where they will not do."""
    products = product_dtype(dtype, device, functional)
    if functional and products.itemsize <= dtype.itemsize:
        return inf  # nobody could look whether digits were lost
    slowness = 2 if products.itemsize > max(dtype.itemsize, 4) else 1
    return slowness * t * t * (width + 4 * ELEMENT)


def direct_cost(t: int, o: int, i: int) -> float:
    """Multiply-adds for the products themselves."""
    return (t + ELEMENT) * o * i


def outer_sq_norm(left: Tensor, right: Tensor, algorithm: str, *, functional: bool = False) -> tuple[Tensor, Tensor | None]:
    """The squared norms of ``left (n, *e, o, t)`` times ``right (n, *e, t, i)``, and below which they are doubtful, ``(n)`` each.

    Args:
        left: of any strides.
        right: of any strides.
        algorithm: "product" or "gram".
        functional: use out-of-place differentiable operators only.
    """
    batch = left.shape[:-2]
    left, right = left.transpose(-1, -2).flatten(0, -3), right.flatten(0, -3)  # (n e, t, o) and (n e, t, i)
    if algorithm == "product":
        value, floor = _norm_of_product(left.flatten(1), right.flatten(1), functional)
    else:
        value, floor = _norm_by_grams(left, right, functional)
    return _over_blocks(value, batch), None if floor is None else _over_blocks(floor, batch)


def _over_blocks(x: Tensor, batch: torch.Size) -> Tensor:
    """The sum over the blocks of each sample, ``(n e)`` to ``(n)``."""
    return x.reshape(batch).flatten(1).sum(1) if len(batch) > 1 else x


def _norm_of_product(left: Tensor, right: Tensor, functional: bool) -> tuple[Tensor, Tensor | None]:
    left, right = (x.float() if x.dtype in HALF else x for x in (left, right))
    squares = [square_sums(x, functional=functional) for x in (left, right)]
    # Below the range in which squares keep their digits, those of either side are not to be believed.
    floor = None if functional else 1e10 * torch.finfo(left.dtype).tiny * (squares[0] + squares[1])
    return squares[0] * squares[1], floor


def outer_norm_scratch(left: Tensor, right: Tensor, algorithm: str, functional: bool) -> int:
    """The bytes that `outer_sq_norm` holds besides operands and result."""
    if algorithm == "product":
        return 0
    dtype = product_dtype(torch.promote_types(left.dtype, right.dtype), left.device, functional)
    t, blocks = left.shape[-1], prod(left.shape[:-2])
    return gram_piece(blocks, t, dtype.itemsize, left.device) * 3 * t * t * dtype.itemsize


def _norm_by_grams(left: Tensor, right: Tensor, functional: bool) -> tuple[Tensor, Tensor | None]:
    m, t = left.shape[:2]
    dtype = product_dtype(torch.promote_types(left.dtype, right.dtype), left.device, functional)
    step = gram_piece(m, t, dtype.itemsize, left.device) if type(m) is int else m
    sides = (torch.split(left, step), torch.split(right, step)) if type(m) is int and step < m else ([left], [right])
    found = []
    for piece in zip(*sides, strict=True):
        grams = [gram(x.to(dtype), functional=functional) for x in piece]
        found.append(norm_of_grams(grams[0], grams[1], functional=functional))
    return joined(found)
