"""Some elements of every sample's gradient: a range of the leaf at a time, for all samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from per_sample._factors import ConvOuter, Dense, Factor, Hadamard, Outer, Rows, Sum, View
from per_sample._options import current_options


def elements(factor: Factor, start: int, size: int, *, functional: bool = False) -> Tensor:
    """The elements ``start`` to ``start + size`` of the flattened leaf, ``[n, size]``, and little more computed than those."""
    if isinstance(factor, View):
        return elements(factor.base, start, size, functional=functional)
    if isinstance(factor, Hadamard):
        by = factor.by.reshape(-1).narrow(0, start, size)
        return Hadamard(Dense(elements(factor.base, start, size, functional=functional)), by).materialize()
    if isinstance(factor, Sum):
        first, *rest = [elements(term, start, size, functional=functional) for term in factor.terms]
        for other in rest:
            first = first + other
        return first
    if isinstance(factor, Dense):
        value = factor.value
        return value.reshape(value.shape[0], prod(factor.shape)).narrow(1, start, size)
    width = prod(factor.shape[1:])
    if size == 0 or width == 0:
        return factor.like.new_zeros(factor.like.shape[0], size)
    first_row, end = start // width, -(-(start + size) // width)
    found = _rows(factor, first_row, end - first_row).materialize(functional=functional)
    return found.flatten(1).narrow(1, start - first_row * width, size)


def _rows(factor: Factor, start: int, size: int) -> Factor:
    """A range of a leaf along its first axis."""
    if start == 0 and size == factor.shape[0]:
        return factor
    if isinstance(factor, Outer):
        right = factor.right if factor.right.dim() == 3 else factor.right.narrow(1, start, size)
        return Outer(factor.left.narrow(1, start, size), right)
    if isinstance(factor, Rows):
        index = factor.index - start
        return Rows(index.masked_fill(index >= size, -1), factor.g, size)
    assert isinstance(factor, ConvOuter)
    return _channels(factor, start, size)


def _channels(factor: ConvOuter, start: int, size: int) -> Factor:
    """Output channels, with the input of their groups alone."""
    groups = factor.geometry.groups
    outputs, inputs = factor.g.shape[2] // groups, factor.x.shape[2] // groups
    first, end = start // outputs, -(-(start + size) // outputs)
    x = factor.x.narrow(2, first * inputs, (end - first) * inputs)
    geometry = replace(factor.geometry, groups=end - first)
    if end - first == 1:
        return ConvOuter(x, factor.g.narrow(2, start, size), geometry)
    g = factor.g.narrow(2, first * outputs, (end - first) * outputs)
    value = ConvOuter(x, g, geometry).materialize()
    return Dense(value.narrow(1, start - first * outputs, size))


def ranges(factor: Factor, element_bytes: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Starts and sizes that cover a leaf, whole rows where there is room for one.

    Args:
        factor: the gradients.
        element_bytes: how much of the scratch memory an element of the leaf takes.
        unit: of which all are multiples.

    Yields:
        Starts and sizes, in order.
    """
    numel = prod(factor.shape)
    if type(element_bytes) is not int or type(numel) is not int:
        # Sizes unknown to a trace must not be compared.
        yield 0, numel
        return
    step = current_options().scratch_bytes // max(1, element_bytes)
    width = _row_size(factor) if unit == 1 else unit
    step = max(unit, step - step % width if step > width else step)
    for start in range(0, numel, step):
        yield start, min(step, numel - start)


def _row_size(factor: Factor) -> int:
    """How many elements of a leaf are computed together."""
    while isinstance(factor, View | Hadamard):
        factor = factor.base
    if isinstance(factor, Dense):
        return 1
    return max(1, *map(_row_size, factor.terms)) if isinstance(factor, Sum) else max(1, prod(factor.shape[1:]))


def real_elements(factor: Factor, start: int, size: int, *, functional: bool = False) -> Tensor:
    """As `elements`, with the two parts of complex numbers as elements of their own, ``[n, 2 * size]``."""
    value = elements(factor, start, size, functional=functional)
    return torch.view_as_real(value.resolve_conj()).flatten(1) if value.is_complex() else value
