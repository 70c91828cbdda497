"""Inner products of gradients: with a direction, and with one another."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from per_sample import _distributed, _torch_trees
from per_sample._batches import in_order
from per_sample._containers import opened
from per_sample._errors import ArgumentError, UnsupportedError
from per_sample._evaluate import Evaluation, evaluate, evaluate_here, prepared, together, transform
from per_sample._targets import Convention, Quantity, Targets
from per_sample.quantities.combined import total

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums
    from per_sample._ranks import Ranks
    from per_sample._signatures import P, Randomness, RunOptions
    from per_sample.quantities.leaf import LeafGrads


@overload
def per_sample_grad_dot(
    fn: Callable[P, Any],
    direction: Any,
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    has_aux: Literal[False] = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Tensor]: ...
@overload
def per_sample_grad_dot(
    fn: Callable[P, Any], direction: Any, argnums: Argnums = ..., in_dims: Any = ..., *, has_aux: bool = ..., **options: Unpack[RunOptions]
) -> Callable[P, Any]: ...
def per_sample_grad_dot(
    fn: Callable[..., Any],
    direction: Any,
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., Any]:
    """Transform the loss of one sample into a function that returns the inner product of every sample's gradient with a direction.

    Args:
        fn: as in ``per_sample_grad``.
        direction: in the structure and shapes of one sample's gradient, such as that of a test sample.
        argnums: as in ``per_sample_grad``, and so are the arguments after it.
        in_dims: as in ``per_sample_grad``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns the inner products ``[n]``, real also where parameters are complex, in float32 for
        parameters in half precision; with ``has_aux`` a pair ``(products, aux)``.

    Raises:
        ArgumentError: for options that cannot be right, or a direction of another structure or shape.

    Example:
        >>> import torch
        >>> from per_sample import per_sample_grad_dot
        >>> per_sample_grad_dot(lambda w, x: w @ x, torch.tensor([1.0, 2.0]))(torch.ones(2), torch.eye(2))
        tensor([1., 2.])

    Source:
        Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent, 2020, https://arxiv.org/abs/2002.08484.
    """
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)

    def finish(found: Evaluation, targets: Targets) -> Any:
        return (found.result, found.aux) if has_aux else found.result

    return transform(fn, convention, lambda targets: _Dot(targets, direction), finish)


class _Dot(Quantity):
    """Inner products with a direction."""

    def __init__(self, targets: Targets, direction: Any) -> None:
        self.directions = targets.flat(direction, "direction")
        if targets.ranks is not None:
            self.directions = _distributed.whole(self.directions)
        else:
            _distributed.refuse(self.directions, "`direction` has DTensors, and the batch does not.")
        for x, shape, leaf in zip(self.directions, targets.shapes, targets.leaves, strict=True):
            if not isinstance(x, Tensor) or tuple(x.shape) != shape:
                found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ArgumentError(f"`direction` must have the shapes of one sample's gradient; got {found} for {list(shape)}.")
            if x.is_complex() and not leaf.is_complex():
                raise ArgumentError("`direction` is complex where the parameter is real.")

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Tensor:
        return grads.dot(self.directions[number])

    def run(self, leaves: list[Tensor], samples: Sequence[int] | None) -> Tensor:
        return total(leaves)

    def join(self, parts: list[Tensor], samples: list[Sequence[int] | None]) -> Tensor:
        return in_order(parts, samples)

    def across(self, result: Tensor, ranks: Ranks) -> Tensor:
        return ranks.rows(result)


@overload
def grad_gram(
    fn: Callable[P, Any],
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    other: tuple[Any, ...] | list[Any] | None = ...,
    has_aux: Literal[False] = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Tensor]: ...
@overload
def grad_gram(
    fn: Callable[P, Any],
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    other: tuple[Any, ...] | list[Any] | None = ...,
    has_aux: bool = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Any]: ...
def grad_gram(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    other: tuple[Any, ...] | list[Any] | None = None,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., Any]:
    """Transform the loss of one sample into a function that returns all inner products of the samples' gradients.

    For a scalar output this is the empirical neural tangent kernel.

    Args:
        fn: as in ``per_sample_grad``.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``; for a second batch the same.
        other: a second batch: the arguments that are not differentiated, as a tuple or a list in their order. Then the products are those
            between the batches.
        has_aux: as in ``per_sample_grad``; the auxiliary values are those of the first batch.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: at most that many samples run at once; of all samples what the products need is held.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns the products ``[n, n]``, exactly symmetric, or ``[n, m]`` between two batches, in
        float32 for parameters in half precision; with ``has_aux`` a pair ``(products, aux)``.

    Raises:
        ArgumentError: for options that cannot be right, or another number of arguments in ``other``.
        UnsupportedError: with ``other`` or ``chunk_size`` under ``torch.compile``.

    Example:
        >>> import torch
        >>> from per_sample import grad_gram
        >>> grad_gram(lambda w, x: (w * x).sum())(torch.ones(2), torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        tensor([[ 1.,  3.],
                [ 3., 25.]])

    Source:
        Jacot et al., Neural Tangent Kernel, 2018, https://arxiv.org/abs/1806.07572.
    """
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)
    if other is not None and not isinstance(other, (tuple, list)):
        raise ArgumentError(f"`other` must be a tuple of arguments, such as `(x,)`; got {type(other).__name__}.")

    convention.check(fn)

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and (other is not None or chunk_size is not None):
            raise UnsupportedError("`grad_gram` with `other` or `chunk_size` cannot be compiled; compile the function around it.")
        traced = torch.compiler.is_dynamo_compiling()
        if not traced or _distributed.seen(_torch_trees.flatten((args, kwargs))[0]):
            rows = (_untraced if traced else _rows_here)(fn, convention, other, args, kwargs)
            if rows is not None:
                return (rows.result, rows.aux) if has_aux else rows.result
        if other is None:
            found, _ = evaluate(fn, convention, lambda _: _Gram(), args, kwargs)
            gram = found.result
        else:
            found, targets = evaluate(fn, convention, lambda _: _Held(), args, kwargs)
            second = _with_others(args, other, targets)
            gram = evaluate(fn, convention, lambda _: _Against(found.result), second, kwargs)[0].result
        return (gram, found.aux) if has_aux else gram

    return transformed


def _rows_here(
    fn: Callable[..., Any], convention: Convention, other: tuple[Any, ...] | list[Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Evaluation | None:
    """Of a batch on several ranks: each has the rows of its samples, for which it runs the samples of all; else None."""
    outside, ranks = prepared(fn, convention, args, kwargs)
    if ranks is None:
        return None
    if convention.randomness != "error":
        raise UnsupportedError("`grad_gram` of DTensors runs a sample on every rank, where it would not draw the same random numbers.")
    found, targets, _ = evaluate_here(outside, convention, lambda _: _Held(), ranks)
    ranks.check_count()
    second = args if other is None else _with_others(args, other, targets)
    others = opened(_distributed.with_whole_state(fn), second, kwargs, convention.argnums)
    second, shared = _distributed.gathered(convention, others.args, others.kwargs)
    columns = evaluate_here(others._replace(args=second, kwargs=shared), convention, lambda _: _Against(found.result), None)[0]
    return together(found, ranks)._replace(result=ranks.rows(columns.result))


_untraced = _disable_dynamo(_rows_here)


def _with_others(args: tuple[Any, ...], other: tuple[Any, ...] | list[Any], targets: Targets) -> tuple[Any, ...]:
    """The arguments with those of the second batch in their places."""
    places = [i for i in range(len(args)) if i not in targets.arguments.argnums]
    if len(other) != len(places):
        raise ArgumentError(f"`other` must hold the {len(places)} arguments that are not differentiated; got {len(other)}.")
    replaced = list(args)
    for i, x in zip(places, other, strict=True):
        replaced[i] = x
    return tuple(replaced)


class _Held(Quantity):
    """The gradients of all runs, in the forms that are cheapest to hold."""

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Any:
        return grads.settled()[1]

    def run(self, leaves: list[Any], samples: Sequence[int] | None) -> Any:
        return leaves, samples

    def join(self, parts: list[Any], samples: list[Sequence[int] | None]) -> Any:
        return parts


class _Gram(_Held):
    """All products among the samples; in one run leaf by leaf, as the gradients arrive."""

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Any:
        return grads.gram(grads) if samples is None else super().leaf(number, grads, samples)

    def run(self, leaves: list[Any], samples: Sequence[int] | None) -> Any:
        return total(leaves) if samples is None else (leaves, samples)

    def join(self, parts: list[Any], samples: list[Sequence[int] | None]) -> Tensor:
        if samples == [None]:
            return parts[0]
        mirrored: list[list[Tensor]] = []
        for i, (a, _) in enumerate(parts):
            mirrored.append([mirrored[j][i].T for j in range(i)] + [_block(a, b) for b, _ in parts[i:]])
        return _whole(mirrored, samples, samples)


class _Against(Quantity):
    """All products with gradients that are held."""

    def __init__(self, held: list[Any]) -> None:
        self.held = held

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> list[Tensor]:
        return [leaves[number].gram(grads) for leaves, _ in self.held]

    def run(self, leaves: list[list[Tensor]], samples: Sequence[int] | None) -> list[Tensor]:
        return [total(list(of_all_leaves)) for of_all_leaves in zip(*leaves, strict=True)]

    def join(self, parts: list[list[Tensor]], samples: list[Sequence[int] | None]) -> Tensor:
        rows = [list(row) for row in zip(*parts, strict=True)]
        return _whole(rows, [some for _, some in self.held], samples)


def _block(a: list[LeafGrads], b: list[LeafGrads]) -> Tensor:
    return total([one.gram(another) for one, another in zip(a, b, strict=True)])


def _whole(blocks: list[list[Tensor]], rows: list[Sequence[int] | None], columns: list[Sequence[int] | None]) -> Tensor:
    """One matrix of blocks, its rows and columns in the caller's order."""
    strips = [in_order([block.T for block in row], columns).T for row in blocks]
    return in_order(strips, rows)
