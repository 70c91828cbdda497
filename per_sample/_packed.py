"""Arguments that are packed sequences: a batch of them travels padded, and each sample's function gets its own packed again."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from per_sample._errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable


class Padded(NamedTuple):
    """A packed sequence opened: ``value [n, t, *]`` and ``lengths [n]``, in the order of the batch."""

    value: Tensor
    lengths: Tensor


def opened(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The function and its arguments, without packed sequences: they are opened outside and packed inside."""
    numbers = {i % len(args) for i in (argnums if isinstance(argnums, tuple) else (argnums,)) if args}
    holds = [_holds_packed(a) for a in args]
    if not any(holds) and not (kwargs and _holds_packed(kwargs)):
        return fn, args, kwargs
    for i in numbers:
        if holds[i]:
            raise ArgumentError(
                f"Argument {i} is differentiated and holds a PackedSequence. Pass the padded tensor and the lengths instead, and pack "
                "inside the function."
            )

    @functools.wraps(fn)
    def packing(*args: Any, **kwargs: Any) -> Any:
        inner: Any = optree.tree_map(_pack, [args, kwargs], is_leaf=_is_padded, none_is_leaf=True)  # type: ignore[arg-type]
        return fn(*inner[0], **inner[1])

    outer: Any = optree.tree_map(_open, [args, kwargs], is_leaf=is_packed, none_is_leaf=True)  # type: ignore[arg-type]
    return packing, *outer


def is_packed(x: Any) -> bool:
    return type(x) is PackedSequence


def _is_padded(x: Any) -> bool:
    return type(x) is Padded


def _holds_packed(tree: Any) -> bool:
    return type(tree) is not Tensor and any(map(is_packed, optree.tree_leaves(tree, is_leaf=is_packed)))


def _open(x: Any) -> Any:
    return Padded(*pad_packed_sequence(x, batch_first=True)) if is_packed(x) else x


def _pack(x: Any) -> Any:
    if not _is_padded(x):
        return x
    value, lengths = (x.value, x.lengths) if x.lengths.dim() else (x.value.unsqueeze(0), x.lengths.unsqueeze(0))
    return pack_padded_sequence(value, lengths, batch_first=True, enforce_sorted=False)
