"""Weighted sums of gradients whose weights depend on their norms: in one pass that keeps the factors, or in two that keep nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from per_sample import _distributed, _torch_trees
from per_sample import _trees as trees
from per_sample._batches import in_order, rows
from per_sample._containers import Outside
from per_sample._errors import ArgumentError, UnsupportedError
from per_sample._evaluate import Evaluation, evaluate, evaluate_here, prepared, together
from per_sample._factors import Dense
from per_sample._generators import repeatable
from per_sample._kernels.functional import must_be_functional
from per_sample._surroundings import random_states
from per_sample._targets import Convention, Quantity, Targets
from per_sample.quantities.combined import root, total
from per_sample.quantities.leaf import LeafGrads
from per_sample.quantities.precision import real_dtype
from per_sample.quantities.side_by_side import apart, row, units

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._ranks import Ranks


MEMORY = ("fast", "low")


class Weights(NamedTuple):
    """What the samples' gradients are multiplied by."""

    groups: list[Tensor]  # [n] for each group of leaves
    keep: Tensor | None = None  # [n], False: to be left out whatever the gradient is; None: all are kept
    # [n], True: so much smaller than its parts that in a sum with others its rounding would exceed it. It is formed, and weighed by the
    # norm that it then has.
    apart: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Weighing:
    """How weights follow from norms."""

    # The number of the group that each leaf belongs to, and of groups.
    groups: list[int]
    count: int
    # From the norms [n] of each group and the bounds on their parts, in float64, and the numbers of the samples (None: all).
    weigh: Callable[[list[Tensor], list[Tensor], Sequence[int] | None], Weights]
    # The weights of samples that are summed apart, from the number of the group and the norms.
    weight: Callable[[int, Tensor], Tensor] | None = None
    # The weight of one sample may depend on the norms of all.
    whole: bool = False


class Weighed(NamedTuple):
    """Sums and what they were made with."""

    sums: list[Tensor]  # one for each leaf
    norms: list[Tensor]  # [n] for each group, in float64, of the samples that are here
    evaluation: Evaluation
    targets: Targets


def check_memory(memory: str) -> None:
    """Raise ``ArgumentError`` for a word that is none of ``MEMORY``."""
    if memory not in MEMORY:
        raise ArgumentError(f"`memory` must be one of {MEMORY}; got {memory!r}.")


def weighed_sum(
    fn: Any,
    convention: Convention,
    bind: Callable[[Targets], Weighing],
    memory: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    whole: bool = False,
) -> Weighed:
    """``sum_n w_n g_n`` with weights that follow from the norms; ``whole``: as in ``Weighing``."""
    traced, ranks = torch.compiler.is_dynamo_compiling(), None
    if traced and _distributed.seen(_torch_trees.flatten((args, kwargs))[0]):
        return _untraced(fn, convention, bind, memory, args, kwargs, whole=whole)
    if traced and memory == "low" and convention.randomness != "error":
        raise UnsupportedError("memory='low' runs the function twice with the same random numbers, which torch.compile cannot trace.")
    outside = Outside(fn, args, kwargs)
    if not traced:
        # Once: ranks that need a second pass and those that do not communicate alike.
        outside, ranks = prepared(fn, convention, args, kwargs)
    draws = convention.randomness != "error" and not traced
    restores = random_states([x for x in trees.flatten(outside[1:3])[0] if isinstance(x, Tensor)]) if draws else []
    bound: list[Weighing] = []

    def first(targets: Targets) -> Quantity:
        bound.append(bind(targets))
        return (_Norms if memory == "low" else _NormsAndSums)(bound[0])

    def evaluated(bind: Callable[[Targets], Quantity]) -> tuple[Evaluation, Targets]:
        return evaluate(fn, convention, bind, args, kwargs) if traced else evaluate_here(outside, convention, bind, ranks)[:2]

    if not traced and (whole or memory == "low"):
        with repeatable() as draw_again:
            found, targets = evaluated(first)
        restores.append(draw_again)
    else:
        # No context here, not even one that does nothing: dynamo could not come back into it after a graph break.
        found, targets = evaluated(first)
    sums, norms, conditions, lost = found.result
    if sums is None:
        for restore in restores:
            restore()
        weights = bound[0].weigh(norms, conditions, None)
        second = evaluated(lambda _: Sums(bound[0], weights))[0]
        _check_repeated(found.values, second.values)
        sums, lost = second.result
    if lost is not None:
        norms = [torch.where(lost, torch.nan, norm) for norm in norms]
    if ranks is not None:
        sums, found = ranks.sums(sums), together(found, ranks)
    return Weighed(sums, norms, found, targets)


