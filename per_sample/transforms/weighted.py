"""Weighted sums of gradients."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from per_sample._errors import ArgumentError
from per_sample._evaluate import evaluate
from per_sample._targets import Convention, Targets
from per_sample._weighing import Sums, Weighing, Weights, check_memory, weighed_sum
from per_sample.quantities.combined import widest
from per_sample.quantities.precision import real_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    """Transform the loss of one sample into a function that returns a weighted sum of the samples' gradients, from one backward pass.

    Args:
        fn: as in ``per_sample_grad``.
        weights: real numbers ``[n]``; or a function from the norms ``[n]`` of the samples' gradients to weights ``[n]``. A weight of zero
            times a gradient that is not finite is not a number; see ``clipped_grad`` for sums that leave such samples out.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``.
        return_values: also return every sample's loss.
        memory: ``"fast"``: one pass, which holds both sides of each weight's gradients until the norms are known; ``"low"``: two passes,
            which hold hardly more than a plain batched gradient, for the same numbers. It matters where ``weights`` is a function.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``. A function of the norms sees those of all samples, so that in chunks it takes two passes.
        randomness: as in ``per_sample_grad``; both passes draw the same numbers.

    Returns:
        A function of the same arguments that returns ``sum_n weights[n] * grad[n]`` in the structure of the differentiated argument, in
        float32 for parameters in half precision; or a tuple ``(sum, values, aux)`` of what is asked for.

    Raises:
        ArgumentError: for options that cannot be right, or weights of another shape.

    Example:
        >>> import torch
        >>> from per_sample import weighted_grad
        >>> weighted_grad(lambda w, x: w @ x, torch.tensor([1.0, 10.0]))(torch.ones(2), torch.eye(2))
        tensor([ 1., 10.])
    """
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)
    convention.check(fn)
    check_memory(memory)
    if not callable(weights) and not isinstance(weights, Tensor):
        raise ArgumentError(f"`weights` must be a tensor or a function of the norms; got {type(weights).__name__}.")

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        if isinstance(weights, Tensor):
            found, targets = evaluate(fn, convention, lambda targets: _given(weights, targets), args, kwargs)
            sums, _ = found.result
        else:
            sums, _, found, targets = weighed_sum(
                fn, convention, lambda targets: _of_norms(weights, targets), memory, args, kwargs, whole=True
            )
        return found.beside([targets.structured(sums)], values=return_values, aux=has_aux)

    return transformed


def _given(weights: Tensor, targets: Targets) -> Sums:
    _check_weights(weights, targets.n)
    weights = targets.own_rows(weights, "weights")
    return Sums(_one_group(targets, lambda norms, conditions, samples: Weights([weights])), Weights([weights]))


def _one_group(targets: Targets, weigh: Any) -> Weighing:
    return Weighing([0] * len(targets.leaves), 1, weigh, whole=True)


def _check_weights(weights: Any, n: int) -> None:
    if not isinstance(weights, Tensor) or weights.dim() != 1 or weights.shape[0] != n or weights.is_complex():
        found = f"{list(weights.shape)} of {weights.dtype}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ArgumentError(f"`weights` must be real numbers, one for each of the {n} samples; got {found}.")


def _of_norms(weights: Callable[[Tensor], Tensor], targets: Targets) -> Weighing:
    dtype = widest([real_dtype(leaf.dtype) for leaf in targets.leaves])

    def weigh(norms: list[Tensor], conditions: list[Tensor], samples: Sequence[int] | None) -> Weights:
        # Of the samples on all ranks, whatever part of them is here.
        all_norms = norms[0] if targets.ranks is None else targets.ranks.gathered(norms[0])
        found = weights(all_norms.to(dtype))
        _check_weights(found, all_norms.shape[0])
        return Weights([targets.own_rows(found, "weights")])

    return _one_group(targets, weigh)
