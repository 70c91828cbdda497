"""Random projections of every sample's gradient."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import torch
from torch import Tensor

from per_sample._batches import in_order
from per_sample._errors import ArgumentError
from per_sample._evaluate import Evaluation, transform
from per_sample._targets import Convention, Quantity, Targets
from per_sample.quantities.combined import total
from per_sample.quantities.projectors import Projector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums
    from per_sample._ranks import Ranks
    from per_sample._signatures import P, Randomness, RunOptions
    from per_sample.quantities.leaf import LeafGrads


@overload
def projected_grad(
    fn: Callable[P, Any],
    projector: Projector,
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    has_aux: Literal[False] = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Tensor]: ...
@overload
def projected_grad(
    fn: Callable[P, Any],
    projector: Projector,
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    has_aux: bool = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Any]: ...
def projected_grad(
    fn: Callable[..., Any],
    projector: Projector,
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., Any]:
    """Transform the loss of one sample into a function that returns a random projection of every sample's gradient.

    Inner products of projections are, in expectation, those of the gradients. The same projector, seed and parameters give the same
    projection of a sample in every call, whatever the batch, the chunks and the device.

    Args:
        fn: as in ``per_sample_grad``.
        projector: ``GaussianProjector``, ``RademacherProjector``, ``SparseProjector``, or ``FactoredProjector``, which is the fastest:
            it projects the two sides of a weight's gradient, and never forms the gradient.
        argnums: as in ``per_sample_grad``, and so are the arguments after it.
        in_dims: as in ``per_sample_grad``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``: of the function, not of the projector.

    Returns:
        A function of the same arguments that returns the projections ``[n, k]``, in float32 for parameters in half precision; with
        ``has_aux`` a pair ``(projections, aux)``.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import RademacherProjector, projected_grad
        >>> projected_grad(lambda w, x: w @ x, RademacherProjector(8, seed=1))(torch.ones(100), torch.randn(3, 100)).shape
        torch.Size([3, 8])

    Source:
        Park et al., TRAK, 2023, https://arxiv.org/abs/2303.14186; Choe et al., What is Your Data Worth to GPT? (LoGra), 2024,
        https://arxiv.org/abs/2405.13954.
    """
    if not isinstance(projector, Projector):
        raise ArgumentError(f"`projector` must be a projector, such as GaussianProjector(k); got {type(projector).__name__}.")
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)

    def finish(found: Evaluation, targets: Targets) -> Any:
        return (found.result, found.aux) if has_aux else found.result

    return transform(fn, convention, lambda targets: _Projections(projector, _numbers(targets)), finish)


def _numbers(targets: Targets) -> list[int]:
    """The number of each leaf where the keys of dicts are sorted, as they are not in the pytrees that can be compiled."""
    if not torch.compiler.is_dynamo_compiling():
        return list(range(len(targets.leaves)))
    found = [place for i in sorted(targets.arguments.argnums) for place in _places(targets.args[i], (i,))]
    return [sorted(found).index(place) for place in found]


def _places(tree: Any, place: tuple[int, ...]) -> list[tuple[int, ...]]:
    if isinstance(tree, Tensor):
        return [place]
    children: list[tuple[int, Any]] = []
    if isinstance(tree, dict):
        keys = list(tree) if isinstance(tree, OrderedDict) else sorted(tree)
        children = [(keys.index(key), tree[key]) for key in tree]
    elif isinstance(tree, (list, tuple)):
        children = list(enumerate(tree))
    return [found for number, child in children for found in _places(child, (*place, number))]


class _Projections(Quantity):
    """Every sample's projection, the sum over the leaves of theirs."""

    def __init__(self, projector: Projector, numbers: list[int]) -> None:
        self.projector = projector
        self.numbers = numbers

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Tensor:
        return grads.project(self.projector, self.numbers[number])

    def run(self, leaves: list[Tensor], samples: Sequence[int] | None) -> Tensor:
        return total(leaves)

    def join(self, parts: list[Tensor], samples: list[Sequence[int] | None]) -> Tensor:
        return in_order(parts, samples)

    def across(self, result: Tensor, ranks: Ranks) -> Tensor:
        return ranks.rows(result)