_untraced = _disable_dynamo(weighed_sum)


def _check_repeated(first: Tensor, second: Tensor) -> None:
    """Weights of one pass are none for the gradients of another: both must have seen the same losses."""
    if must_be_functional(first, second) or not first.numel():
        return
    scale = first.abs().nan_to_num(0.0, 0.0, 0.0).max()
    tolerance = _REPEATED.get(first.dtype, 1e-2)
    if not torch.allclose(first, second, rtol=tolerance, atol=float(scale) * tolerance, equal_nan=True):
        raise UnsupportedError(
            "The function gave other losses when it ran a second time, so that the weights of the first do not fit. Random numbers that "
            "are neither torch's nor of the global generators of Python and numpy cannot be drawn again: use memory='fast' without "
            "`chunk_size`, or pass the numbers as an argument."
        )


# More than the order of sums may change, less than other random numbers would.
_REPEATED = {torch.float64: 1e-6, torch.float32: 1e-4}


class Sums(Quantity):
    """Sums with weights that are known, leaf by leaf."""

    def __init__(self, weighing: Weighing, weights: Weights) -> None:
        self.weighing = weighing
        self.weights = weights

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Any:
        weights = Weights(*[_rows(x, samples) for x in self.weights])
        return _parts(grads, weights, self.weighing.groups[number], {})

    def run(self, leaves: list[Any], samples: Sequence[int] | None) -> Any:
        return _together(leaves, self.weighing, _rows(self.weights.apart, samples))

    def join(self, parts: list[Any], samples: list[Sequence[int] | None]) -> Any:
        sums = [total(list(pieces)) for pieces in zip(*[own for own, _ in parts], strict=True)]
        return sums, _masks([lost for _, lost in parts], samples, self.weights.groups)

    def across(self, result: Any, ranks: Ranks) -> Any:
        sums, lost = result
        return ranks.sums(sums), lost


def _rows(x: Any, samples: Sequence[int] | None) -> Any:
    if isinstance(x, list):
        return [rows(one, samples) for one in x]
    return None if x is None else rows(x, samples)


def _masks(parts: list[Tensor | None], samples: list[Sequence[int] | None], like: list[Tensor]) -> Tensor | None:
    """The masks of several runs as one; None stands for False everywhere."""
    if all(part is None for part in parts):
        return None
    own = [
        like[0].new_zeros(len(some or ()), dtype=torch.bool) if part is None else part for part, some in zip(parts, samples, strict=True)
    ]
    return in_order(own, samples)


# The weights of a group as sums in a dtype take them.
Rounded = dict[tuple[int, torch.dtype], Tensor]


def _parts(grads: LeafGrads, weights: Weights, group: int, known: Rounded) -> tuple[Tensor, Tensor | None]:
    """The sum of one leaf's gradients, and those that are to be added apart."""
    formed = None
    keep = weights.keep
    if weights.apart is not None:
        formed = grads.of(weights.apart.nonzero().flatten()).formed()
        keep = ~weights.apart if keep is None else keep & ~weights.apart
    dtype = real_dtype(grads.dtype)
    if (group, dtype) not in known:
        own = weights.groups[group]
        known[group, dtype] = _rounded_down(own if keep is None else torch.where(keep, own, 0), dtype)
    if keep is None:
        return grads.weighted_sum(known[group, dtype]), formed
    return grads.kept(keep).weighted_sum(known[group, dtype]), formed


