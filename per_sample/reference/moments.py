"""Second moments, variances and the noise scale, from the gradients."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from per_sample._errors import ArgumentError
from per_sample.reference.dense import dense_gradients, deviations, squares

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._arguments import Argnums
    from per_sample._signatures import P, Randomness


def grad_second_moment(
    fn: Callable[P, Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.grad_second_moment`` by ``vmap(grad(fn))`` and the mean of the squares.

    Args:
        fn: as in ``per_sample.grad_second_moment``, and so are the other arguments.
        argnums: as in ``per_sample.grad_second_moment``.
        in_dims: as in ``per_sample.grad_second_moment``.
        has_aux: as in ``per_sample.grad_second_moment``.
        keep_batch_dim: as in ``per_sample.grad_second_moment``.
        chunk_size: as in ``per_sample.grad_second_moment``.
        randomness: as in ``per_sample.grad_second_moment``.

    Returns:
        A function that returns the mean of every element's square, with ``has_aux`` a pair of that and the auxiliary values.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> reference.grad_second_moment(lambda w, x: (w * x).sum())(torch.ones(1), torch.tensor([[1.0], [3.0]]))
        tensor([5.])
    """
    gradients = dense_gradients(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = gradients(args, kwargs)
        moments = found.as_arguments([squares(g).mean(0) for g in found.leaves])
        return (moments, found.aux) if has_aux else moments

    return transformed


def grad_variance(
    fn: Callable[P, Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    correction: float = 1,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.grad_variance`` by ``vmap(grad(fn))`` and the variance over the samples.

    Args:
        fn: as in ``per_sample.grad_variance``, and so are the other arguments.
        argnums: as in ``per_sample.grad_variance``.
        in_dims: as in ``per_sample.grad_variance``.
        correction: as in ``per_sample.grad_variance``.
        has_aux: as in ``per_sample.grad_variance``.
        keep_batch_dim: as in ``per_sample.grad_variance``.
        chunk_size: as in ``per_sample.grad_variance``.
        randomness: as in ``per_sample.grad_variance``.

    Returns:
        A function that returns every element's variance, without a sample axis; with ``has_aux`` a pair of that and the auxiliary values.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> reference.grad_variance(lambda w, x: (w * x).sum())(torch.ones(1), torch.tensor([[1.0], [3.0]]))
        tensor([2.])
    """
    if isinstance(correction, bool) or not isinstance(correction, (int, float)):
        raise ArgumentError(f"`correction` must be a number; got {correction!r}.")
    gradients = dense_gradients(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = gradients(args, kwargs)
        freedom = found.arguments.n - correction
        variances = found.as_arguments([deviations(g) / (freedom if freedom > 0 else math.nan) for g in found.leaves])
        return (variances, found.aux) if has_aux else variances

    return transformed


def gradient_noise_scale(
    fn: Callable[P, Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    return_parts: bool = False,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.gradient_noise_scale`` by ``vmap(grad(fn))``, the mean and the spread around it.

    Args:
        fn: as in ``per_sample.gradient_noise_scale``, and so are the other arguments.
        argnums: as in ``per_sample.gradient_noise_scale``.
        in_dims: as in ``per_sample.gradient_noise_scale``.
        return_parts: as in ``per_sample.gradient_noise_scale``.
        has_aux: as in ``per_sample.gradient_noise_scale``.
        keep_batch_dim: as in ``per_sample.gradient_noise_scale``.
        chunk_size: as in ``per_sample.gradient_noise_scale``.
        randomness: as in ``per_sample.gradient_noise_scale``.

    Returns:
        A function that returns the noise scale, without axes, or its two parts; with ``has_aux`` a pair of that and the auxiliary values.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> reference.gradient_noise_scale(lambda w, x: (w * x).sum())(torch.ones(1), torch.tensor([[1.0], [3.0]]))
        tensor(0.6667)
    """
    gradients = dense_gradients(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = gradients(args, kwargs)
        matrix, n = found.matrix(), found.arguments.n
        trace = deviations(matrix).sum() / (n - 1 if n > 1 else math.nan)
        square = squares(matrix.mean(0)).sum() - trace / max(n, 1)
        scale = (trace, square) if return_parts else trace / square
        return (scale, found.aux) if has_aux else scale

    return transformed
