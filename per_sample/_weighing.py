"""Weighted sums of gradients whose weights depend on their norms: in one pass that keeps the factors, or in two that keep nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from per_sample import _trees as trees
from per_sample._batches import in_order, rows
from per_sample._errors import ArgumentError, UnsupportedError
from per_sample._evaluate import Evaluation, evaluate
from per_sample._surroundings import random_states
from per_sample._targets import Convention, Quantity, Targets
from per_sample.quantities.combined import root, total
from per_sample.quantities.precision import real_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample.quantities.leaf import LeafGrads

MEMORY = ("fast", "low")


class Weights(NamedTuple):
    """What the samples' gradients are multiplied by."""

    groups: list[Tensor]  # [n] for each group of leaves
    keep: Tensor | None = None  # [n], False: to be left out whatever the gradient is; None: all are kept


@dataclass(frozen=True, eq=False, slots=True)
class Weighing:
    """How weights follow from norms."""

    # The number of the group that each leaf belongs to, and of groups.
    groups: list[int]
    count: int
    # From the norms [n] of each group, in float64, and the numbers of the samples (None: all).
    weigh: Callable[[list[Tensor], Sequence[int] | None], Weights]
    # The weight of one sample may depend on the norms of all.
    whole: bool = False


class Weighed(NamedTuple):
    """Sums and what they were made with."""

    sums: list[Tensor]  # one for each leaf
    norms: list[Tensor]  # [n] for each group, in float64
    evaluation: Evaluation
    targets: Targets


def check_memory(memory: str) -> None:
    """Raise ``ArgumentError`` for a word that is none of ``MEMORY``."""
    if memory not in MEMORY:
        raise ArgumentError(f"`memory` must be one of {MEMORY}; got {memory!r}.")


def weighed_sum(
    fn: Any, convention: Convention, bind: Callable[[Targets], Weighing], memory: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Weighed:
    """``sum_n w_n g_n`` with weights that follow from the norms."""
    traced = torch.compiler.is_dynamo_compiling()
    if traced and memory == "low" and convention.randomness != "error":
        raise UnsupportedError("memory='low' runs the function twice with the same random numbers, which torch.compile cannot trace.")
    draws = convention.randomness != "error" and not traced
    restores = random_states([x for x in trees.flatten((args, kwargs))[0] if isinstance(x, Tensor)]) if draws else []
    bound: list[Weighing] = []

    def first(targets: Targets) -> Quantity:
        bound.append(bind(targets))
        return (_Norms if memory == "low" else _NormsAndSums)(bound[0])

    found, targets = evaluate(fn, convention, first, args, kwargs)
    sums, norms = found.result
    if sums is None:
        for restore in restores:
            restore()
        weights = bound[0].weigh(norms, None)
        sums = evaluate(fn, convention, lambda _: Sums(bound[0].groups, weights), args, kwargs)[0].result
    return Weighed(sums, norms, found, targets)


class Sums(Quantity):
    """Sums with weights that are known, leaf by leaf."""

    def __init__(self, groups: list[int], weights: Weights) -> None:
        self.groups = groups
        self.weights = weights

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Tensor:
        keep = self.weights.keep
        weights = self.weights.groups[self.groups[number]]
        return _sum(grads, rows(weights, samples), None if keep is None else rows(keep, samples))

    def join(self, parts: list[list[Tensor]], samples: list[Sequence[int] | None]) -> list[Tensor]:
        return [total(list(pieces)) for pieces in zip(*parts, strict=True)]


def _sum(grads: LeafGrads, weights: Tensor, keep: Tensor | None) -> Tensor:
    if keep is not None:
        grads = grads.kept(keep)
    return grads.weighted_sum(weights.to(real_dtype(grads.dtype)))


class _Norms(Quantity):
    """The norms alone."""

    def __init__(self, weighing: Weighing) -> None:
        self.weighing = weighing

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Any:
        return grads.sq_norm()

    def run(self, leaves: list[Any], samples: Sequence[int] | None) -> Any:
        return None, self.by_group(leaves)

    def by_group(self, squares: list[Tensor]) -> list[Tensor]:
        """The norms of the groups from the squared norms of the leaves."""
        members = [
            [x for x, own in zip(squares, self.weighing.groups, strict=True) if own == group] for group in range(self.weighing.count)
        ]
        # A group may hold nothing but leaves that are None.
        return [root(total(some or [torch.zeros_like(squares[0])])) for some in members]

    def join(self, parts: list[Any], samples: list[Sequence[int] | None]) -> Any:
        sums = None if parts[0][0] is None else [total(list(pieces)) for pieces in zip(*[own for own, _ in parts], strict=True)]
        return sums, [in_order(list(pieces), samples) for pieces in zip(*[norms for _, norms in parts], strict=True)]


class _NormsAndSums(_Norms):
    """Both, from the factors of one backward pass."""

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Any:
        return grads.settled()

    def run(self, leaves: list[Any], samples: Sequence[int] | None) -> Any:
        norms = self.by_group([squares for squares, _ in leaves])
        if self.weighing.whole and samples is not None:
            return None, norms
        weights = self.weighing.weigh(norms, samples)
        groups = self.weighing.groups
        sums = [_sum(grads, weights.groups[group], weights.keep) for (_, grads), group in zip(leaves, groups, strict=True)]
        return sums, norms