def _rounded_down(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in a lower precision, none of which is larger than it was: among numbers next to zero rounding is coarse."""
    found = weights.to(dtype)
    if found.dtype == weights.dtype or weights.dtype != torch.float64:
        return found
    if must_be_functional(weights):
        return torch.where(weights.abs() < torch.finfo(dtype).tiny, 0, found)
    return torch.where(found.abs() > weights.abs(), torch.nextafter(found, torch.zeros_like(found)), found)


def _together(parts: list[Any], weighing: Weighing, apart: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """The sums with what was formed added, and which samples were lost, because what was formed is not finite."""
    sums = [own for own, _ in parts]
    if apart is None or weighing.weight is None:
        return sums, None
    formed = [LeafGrads(Dense(own)) for _, own in parts]
    norms = by_group([own.sq_norm() for own in formed], weighing)
    finite = torch.stack([norm.isfinite() for norm in norms]).all(0)
    weights = [torch.where(finite, weighing.weight(group, norm), 0) for group, norm in enumerate(norms)]
    for number, (own, group) in enumerate(zip(formed, weighing.groups, strict=True)):
        sums[number] = sums[number] + own.kept(finite).weighted_sum(_rounded_down(weights[group], real_dtype(own.dtype)))
    return sums, torch.zeros_like(apart).masked_scatter(apart, ~finite)


def by_group(squares: list[Tensor], weighing: Weighing) -> list[Tensor]:
    """The norms of the groups from the squared norms of the leaves."""
    members = [[x for x, own in zip(squares, weighing.groups, strict=True) if own == group] for group in range(weighing.count)]
    # A group may hold nothing but leaves that are None.
    return [root(total(some or [torch.zeros_like(squares[0])])) for some in members]


def norms_of(leaves: list[Any], weighing: Weighing) -> tuple[list[Tensor], list[Tensor]]:
    """The groups' norms and bounds from their squares for each leaf."""
    return by_group([leaf[0] for leaf in leaves], weighing), by_group([leaf[1] for leaf in leaves], weighing)


class _Norms(Quantity):
    """The norms alone, and the bounds on the gradients' parts."""

    def __init__(self, weighing: Weighing) -> None:
        self.weighing = weighing

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Any:
        square = grads.sq_norm()
        return square, grads.sq_condition(square)

    def run(self, leaves: list[Any], samples: Sequence[int] | None) -> Any:
        return None, *norms_of(leaves, self.weighing), None

    def join(self, parts: list[Any], samples: list[Sequence[int] | None]) -> Any:
        sums, norms, conditions, lost = zip(*parts, strict=True)
        groups = [in_order(list(pieces), samples) for pieces in zip(*norms, strict=True)]
        bounds = [in_order(list(pieces), samples) for pieces in zip(*conditions, strict=True)]
        added = None if sums[0] is None else [total(list(pieces)) for pieces in zip(*sums, strict=True)]
        return added, groups, bounds, _masks(list(lost), samples, groups)


class _NormsAndSums(_Norms):
    """Both, from the factors of one backward pass."""

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Any:
        return row(grads) or self._measured(grads)

    def _measured(self, grads: LeafGrads) -> tuple[Tensor, Tensor, LeafGrads]:
        square, settled = grads.settled()
        return square, settled.sq_condition(square), settled

    def run(self, leaves: list[Any], samples: Sequence[int] | None) -> Any:
        found = units(leaves, self.weighing.groups)
        leaves = [unit.found if unit.shapes is None else self._measured(unit.found) for unit in found]
        weighing = replace(self.weighing, groups=[unit.group for unit in found])
        norms, conditions = norms_of(leaves, weighing)
        if weighing.whole and samples is not None:
            return None, norms, conditions, None
        weights = weighing.weigh(norms, conditions, samples)
        known: Rounded = {}
        parts = [_parts(leaf[2], weights, group, known) for leaf, group in zip(leaves, weighing.groups, strict=True)]
        sums, lost = _together(parts, weighing, weights.apart)
        return apart(sums, found), norms, conditions, lost
