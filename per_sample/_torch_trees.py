"""Pytrees by torch's own functions, which dynamo can trace."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure."""
    return pytree.tree_flatten(tree)


def unflatten(spec: Any, leaves: list[Any]) -> Any:
    """The tree of a structure and its leaves."""
    return pytree.tree_unflatten(leaves, spec)


def broadcast_prefix(prefix: Any, tree: Any) -> list[Any]:
    """One entry of the prefix tree for each leaf of the tree; ValueError if it is none."""
    dims = pytree._broadcast_to_and_flatten(ordered_like(prefix, tree), pytree.tree_flatten(tree)[1])
    if dims is None:
        raise ValueError("the structures differ")
    return dims


def ordered_like(prefix: Any, tree: Any) -> Any:
    """A prefix tree with the keys of its dicts in the order of the tree's: here that is the order of the leaves."""
    if isinstance(prefix, dict) and isinstance(tree, dict) and prefix.keys() == tree.keys():
        return {key: ordered_like(prefix[key], tree[key]) for key in tree}
    if type(prefix) in (list, tuple) and type(tree) is type(prefix) and len(prefix) == len(tree):
        return type(prefix)([ordered_like(own, other) for own, other in zip(prefix, tree, strict=True)])
    return prefix
