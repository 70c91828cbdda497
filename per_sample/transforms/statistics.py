"""Statistics of the gradients over the samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor

from per_sample._errors import ArgumentError
from per_sample._evaluate import Evaluation, transform
from per_sample._targets import Convention, Quantity, Targets
from per_sample.quantities.combined import total
from per_sample.quantities.moments import merged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums
    from per_sample._ranks import Ranks
    from per_sample._signatures import P, Randomness, RunOptions
    from per_sample.quantities.leaf import LeafGrads


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
    """Transform the loss of one sample into a function that returns the mean over samples of the squared gradient, element by element.

    Of a log-likelihood it is the diagonal of the empirical Fisher information.

    Args:
        fn: as in ``per_sample_grad``, and so are the other arguments.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns the structure and shapes of the differentiated argument, real (of complex gradients
        the squared absolute value), in float32 for parameters in half precision, NaN for an empty batch; with ``has_aux`` a pair
        ``(moment, aux)``.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import grad_second_moment
        >>> grad_second_moment(lambda w, x: w @ x)(torch.ones(2), torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        tensor([5., 4.])
    """
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)

    def finish(found: Evaluation, targets: Targets) -> Any:
        moment = targets.structured([x / targets.n for x in found.result])
        return (moment, found.aux) if has_aux else moment

    return transform(fn, convention, lambda _: _SquareSum(), finish)


class _SquareSum(Quantity):
    """The sums of squares, leaf by leaf."""

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Tensor:
        return grads.square_sum()

    def join(self, parts: list[list[Tensor]], samples: list[Sequence[int] | None]) -> list[Tensor]:
        return [total(list(pieces)) for pieces in zip(*parts, strict=True)]

    def across(self, result: list[Tensor], ranks: Ranks) -> Any:
        return ranks.sums(result, counted=True)


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
    """Transform the loss of one sample into a function that returns the variance of the gradient over samples, element by element.

    Args:
        fn: as in ``per_sample_grad``.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``.
        correction: what is taken off the number of samples in the denominator, as in ``torch.var``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns the structure and shapes of the differentiated argument, real, in float32 for
        parameters in half precision, NaN where there are too few samples; with ``has_aux`` a pair ``(variance, aux)``.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import grad_variance
        >>> grad_variance(lambda w, x: w @ x)(torch.ones(2), torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        tensor([2., 0.])
    """
    _check_correction(correction)
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)

    def finish(found: Evaluation, targets: Targets) -> Any:
        freedom = max(0, targets.n - correction)
        variance = targets.structured([spread / freedom if freedom else spread * torch.nan for _, spread in found.result])
        return (variance, found.aux) if has_aux else variance

    return transform(fn, convention, _Moments, finish)


def _check_correction(correction: float) -> None:
    if isinstance(correction, bool) or not isinstance(correction, (int, float)):
        raise ArgumentError(f"`correction` must be a number; got {correction!r}.")


@overload
def gradient_noise_scale(
    fn: Callable[P, Any],
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    return_parts: Literal[False] = ...,
    has_aux: Literal[False] = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Tensor]: ...
@overload
def gradient_noise_scale(
    fn: Callable[P, Any],
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    return_parts: bool = ...,
    has_aux: bool = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Any]: ...
def gradient_noise_scale(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    return_parts: bool = False,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., Any]:
    """Transform the loss of one sample into a function that returns the simple gradient noise scale of a batch.

    That is the trace of the gradients' covariance over the squared norm of the true gradient, both estimated without bias from the batch:
    about the batch size beyond which more samples in a step hardly help.

    Args:
        fn: as in ``per_sample_grad``, and so are the other arguments.
        argnums: as in ``per_sample_grad``; the scale is that of all differentiated leaves together.
        in_dims: as in ``per_sample_grad``.
        return_parts: return the two estimates instead, which can be averaged over batches; the scale is their quotient.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns the scale in samples, 0-dim; NaN for fewer than two samples. Where the batch is so
        small that the estimate of the squared norm is negative, so is the scale: then take more samples, or average the two estimates over
        batches. With ``return_parts`` a pair ``(trace, square)`` in its place, both 0-dim. With ``has_aux`` a pair ``(scale, aux)``.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import gradient_noise_scale
        >>> gradient_noise_scale(lambda w, x: w @ x)(torch.ones(1), torch.tensor([[9.0], [11.0]]))
        tensor(0.0202)

    Source:
        McCandlish et al., An Empirical Model of Large-Batch Training, 2018, https://arxiv.org/abs/1812.06162.
    """
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)

    def finish(found: Evaluation, targets: Targets) -> Any:
        n = targets.n
        trace = total([spread.sum() for _, spread in found.result]) / (n - 1 if n > 1 else torch.nan)
        square = total([mean.abs().square().sum() for mean, _ in found.result]) - trace / max(n, 1)
        parts: tuple[Tensor, ...] = (trace, square) if return_parts else (trace / square,)
        if targets.ranks is not None:
            parts = tuple(map(targets.ranks.same, parts))
        scale = parts if return_parts else parts[0]
        return (scale, found.aux) if has_aux else scale

    return transform(fn, convention, _WholeMoments, finish)


class _Moments(Quantity):
    """The mean of each leaf's gradients and the sum of squared deviations from it."""

    def __init__(self, targets: Targets) -> None:
        self.n = targets.arguments.n

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        return grads.moments()

    def join(self, parts: list[Any], samples: list[Sequence[int] | None]) -> list[tuple[Tensor, Tensor]]:
        counts = [self.n if some is None else len(some) for some in samples]
        out = []
        for pieces in zip(*parts, strict=True):
            seen, whole = counts[0], pieces[0]
            for count, piece in zip(counts[1:], pieces[1:], strict=True):
                whole = merged(whole, seen, piece, count)
                seen += count
            out.append(whole)
        return out

    def across(self, result: list[tuple[Tensor, Tensor]], ranks: Ranks) -> list[tuple[Tensor, Any]]:
        moments = ranks.moments(result)
        spreads = ranks.sums([spread for _, spread in moments])
        return [(mean, spread) for (mean, _), spread in zip(moments, spreads, strict=True)]


class _WholeMoments(_Moments):
    """The same, whole on every rank."""

    def across(self, result: list[tuple[Tensor, Tensor]], ranks: Ranks) -> list[tuple[Tensor, Any]]:
        moments = ranks.moments(result)
        spreads = ranks.totals([spread for _, spread in moments])
        return [(mean, spread) for (mean, _), spread in zip(moments, spreads, strict=True)]
