"""Every sample's gradient norm, from the gradients."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from per_sample._errors import ArgumentError
from per_sample.reference.dense import dense_gradients, norms_of, rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._arguments import Argnums
    from per_sample._signatures import P, Randomness


def per_sample_grad_norm(
    fn: Callable[P, Any],
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
) -> Callable[P, Any]:
    """``per_sample.per_sample_grad_norm`` by ``vmap(grad(fn))`` and a norm of each row.

    Args:
        fn: as in ``per_sample.per_sample_grad_norm``, and so are the other arguments.
        argnums: as in ``per_sample.per_sample_grad_norm``.
        in_dims: as in ``per_sample.per_sample_grad_norm``.
        ord: as in ``per_sample.per_sample_grad_norm``.
        per_leaf: as in ``per_sample.per_sample_grad_norm``.
        return_values: as in ``per_sample.per_sample_grad_norm``.
        has_aux: as in ``per_sample.per_sample_grad_norm``.
        keep_batch_dim: as in ``per_sample.per_sample_grad_norm``.
        chunk_size: as in ``per_sample.per_sample_grad_norm``.
        randomness: as in ``per_sample.per_sample_grad_norm``.

    Returns:
        A function that returns the norms ``[N]``, or a pytree of them; with ``return_values`` and ``has_aux`` a tuple.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> reference.per_sample_grad_norm(lambda w, x: (w * x).sum())(torch.ones(2), torch.tensor([[3.0, 4.0]]))
        tensor([5.])
    """
    if isinstance(ord, bool) or not isinstance(ord, (int, float)) or not ord > 0:
        raise ArgumentError(f"`ord` must be a positive number or infinity; got {ord!r}.")
    gradients = dense_gradients(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = gradients(args, kwargs)
        norms: Any = found.as_arguments([norms_of(rows(g), ord) for g in found.leaves]) if per_leaf else norms_of(found.matrix(), ord)
        return found.beside([norms], values=return_values, aux=has_aux)

    return transformed
