"""The form in which gradients are held, in words and in bytes, for `explain`."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View


def form(factor: Factor) -> str:
    """The form in words."""
    if isinstance(factor, Dense):
        return "zeros" if _is_constant(factor.value) else "formed"
    if isinstance(factor, Outer):
        blocks, t = factor.left.shape[1:-2], factor.left.shape[-1]
        name = "outer product" if t == 1 else f"sum of {t} outer products"
        return f"{name}, {'x'.join(map(str, blocks))} blocks" if blocks else name
    if isinstance(factor, ConvOuter):
        groups = factor.geometry.groups
        return "convolution" if groups == 1 else f"convolution, {groups} groups"
    if isinstance(factor, Rows):
        return f"{factor.index.shape[1]} positions in {factor.num_rows} rows"
    if isinstance(factor, View):
        return f"{form(factor.base)}, reshaped"
    if isinstance(factor, Hadamard):
        return f"{form(factor.base)}, {'masked' if factor.by.dtype.itemsize == 1 else 'times a tensor'}"
    assert isinstance(factor, Sum)
    kinds = Counter(form(term) for term in factor.terms)
    return "sum of " + " + ".join(kind if times == 1 else f"{times} x {kind}" for kind, times in kinds.items())


def _is_constant(x: Tensor) -> bool:
    """Whether one number in memory stands for all."""
    return x.numel() > 1 and not any(x.stride())


def held_bytes(factor: Factor) -> int:
    """The memory of what the form is made of, what is held twice counted once."""
    found = {(x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride()): x for x in _tensors(factor)}
    return sum(_elements(x) * x.dtype.itemsize for x in found.values())


def _elements(x: Tensor) -> int:
    """How many numbers a tensor has in memory: an expanded axis has one."""
    total = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        total *= size if stride or size == 0 else 1
    return total


def _tensors(factor: Factor) -> list[Tensor]:
    if isinstance(factor, Dense):
        return [factor.value]
    if isinstance(factor, Outer):
        return [factor.left, factor.right]
    if isinstance(factor, ConvOuter):
        return [factor.x, factor.g]
    if isinstance(factor, Rows):
        return [factor.index, factor.g]
    if isinstance(factor, Sum):
        return [x for term in factor.terms for x in _tensors(term)]
    if isinstance(factor, Hadamard):
        return [*_tensors(factor.base), factor.by]
    assert isinstance(factor, View)
    return _tensors(factor.base)
