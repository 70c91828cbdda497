"""A transform's one way through: read the arguments, run, reduce leaf by leaf, put the runs together."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from per_sample import _arguments, _compile, _distributed, _torch_trees
from per_sample import _trees as trees
from per_sample._batches import joined, outcomes
from per_sample._containers import close_tree, opened
from per_sample._errors import DataDependentError
from per_sample._factors import Dense
from per_sample._run import Program
from per_sample._skipped import skip
from per_sample._targets import Convention, Quantity, Targets
from per_sample.quantities.leaf import LeafGrads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Arguments
    from per_sample._containers import Outside
    from per_sample._ranks import Ranks

    # Makes the quantity of one call, once the differentiated leaves are known.
    Bind = Callable[[Targets], Quantity]


class Evaluation(NamedTuple):
    """What one call of a transform found."""

    result: Any
    values: Any  # [n, ...]
    aux: Any

    def beside(self, results: list[Any], *, values: bool, aux: bool) -> Any:
        """What a transform returns: its results, and behind them the losses and the auxiliary values where they are asked for."""
        found = [*results, *([self.values] if values else []), *([self.aux] if aux else [])]
        return tuple(found) if len(found) > 1 else found[0]


def transform(
    fn: Callable[..., Any], convention: Convention, bind: Bind, finish: Callable[[Evaluation, Targets], Any]
) -> Callable[..., Any]:
    """The function that a transform returns: evaluates ``bind``'s quantity and hands it to ``finish``."""
    convention.check(fn)

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        return finish(*evaluate(fn, convention, bind, args, kwargs))

    return transformed


def evaluate(
    fn: Callable[..., Any], convention: Convention, bind: Bind, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Evaluation, Targets]:
    """One quantity of the gradients of one batch; of all ranks' samples where it is sharded over them."""
    if torch.compiler.is_dynamo_compiling():
        if _distributed.seen(_torch_trees.flatten((args, kwargs))[0]):
            return _untraced(fn, convention, bind, args, kwargs)
        result, values, aux, targets = _compile.evaluate(fn, convention, bind, args, kwargs)
        return Evaluation(result, values, aux), targets
    outside, ranks = prepared(fn, convention, args, kwargs)
    found, targets, quantity = evaluate_here(outside, convention, bind, ranks)
    if ranks is not None:
        found = together(found, ranks)._replace(result=quantity.across(found.result, ranks))
    return found, targets


_untraced = _disable_dynamo(evaluate)


def prepared(fn: Callable[..., Any], convention: Convention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Outside, Ranks | None]:
    """The function and its arguments as tensors of this process, and, if they were DTensors, how the samples lie on the ranks."""
    with _distributed.mixtures_refused():
        outside = opened(fn, args, kwargs, convention.argnums)
    ranks, inner, shared = _distributed.localised(convention, outside.args, outside.kwargs)
    if ranks is not None:
        outside = opened(_distributed.with_whole_state(fn), args, kwargs, convention.argnums)
    return outside._replace(args=inner, kwargs=shared), ranks


def together(found: Evaluation, ranks: Ranks) -> Evaluation:
    """With the values of all ranks' samples."""
    return found._replace(values=ranks.rows(found.values), aux=ranks.tree_of_rows(found.aux))


def evaluate_here(outside: Outside, convention: Convention, bind: Bind, ranks: Ranks | None) -> tuple[Evaluation, Targets, Quantity]:
    """One quantity of the gradients of the samples that are here."""
    fn, args, kwargs, closes = outside
    arguments = _arguments.read(args, convention.argnums, convention.in_dims)
    targets = Targets.of(convention, arguments, args, trees, ranks, closes)
    quantity = bind(targets)
    program = Program(fn, kwargs, convention.has_aux, convention.keep_batch_dim, convention.randomness, convention.jacobian)
    with nullcontext() if ranks is None else ranks.random(), _distributed.mixtures_refused():
        return _evaluate(program, arguments, targets, quantity, convention.chunk_size), targets, quantity


# Where dynamo gives a program up, it compiles what that calls; these run as they are.
skip(prepared)
skip(evaluate_here)


def _evaluate(program: Program, arguments: Arguments, targets: Targets, quantity: Quantity, chunk_size: int | None) -> Evaluation:
    parts: list[Any] = []
    seen: list[Any] = []
    samples: list[Sequence[int] | None] = []
    empty = arguments.n == 0
    for outcome in outcomes(program, arguments, chunk_size, lambda some: _reducer(quantity, some, empty)):
        if not empty:
            with without_autocast(targets.leaves):
                parts.append(quantity.run(outcome.results, outcome.samples))
        seen.append((outcome.values, outcome.aux))
        samples.append(outcome.samples)
    if not empty:
        values, aux = joined(seen, samples)
        with without_autocast(targets.leaves):
            return Evaluation(quantity.join(parts, samples), values, close_tree(aux))
    values, aux = trees.map(_emptied, seen[0]) if seen else _of_nobody(targets, program)
    outputs = prod(values.shape[1:]) if program.jacobian else None
    nothing = [quantity.leaf(i, _no_grads(shape, targets.leaves[i], outputs), None) for i, shape in enumerate(targets.shapes)]
    return Evaluation(quantity.join([quantity.run(nothing, None)], [None]), values, close_tree(aux))


def _reducer(quantity: Quantity, samples: Sequence[int] | None, empty: bool) -> Callable[..., Any]:
    # A recorder has the gradients tell it what they are asked.
    def reduce(number: int, found: Any, functional: bool, of: Callable[..., LeafGrads] = LeafGrads) -> Any:
        if empty:
            return None
        if isinstance(found, list):
            return quantity.leaf(number, [of(factor, functional) for factor in found], samples)
        with without_autocast([found.like]):
            return quantity.leaf(number, of(found, functional), samples)

    return reduce


def without_autocast(tensors: list[Tensor]) -> AbstractContextManager[Any]:
    """Gradients are reduced in their own precision, whatever autocast surrounds the transform."""
    kind = tensors[0].device.type if tensors else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _no_grads(shape: tuple[int, ...], leaf: Tensor, outputs: int | None) -> Any:
    """The gradients of no samples; as many as there are outputs."""
    grads = LeafGrads(Dense(leaf.detach().new_zeros((0, *shape))))
    return grads if outputs is None else [grads] * outputs


def _of_nobody(targets: Targets, program: Program) -> tuple[Any, Any]:
    """The values of an empty batch where the function wants to know those of a sample."""
    if program.has_aux or program.jacobian:
        raise DataDependentError("The batch is empty, and `fn` asks for a sample's values, so that nobody knows what it would return.")
    return targets.leaves[0].detach().real.new_zeros(0), None


def _emptied(x: Any) -> Any:
    return x[:0] if isinstance(x, Tensor) else x
