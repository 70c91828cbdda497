"""Weighted sums of every sample's gradients, from the gradients."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from per_sample._errors import ArgumentError
from per_sample.reference.dense import dense_gradients, norms_of, weighted_sums

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._arguments import Argnums
    from per_sample._signatures import Memory, P, Randomness


def weighted_grad(
    fn: Callable[P, Any],
    weights: Tensor | Callable[[Tensor], Tensor],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    return_values: bool = False,
    memory: Memory = "fast",
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.weighted_grad`` by ``vmap(grad(fn))`` and a sum over the samples.

    Args:
        fn: as in ``per_sample.weighted_grad``, and so are the other arguments.
        weights: as in ``per_sample.weighted_grad``.
        argnums: as in ``per_sample.weighted_grad``.
        in_dims: as in ``per_sample.weighted_grad``.
        return_values: as in ``per_sample.weighted_grad``.
        memory: as in ``per_sample.weighted_grad``.
        has_aux: as in ``per_sample.weighted_grad``.
        keep_batch_dim: as in ``per_sample.weighted_grad``.
        chunk_size: as in ``per_sample.weighted_grad``.
        randomness: as in ``per_sample.weighted_grad``.

    Returns:
        A function that returns the sums; with ``return_values`` and ``has_aux`` a tuple.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> w, x = torch.ones(2), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> reference.weighted_grad(lambda w, x: (w * x).sum(), torch.tensor([2.0, 1.0]))(w, x)
        tensor([7., 8.])
    """
    check_memory(memory)
    gradients = dense_gradients(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = gradients(args, kwargs)
        given = weights(norms_of(found.matrix())) if callable(weights) else weights
        if not isinstance(given, Tensor) or given.shape != (found.arguments.n,) or given.is_complex():
            shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ArgumentError(f"`weights` must be one real number for each sample, a tensor of shape [{found.arguments.n}]; got {shape}.")
        sums = found.as_arguments(weighted_sums(found.leaves, given))
        return found.beside([sums], values=return_values, aux=has_aux)

    return transformed


def check_memory(memory: Any) -> None:
    """Refuse a plan that does not exist; here they are all the same."""
    if memory not in ("fast", "low"):
        raise ArgumentError(f"`memory` must be 'fast' or 'low'; got {memory!r}.")
