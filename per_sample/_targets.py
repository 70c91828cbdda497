"""How a transform is called, what it differentiates, and what it makes of the gradients."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from per_sample import _arguments, _distributed
from per_sample._containers import close_tree, open_tree
from per_sample._errors import ArgumentError, few
from per_sample._trees import by_module

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums, Arguments
    from per_sample._ranks import Ranks


@dataclass(frozen=True, slots=True)
class Convention:
    """The arguments that all transforms share."""

    argnums: Argnums = 0
    in_dims: Any = None
    has_aux: bool = False
    keep_batch_dim: bool = False
    chunk_size: int | None = None
    randomness: str = "error"
    # The function returns several numbers for a sample.
    jacobian: bool = False
    # There is an answer where no tensor is differentiated.
    empty: bool = False

    def check(self, fn: Callable[..., Any]) -> None:
        """Raise ``ArgumentError`` for what no call could make right."""
        _arguments.check_options(fn, self.argnums, self.randomness, self.chunk_size)
        if self.keep_batch_dim and getattr(fn, "keep_batch_dim", False):
            raise ArgumentError("`fn` gives its module a batch axis itself, as `functional` makes it; leave `keep_batch_dim` out here.")


@dataclass(frozen=True, eq=False, slots=True)
class Targets:
    """The differentiated arguments of one call; ``trees`` has the pytree functions to use."""

    arguments: Arguments
    args: tuple[Any, ...]
    is_tuple: bool
    trees: Any
    # Where the samples of the whole batch lie, of which ``arguments`` are this rank's.
    ranks: Ranks | None = None
    # They hold containers that were opened.
    closes: bool = False

    @classmethod
    def of(
        cls,
        convention: Convention,
        arguments: Arguments,
        args: tuple[Any, ...],
        trees: Any,
        ranks: Ranks | None = None,
        closes: bool = False,
    ) -> Targets:
        """The targets of a call, of which there must be one."""
        targets = cls(arguments, args, isinstance(convention.argnums, tuple), trees, ranks, closes)
        if not convention.empty and not targets.leaves:
            raise ArgumentError("`argnums` names no tensor: there is nothing to differentiate.")
        return targets

    @property
    def n(self) -> int:
        """The number of samples in the whole batch."""
        return self.arguments.n if self.ranks is None else self.ranks.n

    def own_rows(self, x: Tensor, name: str) -> Tensor:
        """The rows of the samples that are here of the caller's tensor ``[n, ...]``; ``name`` is for the message."""
        if self.ranks is None:
            _distributed.refuse([x], f"`{name}` is a DTensor, and the batch is not.")
            return x
        return self.ranks.own_rows(x, f"`{name}`")

    @property
    def leaves(self) -> list[Tensor]:
        """The differentiated tensors, in the order of their numbers."""
        pairs = zip(self.arguments.leaves, self.arguments.diff, strict=True)
        return [leaf for leaf, diff in pairs if diff and isinstance(leaf, Tensor)]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of one sample's gradient of each leaf."""
        own = zip(self.arguments.leaves, self.arguments.dims, self.arguments.diff, strict=True)
        return [
            tuple(size for axis, size in enumerate(leaf.shape) if axis != dim)
            for leaf, dim, diff in own
            if diff and isinstance(leaf, Tensor)
        ]

    def structured(self, results: list[Any]) -> Any:
        """One result for each leaf, in the structure of the differentiated arguments."""
        return self.closed(self._arranged(results))

    def closed(self, tree: Any) -> Any:
        """A tree of such a structure with the caller's containers."""
        return close_tree(tree) if self.closes else tree

    def _arranged(self, results: list[Any]) -> Any:
        return _arguments.as_arguments(results, self.arguments, self.is_tuple, self.args, self.trees)

    def flat(self, tree: Any, name: str) -> list[Any]:
        """The entries of a tree of that structure, one for each leaf; ``name`` is for the message."""
        own = self._arranged(list(range(len(self.leaves))))
        found, spec = self.trees.flatten(self.trees.ordered_like(open_tree(tree) if self.closes else tree, own))
        numbers, own_spec = self.trees.flatten(own)
        if spec != own_spec:
            raise ArgumentError(f"`{name}` must have the structure of the differentiated argument, {own_spec}; got {spec}.")
        return self._by_number(found, numbers)

    def _by_number(self, entries: list[Any], numbers: list[int | None]) -> list[Any]:
        """Entries in the order of a tuple of ``argnums``, one for each leaf, in the order of the leaves; None has no leaf."""
        found = {number: entry for number, entry in zip(numbers, entries, strict=True) if number is not None}
        return [found[number] for number in range(len(self.leaves))]

    def groups(self, prefix: Any, name: str) -> tuple[list[int], list[Any], Any]:
        """The number of the prefix tree's entry for each leaf, the entries, and the prefix's structure."""
        prefix = open_tree(prefix) if self.closes else prefix
        entries, spec = self.trees.flatten(prefix)
        numbered = self.trees.unflatten(spec, list(range(len(entries))))
        own = self._arranged(list(range(len(self.leaves))))
        modules = by_module(prefix, own)
        if modules is not None:
            return [numbered[modules[number]] for number in range(len(self.leaves))], entries, spec
        try:
            spread = self.trees.broadcast_prefix(numbered, own)
        except ValueError as err:
            raise ArgumentError(f"`{name}` is not a prefix of the differentiated argument's structure{_misfit(prefix, own, err)}.") from err
        return self._by_number(spread, self.trees.flatten(own)[0]), entries, spec


def _misfit(prefix: Any, own: Any, err: ValueError) -> str:
    """Where the two differ."""
    if isinstance(prefix, dict) and isinstance(own, dict):
        names = [str(name) for name in own]
        # By key, or by the name of a module.
        covers = {str(key): [name for name in names if name == str(key) or name.startswith(f"{key}.")] for key in prefix}
        counts = Counter(name for covered in covers.values() for name in covered)
        wrong = {
            "nothing for": [name for name in names if not counts[name]],
            "more than one entry for": [name for name in names if counts[name] > 1],
            "not among its keys": [key for key, covered in covers.items() if not covered],
        }
        if any(wrong.values()):
            return ": " + ", ".join(f"{words} {few(found)}" for words, found in wrong.items() if found)
    if type(prefix) is not type(own):
        return f": it is a {type(prefix).__name__}, the argument a {type(own).__name__}"
    return f": {str(err)[:200]}"


class Quantity:
    """What becomes of the gradients: of one leaf, of one run's leaves, of several runs."""

    def leaf(self, number: int, grads: Any, samples: Sequence[int] | None) -> Any:
        """Called when the gradient of leaf ``number`` is complete: ``grads`` is a ``LeafGrads``, of a jacobian a list of them.

        ``samples``: the numbers of the samples in the caller's batch; None: all, in order.
        """
        raise NotImplementedError

    def run(self, leaves: list[Any], samples: Sequence[int] | None) -> Any:
        """One run's results, from those of its leaves."""
        return leaves

    def join(self, parts: list[Any], samples: list[Sequence[int] | None]) -> Any:
        """The results of all runs together."""
        raise NotImplementedError

    def across(self, result: Any, ranks: Ranks) -> Any:
        """The results of all ranks together, as DTensors, from this one's."""
        raise NotImplementedError
