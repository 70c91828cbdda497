"""Gradients of functions with several outputs."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample._batches import in_order
from per_sample._evaluate import Evaluation, transform
from per_sample._targets import Convention, Quantity, Targets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums
    from per_sample._ranks import Ranks
    from per_sample._signatures import P, Randomness
    from per_sample.quantities.leaf import LeafGrads


def per_sample_jacobian(
    fn: Callable[P, Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """Transform a function of one sample with several outputs into one that returns every sample's Jacobian.

    Equal, leaf for leaf, to ``torch.func.vmap(torch.func.jacrev(fn, argnums), in_dims)``. The function runs once, forward, and one
    backward pass is taken for each output.

    Args:
        fn: takes ONE sample and returns a real tensor of any shape ``out``: logits, or several losses (with ``has_aux`` a pair of it and
            auxiliary values).
        argnums: as in ``per_sample_grad``, and so are the arguments after it.
        in_dims: as in ``per_sample_grad``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``; an axis of size 1 that ``fn`` returns is kept.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns the structure of the differentiated argument with leaves ``[n, *out, *shape]``; with
        ``has_aux`` a pair ``(jacobian, aux)``.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import per_sample_jacobian
        >>> per_sample_jacobian(lambda w, x: w @ x)(torch.ones(3, 2), torch.randn(5, 2)).shape
        torch.Size([5, 3, 3, 2])
    """
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness, jacobian=True, empty=True)

    def finish(found: Evaluation, targets: Targets) -> Any:
        sizes = [(*found.values.shape, *shape) for shape in targets.shapes]
        if prod(found.values.shape[1:]) == 0 and found.values.shape[0]:
            # There is no output, and nothing was differentiated.
            leaves = [found.values.new_zeros(size, dtype=leaf.dtype) for leaf, size in zip(targets.leaves, sizes, strict=True)]
        else:
            leaves = [x.reshape(size) for x, size in zip(found.result, sizes, strict=True)]
        jacobian = targets.structured(leaves)
        return (jacobian, found.aux) if has_aux else jacobian

    return transform(fn, convention, lambda _: _Jacobian(), finish)


class _Jacobian(Quantity):
    """The gradients of each output side by side."""

    def leaf(self, number: int, grads: list[LeafGrads], samples: Sequence[int] | None) -> Tensor:
        return torch.stack([x.materialize() for x in grads], 1) if grads else torch.empty(0)

    def join(self, parts: list[list[Tensor]], samples: list[Sequence[int] | None]) -> list[Tensor]:
        return [in_order(list(pieces), samples) for pieces in zip(*parts, strict=True)]

    def across(self, result: list[Tensor], ranks: Ranks) -> list[Tensor]:
        # Where there is no output there are no rows.
        return [x if x.dim() == 1 else ranks.rows(x) for x in result]
