"""Gradients as sums over positions of a column times a row, and Grams of such sums position by position."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from per_sample._factors import ConvOuter, Factor, Outer, Rows, Sum, View
from per_sample._kernels.conv_geometry import windows
from per_sample.quantities.precision import doubled


@dataclass(frozen=True, eq=False)
class Positions:
    """Each gradient, as a matrix ``[o, i]``, is the sum over ``t`` of ``left[:, t]`` times ``right[t]``.

    ``left [n, o, t]``; or of an integer dtype ``[n, t]``: a one at that place, none where it is negative. ``right [n, t, i]``; or a
    convolution, whose unfolded input is ``right``.
    """

    left: Tensor
    right: Tensor | ConvOuter
    matrix: tuple[int, int]

    @property
    def indexed(self) -> bool:
        """Whether ``left`` tells places."""
        return not (self.left.is_floating_point() or self.left.is_complex())

    @property
    def number(self) -> int:
        """Of positions."""
        return self.left.shape[-1]

    def piece(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Both operands for some samples, in float64."""
        left = self.left[start:end]
        if isinstance(self.right, ConvOuter):
            conv = self.right
            right = columns(ConvOuter(conv.x[start:end], conv.g[start:end], conv.geometry))
        else:
            right = doubled(self.right[start:end])
        if not self.indexed:
            return doubled(left), right
        return left, right.masked_fill((left < 0).unsqueeze(2), 0)


def columns(conv: ConvOuter) -> Tensor:
    """The unfolded input of a convolution without groups, ``[n, b * l, i * k]``, in float64."""
    d = len(conv.geometry.kernel)
    seen = windows(doubled(conv.x).conj(), conv.geometry)  # (n, b, i, *l, *k)
    for axis, size in enumerate(conv.g.shape[3:], start=3):
        # A transposed convolution may leave out the last locations.
        seen = seen.narrow(axis, 0, size)
    seen = seen.permute(0, 1, *range(3, 3 + d), 2, *range(3 + d, 3 + 2 * d))
    return seen.flatten(2 + d).flatten(1, 1 + d)


def positions(factor: Factor) -> list[Positions] | None:
    """The factor in this form, term by term; None where it has none."""
    if isinstance(factor, View):
        return positions(factor.base)
    if isinstance(factor, Outer) and factor.left.dim() == 3:
        return [Positions(factor.left, factor.right, (factor.left.shape[1], factor.right.shape[2]))]
    if isinstance(factor, Rows):
        return [Positions(factor.index, factor.g, (factor.num_rows, factor.g.shape[2]))]
    if isinstance(factor, ConvOuter) and factor.geometry.groups == 1:
        shape = (factor.shape[0], prod(factor.shape[1:]))
        return [Positions(factor.g.movedim(2, 1).flatten(2), factor, shape)]
    if not isinstance(factor, Sum):
        return None
    found: list[Positions] = []
    for term in factor.terms:
        own = positions(term)
        if own is None or (found and own[0].matrix != found[0].matrix):
            return None
        found += own
    return found


def pair_grams(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """The real inner products ``[n, m]`` of all pairs of some samples, from their operands."""
    (left_a, right_a), (left_b, right_b) = a, b
    n, m = left_a.shape[0], left_b.shape[0]
    products = _left_products(left_a, left_b) * (right_a.flatten(0, 1) @ right_b.flatten(0, 1).mH)
    products = products.real if products.is_complex() else products
    if left_a.shape[-1] == left_b.shape[-1] == 1:
        return products
    return products.view(n, left_a.shape[-1], m, left_b.shape[-1]).sum((1, 3))


def _left_products(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of all positions' columns, ``[n t, m s]``."""
    a_indexed, b_indexed = a.dim() == 2, b.dim() == 2
    if a_indexed and b_indexed:
        return a.reshape(-1, 1) == b.reshape(1, -1)
    if a_indexed:
        return _left_products(b, a).mH
    columns = a.transpose(1, 2).flatten(0, 1)
    if b_indexed:
        return columns.index_select(1, b.clamp(min=0).flatten())
    return columns @ b.transpose(1, 2).flatten(0, 1).mH


def conditions(terms: list[Positions]) -> Tensor:
    """The sum over positions of the norms of what is added up, for each sample."""
    total: Tensor | None = None
    for term in terms:
        left, right = term.piece(0, term.left.shape[0])
        size = right.norm(dim=2) if term.indexed else right.norm(dim=2) * left.norm(dim=1)
        total = size.sum(1) if total is None else total + size.sum(1)
    assert total is not None
    return total
