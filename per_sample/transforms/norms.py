"""Norms of every sample's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor

from per_sample._batches import in_order
from per_sample._errors import ArgumentError
from per_sample._evaluate import Evaluation, transform
from per_sample._targets import Convention, Quantity, Targets
from per_sample.quantities.combined import promoted, root, total, vector_norm, widest
from per_sample.quantities.precision import real_dtype
from per_sample.quantities.side_by_side import row, units

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums
    from per_sample._ranks import Ranks
    from per_sample._signatures import P, Randomness, RunOptions
    from per_sample.quantities.leaf import LeafGrads


@overload
def per_sample_grad_norm(
    fn: Callable[P, Any],
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    ord: float = ...,
    per_leaf: Literal[False] = ...,
    return_values: Literal[False] = ...,
    has_aux: Literal[False] = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Tensor]: ...
@overload
def per_sample_grad_norm(
    fn: Callable[P, Any],
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    ord: float = ...,
    per_leaf: bool = ...,
    return_values: bool = ...,
    has_aux: bool = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Any]: ...
def per_sample_grad_norm(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    ord: float = 2,
    per_leaf: bool = False,
    return_values: bool = False,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., Any]:
    """Transform the loss of one sample into a function that returns the norm of every sample's gradient, without storing a gradient.

    Args:
        fn: as in ``per_sample_grad``.
        argnums: as in ``per_sample_grad``; the norm is that of all differentiated leaves together.
        in_dims: as in ``per_sample_grad``.
        ord: the order of the vector norm, a positive number or ``math.inf``.
        per_leaf: a norm for each leaf instead.
        return_values: also return every sample's loss.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns the norms ``[n]``, or with ``per_leaf`` the structure of the differentiated argument
        with norms ``[n]``, in float32 for parameters in half precision; or a tuple ``(norms, values, aux)`` of what is asked for. The
        norm of a gradient that is not finite is not finite, unless it would be if float32 could hold what it is made of.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import per_sample_grad_norm
        >>> per_sample_grad_norm(lambda w, x: w @ x)(torch.ones(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])

    Source:
        Goodfellow, Efficient Per-Example Gradient Computations, 2015, https://arxiv.org/abs/1510.01799.
    """
    if isinstance(ord, bool) or not isinstance(ord, (int, float)) or not ord > 0:
        raise ArgumentError(f"`ord` must be a positive number or math.inf; got {ord!r}.")
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)

    def finish(found: Evaluation, targets: Targets) -> Any:
        norms = targets.structured(found.result) if per_leaf else found.result[0]
        return found.beside([norms], values=return_values, aux=has_aux)

    return transform(fn, convention, lambda targets: _Norms(targets, float(ord), per_leaf), finish)


class _Norms(Quantity):
    """The norms of each leaf, or one of all."""

    def __init__(self, targets: Targets, ord: float, per_leaf: bool) -> None:
        self.targets = targets
        self.ord = ord
        self.per_leaf = per_leaf

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Any:
        if self.ord == 2 and not self.per_leaf:
            return row(grads) or grads.sq_norm()
        return grads.norm(self.ord)

    def run(self, leaves: list[Any], samples: Sequence[int] | None) -> list[Tensor]:
        if self.ord == 2 and not self.per_leaf:
            leaves = [unit.found if unit.shapes is None else unit.found.sq_norm() for unit in units(leaves, [0] * len(leaves))]
        dtypes = [real_dtype(leaf.dtype) for leaf in self.targets.leaves]
        if self.per_leaf:
            return [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        norms = root(total(leaves)) if self.ord == 2 else vector_norm(torch.stack(promoted(leaves), 1), self.ord)
        return [norms.to(widest(dtypes))]

    def join(self, parts: list[list[Tensor]], samples: list[Sequence[int] | None]) -> list[Tensor]:
        return [in_order(list(pieces), samples) for pieces in zip(*parts, strict=True)]

    def across(self, result: list[Tensor], ranks: Ranks) -> list[Tensor]:
        return [ranks.rows(x) for x in result]
