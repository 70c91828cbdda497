"""A quantity a few samples at a time, whose gradients are gone before the next ones come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.methods.method import Runner
from bench.methods.reductions import REDUCTIONS
from bench.workloads import Task


def streamed(gradients: Callable[[Tensor, Tensor], list[Tensor]], task: Task, quantity: str, size: int) -> Runner:
    """The quantity from ``gradients(x, y)`` of ``size`` samples after the other."""
    reduce, joined = REDUCTIONS[quantity], _added if quantity == "clipped" else _concatenated

    def run() -> list[Tensor]:
        chunks = zip(task.x.split(size), task.y.split(size), strict=True)
        return joined(reduce(gradients(x, y), task.max_norm) for x, y in chunks)

    return run


def _concatenated(parts: Iterator[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _added(parts: Iterator[list[Tensor]]) -> list[Tensor]:
    totals = next(parts)
    for part in parts:
        for total, term in zip(totals, part, strict=True):
            total += term
    return totals
