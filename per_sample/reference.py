"""The same transforms by ``vmap`` over ``grad``, and nothing clever: the meaning of the fast ones.

Every function here takes the arguments of its namesake in ``per_sample`` and gives the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.func import grad_and_value, vmap

from per_sample import _trees as trees
from per_sample._arguments import as_arguments, check_options, read

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._arguments import Argnums, Arguments


def per_sample_grad(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
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

    def transformed(*args: Any, **kwargs: Any) -> Any:
        grads, values = both(*args, **kwargs)
        return (grads, values[1]) if has_aux else grads

    return transformed


def per_sample_grad_and_value(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
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

    def transformed(*args: Any, **kwargs: Any) -> Any:
        arguments = read(args, argnums, in_dims)
        structure: list[Any] = []
        one, tensors, dims = _for_one_sample(fn, arguments, kwargs, has_aux, keep_batch_dim, structure)
        out = vmap(one, in_dims=dims, randomness=randomness, chunk_size=chunk_size)(*tensors)
        grads, rest = out[0], out[1]
        grads = as_arguments(grads, arguments, isinstance(argnums, tuple), args)
        if not has_aux:
            return grads, rest
        values, aux = rest
        spec, leaves = structure
        found = iter(aux)
        return grads, (values, trees.unflatten(spec, [next(found) if isinstance(x, Tensor) else x for x in leaves]))

    return transformed


def _for_one_sample(
    fn: Callable[..., Any], arguments: Arguments, kwargs: Any, has_aux: bool, keep_batch_dim: bool, structure: list[Any]
) -> tuple[Callable[..., Any], list[Tensor], tuple[int | None, ...]]:
    """``grad_and_value(fn)`` on flat lists of tensors, since torch.func's pytrees are not optree's; with the tensors and in_dims."""
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
            aux, spec = trees.flatten(out[1])
            structure[:] = [spec, aux]
            return out[0], [x for x in aux if isinstance(x, Tensor)]

        return grad_and_value(loss, has_aux=has_aux)([filled[i] for i in targets])

    return one, [arguments.leaves[i] for i in places], tuple(arguments.dims[i] for i in places)
