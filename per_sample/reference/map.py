"""A function of one leaf's gradients, for all leaves, from the gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample._errors import ArgumentError
from per_sample._trees import flatten
from per_sample.reference.dense import Gradients, dense_gradients, deviations, norms_of, rows, squares, weighted_sums, wide

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums
    from per_sample._signatures import Across, P, Randomness


@dataclass(frozen=True, eq=False, slots=True)
class LeafGrads:
    """Every sample's gradients of one leaf, with the questions of ``per_sample.LeafGrads``."""

    gradients: Tensor  # [N, *shape]

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.gradients)

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample's shape, that of the leaf."""
        return tuple(self.gradients.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the gradients."""
        return self.gradients.dtype

    def materialize(self) -> Tensor:
        """The gradients themselves."""
        return self.gradients

    def sq_norm(self) -> Tensor:
        """``[N]``: the squared norms."""
        return squares(self._rows).sum(1)

    def norm(self, ord: float = 2) -> Tensor:
        """``[N]``: the norms of any order, as those of vectors."""
        return norms_of(self._rows, ord)

    def weighted_sum(self, weights: Tensor | None = None) -> Tensor:
        """The sum over the samples, by default with weights of one."""
        return weighted_sums([self.gradients], self._rows.real.new_ones(self.n) if weights is None else weights)[0]

    def square_sum(self) -> Tensor:
        """The sum over the samples of the squares."""
        return squares(self.gradients).sum(0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean over the samples and the sum of the squared deviations from it."""
        return wide(self.gradients).mean(0), deviations(self.gradients)

    def dot(self, direction: Tensor) -> Tensor:
        """``[N]``: the products with a direction."""
        return (self._rows @ direction.conj().flatten().to(self._rows.dtype)).real

    def gram(self, other: LeafGrads) -> Tensor:
        """``[N, M]``: the products with other samples' gradients."""
        return (self._rows @ other._rows.mH).real

    def project(self, projector: Any, leaf: int) -> Tensor:
        """``[N, k]``: the products with a random matrix; a complex number counts as two."""
        g = torch.view_as_real(self.gradients.resolve_conj()) if self.gradients.is_complex() else wide(self.gradients)
        matrix = projector.matrix(tuple(g.shape[1:]), leaf, dtype=g.dtype, device=g.device)
        return rows(g) @ matrix.T

    def settled(self) -> tuple[Tensor, LeafGrads]:
        """The squared norms, and the same gradients."""
        return self.sq_norm(), self

    def of(self, samples: Tensor | slice) -> LeafGrads:
        """The gradients of some of the samples."""
        return LeafGrads(self.gradients[samples])

    def kept(self, keep: Tensor) -> LeafGrads:
        """The same, with zeros for the samples that ``keep [N]`` does not name."""
        return LeafGrads(torch.where(keep.reshape(-1, *(1,) * len(self.shape)), self.gradients, 0))

    @property
    def _rows(self) -> Tensor:
        return rows(self.gradients)


def per_sample_grad_map(
    fn: Callable[P, Any],
    leaf: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    trees: Sequence[Any] = (),
    across: Across = "samples",
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.per_sample_grad_map`` by ``vmap(grad(fn))`` and a call for each leaf.

    Args:
        fn: as in ``per_sample.per_sample_grad_map``, and so are the other arguments.
        leaf: as in ``per_sample.per_sample_grad_map``.
        argnums: as in ``per_sample.per_sample_grad_map``.
        in_dims: as in ``per_sample.per_sample_grad_map``.
        trees: as in ``per_sample.per_sample_grad_map``.
        across: as in ``per_sample.per_sample_grad_map``.
        has_aux: as in ``per_sample.per_sample_grad_map``.
        keep_batch_dim: as in ``per_sample.per_sample_grad_map``.
        chunk_size: as in ``per_sample.per_sample_grad_map``.
        randomness: as in ``per_sample.per_sample_grad_map``.

    Returns:
        A function that returns what ``leaf`` returns, for each leaf; with ``has_aux`` a pair of that and the auxiliary values.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> w, x = torch.ones(2), torch.tensor([[3.0, 4.0]])
        >>> reference.per_sample_grad_map(lambda w, x: (w * x).sum(), lambda grads: grads.sq_norm())(w, x)
        tensor([25.])
    """
    if not callable(leaf):
        raise ArgumentError(f"`leaf` must be callable; got {type(leaf).__name__}.")
    if across not in ("samples", "sum", "whole"):
        raise ArgumentError(f"`across` must be 'samples', 'sum' or 'whole'; got {across!r}.")
    if not isinstance(trees, (tuple, list)):
        raise ArgumentError(f"`trees` must be a tuple or a list of trees; got {type(trees).__name__}.")
    gradients = dense_gradients(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = gradients(args, kwargs)
        columns = [_entries(tree, found) for tree in trees]
        results = found.as_arguments([leaf(LeafGrads(g), *[column[i] for column in columns]) for i, g in enumerate(found.leaves)])
        return (results, found.aux) if has_aux else results

    return transformed


def _entries(tree: Any, found: Gradients) -> dict[int, Any]:
    """A tree's entry for each leaf, by the leaf's number."""
    numbers, wanted = flatten(found.as_arguments(list(range(len(found.leaves)))))
    entries, spec = flatten(tree)
    if spec != wanted:
        raise ArgumentError(f"`trees` must have the structure of the differentiated argument, {wanted}; got {spec}.")
    return dict(zip(numbers, entries, strict=True))
