"""Pytrees by optree; None is a leaf everywhere, so that an absent tensor keeps its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optree

if TYPE_CHECKING:
    from collections.abc import Callable


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure."""
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
    return leaves, spec


def unflatten(spec: Any, leaves: list[Any]) -> Any:
    """The tree of a structure and its leaves."""
    return optree.tree_unflatten(spec, leaves)


def map(f: Callable[..., Any], *trees: Any) -> Any:
    """Apply a function to the leaves of trees of one structure."""
    return optree.tree_map(f, *trees, none_is_leaf=True)


def broadcast_prefix(prefix: Any, tree: Any) -> list[Any]:
    """One entry of the prefix tree for each leaf of the tree; ValueError if it is none."""
    return optree.broadcast_prefix(prefix, tree, none_is_leaf=True)


def ordered_like(prefix: Any, tree: Any) -> Any:
    """The prefix tree as it is: the leaves of dicts are ordered by their keys."""
    return prefix
