"""The gradients of several leaves as those of one: where all are small, a few operations instead of a few for each leaf."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from per_sample._factors import Dense
from per_sample.quantities.leaf import LeafGrads

# So many numbers are formed sooner than several leaves are asked one by one.
SMALL = 2**17


def are_small(shapes: Sequence[tuple[int, ...]], n: int) -> bool:
    """Whether it pays to form ``n`` samples' gradients of leaves of these shapes."""
    return len(shapes) > 1 and n * sum(prod(shape) for shape in shapes) <= SMALL


def side_by_side(leaves: list[LeafGrads]) -> LeafGrads | None:
    """All gradients of each sample as one row; None where only differentiable ops will do, or dtypes or devices differ."""
    likes = [grads.factor.like for grads in leaves]
    if any(grads.functional for grads in leaves) or len({(like.dtype, like.device) for like in likes}) > 1:
        return None
    return LeafGrads(Dense(torch.cat([grads.formed().reshape(grads.n, prod(grads.shape)) for grads in leaves], 1)))


def one_by_one(row: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """A row's part for each leaf."""
    parts = row.split([prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
