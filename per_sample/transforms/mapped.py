"""Quantities of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack, overload

from torch import Tensor

from per_sample._batches import in_order
from per_sample._errors import ArgumentError
from per_sample._evaluate import Evaluation, transform
from per_sample._targets import Convention, Quantity, Targets
from per_sample.quantities.combined import total

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums
    from per_sample._ranks import Ranks
    from per_sample._signatures import Across, P, Randomness, RunOptions
    from per_sample.quantities.leaf import LeafGrads

ACROSS = ("samples", "sum", "whole")


@overload
def per_sample_grad_map(
    fn: Callable[P, Any],
    leaf: Callable[[LeafGrads], Tensor],
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    across: Across = ...,
    has_aux: bool = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Any]: ...
@overload
def per_sample_grad_map(
    fn: Callable[P, Any],
    leaf: Callable[..., Tensor],
    argnums: Argnums = ...,
    in_dims: Any = ...,
    *,
    trees: Sequence[Any],
    across: Across = ...,
    has_aux: bool = ...,
    **options: Unpack[RunOptions],
) -> Callable[P, Any]: ...
def per_sample_grad_map(
    fn: Callable[..., Any],
    leaf: Callable[..., Tensor],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    trees: Sequence[Any] = (),
    across: Across = "samples",
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., Any]:
    """Transform the loss of one sample into a function that returns a quantity of your own of every leaf's gradients.

    Args:
        fn: as in ``per_sample_grad``.
        leaf: called with a ``LeafGrads`` for each leaf, as soon as the leaf's gradient is complete; returns a tensor. Its methods
            (``sq_norm``, ``weighted_sum``, ``dot``, ``gram``, ...) take the cheapest way for each leaf; ``materialize()`` gives the
            gradients ``[n, *shape]``. With ``trees`` it is called ``leaf(grads, *entries)``.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``.
        trees: further trees of the structure of the differentiated argument, such as directions, masks or names: ``leaf`` gets each
            one's entry for its leaf, as ``tree_map`` does it.
        across: what becomes of the results where the batch runs in parts (``chunk_size``, groups, processes), of which ``leaf`` sees one at
            a time. ``"samples"``: they have a row for each sample, which must depend on that sample alone, and are concatenated;
            ``"sum"``: they are sums over samples, and are added; ``"whole"``: neither, so that the batch must run as a whole.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns the structure of the differentiated argument with the results as leaves; with
        ``has_aux`` a pair ``(results, aux)``.

    Raises:
        ArgumentError: for options that cannot be right, a tree of another structure, a result of ``leaf`` that is no tensor, or a batch
            in parts where it is to be whole.

    Example:
        >>> import torch
        >>> from per_sample import per_sample_grad_map
        >>> largest = per_sample_grad_map(lambda w, x: w @ x, lambda grads: grads.materialize().abs().flatten(1).amax(1))
        >>> largest(torch.ones(2), torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        tensor([2.0000, 0.5000])
    """
    if across not in ACROSS:
        raise ArgumentError(f"`across` must be one of {ACROSS}; got {across!r}.")
    if not callable(leaf):
        raise ArgumentError(f"`leaf` must be callable; got {type(leaf).__name__}.")
    if across == "whole" and chunk_size is not None:
        raise ArgumentError("`across='whole'` wants the whole batch at once; leave `chunk_size` out.")
    if not isinstance(trees, (tuple, list)):
        raise ArgumentError(f"`trees` must be a tuple or a list of trees; got {type(trees).__name__}.")
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness, empty=True)

    def bind(targets: Targets) -> _Mapped:
        columns = [targets.flat(tree, f"trees[{i}]") for i, tree in enumerate(trees)]
        return _Mapped(leaf, [[column[number] for column in columns] for number in range(len(targets.leaves))], across)

    def finish(found: Evaluation, targets: Targets) -> Any:
        results = targets.structured(found.result)
        return (results, found.aux) if has_aux else results

    return transform(fn, convention, bind, finish)


_PARTS = "The batch runs in parts (groups of samples that go different ways, or processes), and `across='whole'` wants all of it at once."


class _Mapped(Quantity):
    """A user's function of each leaf's gradients."""

    def __init__(self, of_leaf: Callable[..., Tensor], entries: list[list[Any]], across: str) -> None:
        self.of_leaf = of_leaf
        self.entries = entries
        self.across_parts = across
        self.by_sample = across == "samples"

    def leaf(self, number: int, grads: LeafGrads, samples: Sequence[int] | None) -> Tensor:
        if samples is not None and self.across_parts == "whole":
            raise ArgumentError(_PARTS)
        try:
            found = self.of_leaf(grads, *self.entries[number])
        except Exception as err:
            err.add_note(
                f"`leaf` was called with the gradients of leaf {number} of the differentiated argument: {grads!r}. They are no tensor: "
                "`materialize()` gives one."
            )
            raise
        if not isinstance(found, Tensor):
            raise ArgumentError(f"`leaf` must return a tensor; it returned {type(found).__name__}.")
        if self.by_sample and (found.dim() == 0 or found.shape[0] != grads.n):
            raise ArgumentError(
                f"`leaf` must return a row for each of the {grads.n} samples; got {list(found.shape)}. Or set `across='sum'`."
            )
        return found

    def join(self, parts: list[list[Tensor]], samples: list[Sequence[int] | None]) -> list[Tensor]:
        columns = [list(pieces) for pieces in zip(*parts, strict=True)]
        return [in_order(pieces, samples) if self.by_sample else total(pieces) for pieces in columns]

    def across(self, result: list[Tensor], ranks: Ranks) -> list[Any]:
        if self.across_parts == "whole":
            raise ArgumentError(_PARTS)
        return [ranks.rows(x) for x in result] if self.by_sample else ranks.sums(result)
