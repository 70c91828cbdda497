"""Pytrees by optree; None is a leaf everywhere, so that an absent tensor keeps its place.

Types may be registered for this library alone: in optree's namespace ``per_sample``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optree

if TYPE_CHECKING:
    from collections.abc import Callable


NAMESPACE = "per_sample"


def register(kind: Any, parts: Callable[[Any], Any], made_of: Callable[[Any, Any], Any]) -> None:
    """Have a type opened in this library: ``parts(x)`` are its parts and the rest, ``made_of(rest, parts)`` makes it again."""
    optree.register_pytree_node(kind, parts, made_of, namespace=NAMESPACE)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure."""
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    return leaves, spec


def unflatten(spec: Any, leaves: list[Any]) -> Any:
    """The tree of a structure and its leaves."""
    return optree.tree_unflatten(spec, leaves)


def map(f: Callable[..., Any], *trees: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Apply a function to the leaves of trees of one structure; what ``is_leaf`` says is one, too."""
    return optree.tree_map(f, *trees, is_leaf=is_leaf, none_is_leaf=True, namespace=NAMESPACE)


def broadcast_prefix(prefix: Any, tree: Any) -> list[Any]:
    """One entry of the prefix tree for each leaf of the tree; ValueError if it is none."""
    return optree.broadcast_prefix(prefix, tree, none_is_leaf=True, namespace=NAMESPACE)


def ordered_like(prefix: Any, tree: Any) -> Any:
    """The prefix tree as it is: the leaves of dicts are ordered by their keys."""
    return prefix


def by_module(prefix: Any, own: Any) -> dict[int, str] | None:
    """The module each parameter is in, by its leaf's number, where the prefix names modules rather than their parameters: ``"encoder"`` for
    ``"encoder.0.weight"``; None if it does not, or not for each parameter one."""
    if not (isinstance(prefix, dict) and isinstance(own, dict)) or prefix.keys() == own.keys():
        return None
    found: dict[int, str] = {}
    for name, number in own.items():
        around = [key for key in prefix if isinstance(name, str) and isinstance(key, str) and f"{name}.".startswith(f"{key}.")]
        if len(around) != 1:
            return None
        found[number] = around[0]
    return found if set(found.values()) == set(prefix) else None
