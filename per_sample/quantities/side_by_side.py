"""Small gradients of several leaves as those of one: a few operations for all of them instead of a few for each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from per_sample._factors import Dense
from per_sample.quantities.leaf import LeafGrads

# So many numbers of a leaf are formed sooner than its factor is asked.
SMALL = 2**17


class Row(NamedTuple):
    """Every sample's gradient of a small leaf, formed."""

    value: Tensor  # [n, prod(shape)], float32 or wider
    shape: tuple[int, ...]


class Unit(NamedTuple):
    """What is asked as one: a leaf that is large, or all small ones of a group."""

    found: Any  # what was found for the large leaf, or the small ones' ``LeafGrads``
    group: int
    members: list[int]
    shapes: list[tuple[int, ...]] | None  # of the small leaves


def row(grads: Any) -> Row | None:
    """The gradients formed, if they are small and values may be looked at."""
    if not isinstance(grads, LeafGrads) or grads.functional:
        return None
    sizes = (grads.n, *grads.shape)
    if not all(type(size) is int for size in sizes) or prod(sizes) > SMALL:
        return None
    return Row(grads.formed().reshape(sizes[0], prod(sizes[1:])), grads.shape)


def units(leaves: Sequence[Any], groups: Sequence[int]) -> list[Unit]:
    """The leaves, with the rows of a group and a dtype side by side."""
    found = []
    rows: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for number, (leaf, group) in enumerate(zip(leaves, groups, strict=True)):
        if isinstance(leaf, Row):
            rows.setdefault((group, leaf.value.dtype, leaf.value.device), []).append(number)
        else:
            found.append(Unit(leaf, group, [number], None))
    for (group, *_), members in rows.items():
        values = [leaves[number].value for number in members]
        together = LeafGrads(Dense(torch.cat(values, 1) if len(values) > 1 else values[0]))
        found.append(Unit(together, group, members, [leaves[number].shape for number in members]))
    return found


def apart(results: Sequence[Tensor], found: Sequence[Unit]) -> list[Tensor]:
    """A result for each leaf from one ``[*shape]`` for each unit."""
    out: dict[int, Tensor] = {}
    for result, unit in zip(results, found, strict=True):
        if unit.shapes is None:
            out[unit.members[0]] = result
            continue
        parts = result.split([prod(shape) for shape in unit.shapes])
        out |= {number: part.view(shape) for number, part, shape in zip(unit.members, parts, unit.shapes, strict=True)}
    return [out[number] for number in range(len(out))]
