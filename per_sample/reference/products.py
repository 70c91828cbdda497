"""Inner products with directions, other samples and random directions, from the gradients."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample import _trees as trees
from per_sample._containers import open_tree
from per_sample._errors import ArgumentError
from per_sample.reference.dense import Gradients, dense_gradients
from per_sample.reference.map import LeafGrads

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._arguments import Argnums
    from per_sample._signatures import P, Randomness


def per_sample_grad_dot(
    fn: Callable[P, Any],
    direction: Any,
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.per_sample_grad_dot`` by ``vmap(grad(fn))`` and a product of each row with the direction.

    Args:
        fn: as in ``per_sample.per_sample_grad_dot``, and so are the other arguments.
        direction: as in ``per_sample.per_sample_grad_dot``.
        argnums: as in ``per_sample.per_sample_grad_dot``.
        in_dims: as in ``per_sample.per_sample_grad_dot``.
        has_aux: as in ``per_sample.per_sample_grad_dot``.
        keep_batch_dim: as in ``per_sample.per_sample_grad_dot``.
        chunk_size: as in ``per_sample.per_sample_grad_dot``.
        randomness: as in ``per_sample.per_sample_grad_dot``.

    Returns:
        A function that returns the products ``[N]``; with ``has_aux`` a pair of them and the auxiliary values.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> w, x = torch.ones(2), torch.tensor([[3.0, 4.0]])
        >>> reference.per_sample_grad_dot(lambda w, x: (w * x).sum(), torch.tensor([1.0, -1.0]))(w, x)
        tensor([-1.])
    """
    gradients = dense_gradients(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = gradients(args, kwargs)
        towards = _checked(direction, found)
        dots = (found.matrix() @ torch.cat([v.conj().flatten() for v in towards]).to(found.matrix().dtype)).real
        return (dots, found.aux) if has_aux else dots

    return transformed


def grad_gram(
    fn: Callable[P, Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    other: tuple[Any, ...] | list[Any] | None = None,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.grad_gram`` by ``vmap(grad(fn))`` and one matrix product.

    Args:
        fn: as in ``per_sample.grad_gram``, and so are the other arguments.
        argnums: as in ``per_sample.grad_gram``.
        in_dims: as in ``per_sample.grad_gram``.
        other: as in ``per_sample.grad_gram``.
        has_aux: as in ``per_sample.grad_gram``.
        keep_batch_dim: as in ``per_sample.grad_gram``.
        chunk_size: as in ``per_sample.grad_gram``.
        randomness: as in ``per_sample.grad_gram``.

    Returns:
        A function that returns the products ``[N, N]`` or ``[N, M]``; with ``has_aux`` a pair of them and the auxiliary values.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> reference.grad_gram(lambda w, x: (w * x).sum())(torch.ones(2), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([[25.,  3.],
                [ 3.,  1.]])
    """
    if other is not None and not isinstance(other, (tuple, list)):
        raise ArgumentError(f"`other` must be a tuple of arguments, such as `(x,)`; got {type(other).__name__}.")
    gradients = dense_gradients(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = gradients(args, kwargs)
        left = found.matrix()
        right = left
        if other is not None:
            if len(other) != len(args) - len(found.arguments.argnums):
                raise ArgumentError(f"`other` must hold the arguments that are not differentiated; got {len(other)}.")
            others = iter(other)
            right = gradients(tuple(a if i in found.arguments.argnums else next(others) for i, a in enumerate(args)), kwargs).matrix()
        products = (left @ right.mH).real
        return (products, found.aux) if has_aux else products

    return transformed


def projected_grad(
    fn: Callable[P, Any],
    projector: Any,
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.projected_grad`` by ``vmap(grad(fn))`` and a product with each leaf's random matrix.

    Args:
        fn: as in ``per_sample.projected_grad``, and so are the other arguments.
        projector: as in ``per_sample.projected_grad``.
        argnums: as in ``per_sample.projected_grad``.
        in_dims: as in ``per_sample.projected_grad``.
        has_aux: as in ``per_sample.projected_grad``.
        keep_batch_dim: as in ``per_sample.projected_grad``.
        chunk_size: as in ``per_sample.projected_grad``.
        randomness: as in ``per_sample.projected_grad``.

    Returns:
        A function that returns the projections ``[N, k]``; with ``has_aux`` a pair of them and the auxiliary values.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> from per_sample import RademacherProjector
        >>> w, x = torch.ones(2), torch.tensor([[3.0, 4.0]])
        >>> reference.projected_grad(lambda w, x: (w * x).sum(), RademacherProjector(5))(w, x).shape
        torch.Size([1, 5])
    """
    if not callable(getattr(projector, "matrix", None)):
        raise ArgumentError(f"`projector` must be a projector, such as GaussianProjector(k); got {type(projector).__name__}.")
    gradients = dense_gradients(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        found = gradients(args, kwargs)
        parts = [LeafGrads(g).project(projector, i) for i, g in enumerate(found.leaves)]
        projected = torch.stack(parts).sum(0)
        return (projected, found.aux) if has_aux else projected

    return transformed


def _checked(direction: Any, found: Gradients) -> list[Tensor]:
    """The leaves of a direction that has the structure of one sample's gradients, in the order of the positional arguments."""
    numbers, wanted = trees.flatten(found.arranged(list(range(len(found.leaves)))))
    leaves, spec = trees.flatten(open_tree(direction))
    if spec != wanted:
        raise ArgumentError(f"`direction` must have the structure of one sample's gradients, {wanted}; got {spec}.")
    given = {number: v for number, v in zip(numbers, leaves, strict=True) if number is not None}
    for number, v in given.items():
        wanted_shape, shape = list(found.leaves[number].shape[1:]), list(v.shape) if isinstance(v, Tensor) else type(v).__name__
        if shape != wanted_shape:
            raise ArgumentError(f"A leaf of `direction` must be a tensor of shape {wanted_shape}; got {shape}.")
        if v.is_complex() and not found.leaves[number].is_complex():
            raise ArgumentError("A leaf of `direction` is complex where the parameter is real.")
    return [given[number] for number in sorted(given)]
