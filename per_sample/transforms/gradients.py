"""The gradients themselves."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from per_sample._batches import in_order
from per_sample._evaluate import Evaluation, transform
from per_sample._kernels.functional import must_be_functional
from per_sample._targets import Convention, Quantity, Targets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums
    from per_sample._ranks import Ranks
    from per_sample._signatures import P, Randomness, RunOptions
    from per_sample.quantities.leaf import LeafGrads


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
    """Transform the loss of one sample into a function that returns every sample's gradient.

    Equal, leaf for leaf, to ``torch.func.vmap(torch.func.grad(fn, argnums), in_dims)``, at about the price of one batched gradient.

    Args:
        fn: takes ONE sample, ``fn(params, x, y)``, and returns a scalar loss (with ``has_aux`` a pair of loss and auxiliary values).
        argnums: which positional arguments to differentiate; they are shared by the samples unless ``in_dims`` says otherwise.
        in_dims: the batched axis of each positional argument, as in ``torch.vmap`` (prefix pytrees; None shares the argument). By
            default axis 0 of every tensor that is not differentiated. Keyword arguments are always shared.
        has_aux: ``fn`` returns ``(loss, aux)``.
        keep_batch_dim: ``fn`` sees each sample with a leading axis of size 1, so that a module that expects a batch can be called.
        chunk_size: at most that many samples at once; the result is the same, but for what random numbers are drawn.
        randomness: ``"error"``, ``"different"`` (each sample its own numbers) or ``"same"``, as in ``torch.vmap``.

    Returns:
        A function of the same arguments. It returns the gradients: the structure of the differentiated argument (a tuple of them for a
        tuple of ``argnums``) with leaves ``[n, *shape]``, in the parameters' dtypes; with ``has_aux`` a pair ``(grads, aux)``.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import per_sample_grad
        >>> def loss(params, x, y):
        ...     return (x @ params["w"] + params["b"] - y).square().sum()
        >>> params = {"w": torch.ones(3, 2), "b": torch.zeros(2)}
        >>> grads = per_sample_grad(loss)(params, torch.randn(5, 3), torch.randn(5, 2))
        >>> grads["w"].shape
        torch.Size([5, 3, 2])
    """
    both = per_sample_grad_and_value(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        grads, values = both(*args, **kwargs)
        return (grads, values[1]) if has_aux else grads

    return transformed


@overload
def per_sample_grad_and_value(
    fn: Callable[P, Any], argnums: Argnums = ..., in_dims: Any = ..., *, has_aux: Literal[False] = ..., **options: Unpack[RunOptions]
) -> Callable[P, tuple[Any, Tensor]]: ...
@overload
def per_sample_grad_and_value(
    fn: Callable[P, Any], argnums: Argnums = ..., in_dims: Any = ..., *, has_aux: bool = ..., **options: Unpack[RunOptions]
) -> Callable[P, tuple[Any, Any]]: ...
def per_sample_grad_and_value(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., Any]:
    """Transform the loss of one sample into a function that returns every sample's gradient and loss.

    Args:
        fn: as in ``per_sample_grad``.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns ``(grads, values)`` with ``values [n]``; with ``has_aux``
        ``(grads, (values, aux))``, as ``torch.func.grad_and_value`` does.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import per_sample_grad_and_value
        >>> grads, values = per_sample_grad_and_value(lambda w, x: (w * x).sum())(torch.ones(3), torch.eye(3))
        >>> values
        tensor([1., 1., 1.])
    """
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness, empty=True)

    def finish(found: Evaluation, targets: Targets) -> Any:
        grads = targets.structured(found.result)
        return grads, ((found.values, found.aux) if has_aux else found.values)

    return transform(fn, convention, _Gradients, finish)


class _Gradients(Quantity):
    """The gradients, leaf by leaf."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Tensor:
        value = grads.materialize()
        # The caller may write into the result.
        return value.contiguous() if 0 in value.stride() and value.numel() else value

    def run(self, leaves: list[Tensor], samples: Sequence[int] | None) -> list[Tensor]:
        return leaves if must_be_functional(*leaves) else _separated(leaves, self.targets.arguments.leaves)

    def join(self, parts: list[list[Tensor]], samples: list[Sequence[int] | None]) -> list[Tensor]:
        return [in_order(list(pieces), samples) for pieces in zip(*parts, strict=True)]

    def across(self, result: list[Tensor], ranks: Ranks) -> list[Tensor]:
        return [ranks.rows(x) for x in result]


def _separated(leaves: list[Tensor], inputs: list[Any]) -> list[Tensor]:
    """Equal gradients, such as those of an LSTM's two biases, in memory of their own: the caller may scale them in place."""
    seen = {_address(x) for x in inputs}
    out = []
    for leaf in leaves:
        place = _address(leaf)
        out.append(leaf.clone() if place and place in seen else leaf)
        seen.add(place)
    return out


def _address(x: Any) -> int:
    """Where a tensor's numbers begin; 0 for what has no memory of its own (fake tensors, wrappers)."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and not is_functorch_wrapped_tensor(x)
    return x.data_ptr() if plain else 0
