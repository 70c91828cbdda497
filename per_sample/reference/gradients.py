"""Every sample's gradients and Jacobians by ``vmap``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.func import grad_and_value, jacrev, vmap

from per_sample import _trees as trees
from per_sample._arguments import as_arguments, check_options, one_zero_sample, read
from per_sample._containers import close_tree, open_tree, opened

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._arguments import Argnums, Arguments
    from per_sample._signatures import P, Randomness


def per_sample_grad(
    fn: Callable[P, Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.per_sample_grad`` by ``vmap(grad(fn))``.

    Args:
        fn: as in ``per_sample.per_sample_grad``, and so are the other arguments.
        argnums: as in ``per_sample.per_sample_grad``.
        in_dims: as in ``per_sample.per_sample_grad``.
        has_aux: as in ``per_sample.per_sample_grad``.
        keep_batch_dim: as in ``per_sample.per_sample_grad``.
        chunk_size: as in ``per_sample.per_sample_grad``.
        randomness: as in ``per_sample.per_sample_grad``.

    Returns:
        A function that returns every sample's gradient.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> reference.per_sample_grad(lambda w, x: (w * x).sum())(torch.ones(2), torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """
    both = per_sample_grad_and_value(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        grads, values = both(*args, **kwargs)
        return (grads, values[1]) if has_aux else grads

    return transformed


def per_sample_grad_and_value(
    fn: Callable[P, Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Any]:
    """``per_sample.per_sample_grad_and_value`` by ``vmap(grad_and_value(fn))``.

    Args:
        fn: as in ``per_sample.per_sample_grad``, and so are the other arguments.
        argnums: as in ``per_sample.per_sample_grad``.
        in_dims: as in ``per_sample.per_sample_grad``.
        has_aux: as in ``per_sample.per_sample_grad``.
        keep_batch_dim: as in ``per_sample.per_sample_grad``.
        chunk_size: as in ``per_sample.per_sample_grad``.
        randomness: as in ``per_sample.per_sample_grad``.

    Returns:
        A function that returns ``(grads, values)``, with ``has_aux`` ``(grads, (values, aux))``.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> _, values = reference.per_sample_grad_and_value(lambda w, x: (w * x).sum())(torch.ones(2), torch.ones(3, 2))
        >>> values
        tensor([2., 2., 2.])
    """
    check_options(fn, argnums, randomness, chunk_size)

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        function, args, kwargs, _ = opened(fn, args, kwargs, argnums)
        arguments = read(args, argnums, in_dims)
        structure: list[Any] = []
        one = _for_one_sample(grad_and_value, function, arguments, kwargs, has_aux, keep_batch_dim, structure)
        out = _for_all(one, arguments, randomness, chunk_size)
        grads, rest = out[0], out[1]
        grads = close_tree(as_arguments(grads, arguments, isinstance(argnums, tuple), args))
        if not has_aux:
            return grads, rest
        values, aux = rest
        return grads, (values, _restored(aux, structure))

    return transformed


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
    """``per_sample.per_sample_jacobian`` by ``vmap(jacrev(fn))``.

    Args:
        fn: as in ``per_sample.per_sample_jacobian``, and so are the other arguments.
        argnums: as in ``per_sample.per_sample_jacobian``.
        in_dims: as in ``per_sample.per_sample_jacobian``.
        has_aux: as in ``per_sample.per_sample_jacobian``.
        keep_batch_dim: as in ``per_sample.per_sample_jacobian``.
        chunk_size: as in ``per_sample.per_sample_jacobian``.
        randomness: as in ``per_sample.per_sample_jacobian``.

    Returns:
        A function that returns the Jacobians ``[N, *out, *shape]``; with ``has_aux`` a pair of them and the auxiliary values.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> reference.per_sample_jacobian(lambda w, x: w @ x)(torch.ones(2, 3), torch.ones(5, 3)).shape
        torch.Size([5, 2, 2, 3])
    """
    check_options(fn, argnums, randomness, chunk_size)

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        function, args, kwargs, _ = opened(fn, args, kwargs, argnums)
        arguments = read(args, argnums, in_dims)
        structure: list[Any] = []
        one = _for_one_sample(jacrev, function, arguments, kwargs, has_aux, keep_batch_dim, structure)
        out = _for_all(one, arguments, randomness, chunk_size)
        jacobians = close_tree(as_arguments(out[0] if has_aux else out, arguments, isinstance(argnums, tuple), args))
        return (jacobians, _restored(out[1], structure)) if has_aux else jacobians

    return transformed


def _restored(tensors: list[Tensor], structure: list[Any]) -> Any:
    """Auxiliary values of all samples, from their tensors and the structure that one sample's had."""
    spec, leaves = structure
    found = iter(tensors)
    return close_tree(trees.unflatten(spec, [next(found) if isinstance(x, Tensor) else x for x in leaves]))


def _for_one_sample(
    derivative: Any, fn: Callable[..., Any], arguments: Arguments, kwargs: Any, has_aux: bool, keep_batch_dim: bool, structure: list[Any]
) -> Callable[..., Any]:
    """``derivative(fn)`` on the flat list of all tensors, since torch.func's pytrees are not optree's."""
    places = [i for i, x in enumerate(arguments.leaves) if isinstance(x, Tensor)]
    targets = [i for i in places if arguments.diff[i]]

    def one(*tensors: Tensor) -> Any:
        filled = dict(zip(places, tensors, strict=True))

        def loss(leaves: list[Tensor]) -> Any:
            inner = [filled.get(i, x) for i, x in enumerate(arguments.leaves)]
            for i, x in zip(targets, leaves, strict=True):
                inner[i] = x
            if keep_batch_dim:
                inner = [x if dim is None else x.unsqueeze(0) for x, dim in zip(inner, arguments.dims, strict=True)]
            out = fn(*trees.unflatten(arguments.spec, inner), **kwargs)
            if not has_aux:
                return out
            aux, spec = trees.flatten(open_tree(out[1]))
            structure[:] = [spec, aux]
            return out[0], [x for x in aux if isinstance(x, Tensor)]

        return derivative(loss, has_aux=has_aux)([filled[i] for i in targets])

    return one


def _for_all(one: Callable[..., Any], arguments: Arguments, randomness: str, chunk_size: int | None) -> Any:
    """What ``one`` gives for every sample, in trees of lists and tuples."""
    # Many ops refuse an empty batch: its shapes are those of one sample of zeros.
    leaves = arguments.leaves if arguments.n else one_zero_sample(arguments)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    dims = tuple(dim for x, dim in zip(leaves, arguments.dims, strict=True) if isinstance(x, Tensor))
    out = vmap(one, in_dims=dims, randomness=randomness, chunk_size=chunk_size)(*tensors)
    return out if arguments.n else trees.map(lambda x: x[:0], out)
