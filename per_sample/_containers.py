"""Arguments that optree does not open: packed sequences, Hugging Face's dicts, and what only torch's own pytrees know.

They are opened outside, so that each sample gets its part, and the function inside sees what the caller passed. Results have the structure
of what was differentiated, and are closed again.
"""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from per_sample import _trees as trees
from per_sample._errors import ArgumentError


class Padded(NamedTuple):
    """A packed sequence opened: ``value [n, t, *]`` and ``lengths [n]``, in the order of the batch."""

    value: Tensor
    lengths: Tensor


class Form:
    """How a container is made again: by the structure that torch's own pytrees have of it, or as a copy of another with its own dict."""

    __slots__ = ("attributes", "kind", "spec")

    def __init__(self, kind: Any, spec: Any = None, attributes: dict[str, Any] | None = None) -> None:
        self.kind, self.spec, self.attributes = kind, spec, attributes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and (self.kind, self.spec) == (other.kind, other.spec)

    def __hash__(self) -> int:
        return hash(self.kind)

    def __repr__(self) -> str:
        return f"{self.kind.__qualname__} {self.spec}"

    def made_of(self, parts: Any) -> Any:
        """The container of these parts."""
        if self.attributes is None:
            return pytree.tree_unflatten(parts, self.spec)
        found = self.kind.__new__(self.kind)
        vars(found).update(self.attributes, data=parts)
        return found


class Opened:
    """Another container opened."""

    __slots__ = ("form", "parts")

    def __init__(self, parts: Any, form: Form) -> None:
        self.parts, self.form = parts, form


# The form is part of the structure, so that trees of two types differ.
trees.register(Opened, lambda x: ((x.parts,), x.form), lambda form, parts: Opened(parts[0], form))


class Outside(NamedTuple):
    """A call without such containers."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    # Some of what is differentiated was opened: results of that structure have to be closed.
    closes: bool = False


def opened(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Any) -> Outside:
    """The function and its arguments, without such containers."""
    numbers = {i % len(args) for i in (argnums if isinstance(argnums, tuple) else (argnums,)) if args}
    holds = [_holds(a) for a in args]
    if not any(holds) and not (kwargs and _holds(kwargs)):
        return Outside(fn, args, kwargs)
    for i in numbers:
        if PackedSequence in holds[i]:
            raise ArgumentError(
                f"Argument {i} is differentiated and holds a PackedSequence. Pass the padded tensor and the lengths instead, and pack "
                "inside the function."
            )

    @functools.wraps(fn)
    def closing(*args: Any, **kwargs: Any) -> Any:
        inner = close_tree([args, kwargs])
        return fn(*inner[0], **inner[1])

    args, kwargs = open_tree([args, kwargs])
    return Outside(closing, args, kwargs, closes=any(holds[i] for i in numbers))


def is_packed(x: Any) -> bool:
    return type(x) is PackedSequence


def _is_container(x: Any) -> bool:
    kind = type(x)
    if kind is Tensor:
        return False
    # A type that both know is optree's business.
    return is_packed(x) or isinstance(x, UserDict) or (kind in pytree.SUPPORTED_NODES and _is_leaf(x))


def _is_leaf(x: Any) -> bool:
    return bool(optree.tree_is_leaf(x, none_is_leaf=True, namespace=trees.NAMESPACE))


def _holds(tree: Any) -> set[type]:
    """The types of such containers in a tree."""
    if type(tree) is Tensor:
        return set()
    leaves = optree.tree_leaves(tree, is_leaf=_is_container, namespace=trees.NAMESPACE)
    return {type(x) for x in leaves if _is_container(x)}


def open_tree(tree: Any) -> Any:
    """The tree with such containers opened."""
    return trees.map(_opened, tree, is_leaf=_is_container)


def _opened(x: Any) -> Any:
    if not _is_container(x):
        return x
    if is_packed(x):
        return Padded(*pad_packed_sequence(x, batch_first=True))
    if isinstance(x, UserDict):
        return Opened(open_tree(dict(x.data)), Form(type(x), None, {name: own for name, own in vars(x).items() if name != "data"}))
    parts, spec = pytree.tree_flatten(x)
    return Opened(open_tree(parts), Form(type(x), spec))


def close_tree(tree: Any) -> Any:
    """The tree with its containers as they were."""
    return trees.map(_closed, tree, is_leaf=_is_opened)


def _is_opened(x: Any) -> bool:
    return type(x) in (Padded, Opened)


def _closed(x: Any) -> Any:
    if type(x) is Opened:
        return x.form.made_of(close_tree(x.parts))
    if type(x) is not Padded:
        return x
    value, lengths = (x.value, x.lengths) if x.lengths.dim() else (x.value.unsqueeze(0), x.lengths.unsqueeze(0))
    return pack_padded_sequence(value, lengths, batch_first=True, enforce_sorted=False)
