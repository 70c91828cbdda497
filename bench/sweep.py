"""How cost grows: with the batch, with the width; and how large a batch fits in so much memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from bench import memory
from bench.measure import Result, run_workload, with_baselines
from bench.methods import Method
from bench.workloads import Workload

# What a size is multiplied by.
FACTORS = {"n": (0.25, 0.5, 1, 2, 4), "width": (0.25, 0.5, 1, 2)}
# Those in every sweep; the others where asked for.
IN_SWEEPS = ("vmap", "ours")
# The largest batch is known to this part of itself.
PRECISION = 1.05
# Costs at one batch size say little of one that is more than so many times as large.
FARTHEST = 8


def sweep(workload: Workload, kind: str, tables: dict[str, list[Method]], rounds: int, with_memory: bool) -> Iterator[list[Result]]:
    """The results at each size, one after the other; `kind` is "n" or "width"."""
    base = getattr(workload, kind)
    for factor in FACTORS[kind]:
        sized = replace(workload, **{kind: max(2, round(base * factor))})
        yield run_workload(sized, tables, rounds, with_memory)


@dataclass(frozen=True)
class Fit:
    """The largest batch of one method that fits."""

    workload: str
    quantity: str
    method: str
    limit: int  # bytes
    n: int | None = None
    reason: str = ""  # why there is no `n`


def fits(workload: Workload, tables: dict[str, list[Method]], limit: int) -> Iterator[Fit]:
    """For each quantity the largest batch of each method, the plain batched gradient's first."""
    for quantity, methods in tables.items():
        for method in with_baselines(quantity, methods):
            if method.quantity is not None and not method.compiled:
                yield _fit(workload, quantity, method.name, limit)


def _fit(workload: Workload, quantity: str, method: str, limit: int) -> Fit:
    def peak(n: int) -> int:
        return memory.peak(replace(workload, n=n), quantity, method, limit=limit)

    found = Fit(workload.name, quantity, method, limit)
    try:
        first = peak(workload.n)
        if first > limit:
            return replace(found, reason=f"takes {first} bytes at {workload.n}")
        return replace(found, n=largest(peak, workload.n, first, limit))
    except (RuntimeError, MemoryError) as err:
        return replace(found, reason=str(err))


def largest(peak: Callable[[int], int], n: int, taken: int, limit: int) -> int:
    """The largest size seen to fit, where `PRECISION` times as much was seen not to; `n` takes `taken`."""
    before, low = (0, 0), (n, taken)
    high: tuple[int, int | None] | None = None
    for step in itertools.count():
        if high is not None and high[0] <= _next(low[0]):
            break
        size = _guess(before, low, high, limit, by_line=step % 2 == 0)
        try:
            found = peak(size)
        except MemoryError:
            high = size, None
            continue
        if found <= limit:
            before, low = low, (size, found)
        else:
            high = size, found
    return low[0]


def _guess(before: tuple[int, int], low: tuple[int, int], high: tuple[int, int | None] | None, limit: int, *, by_line: bool) -> int:
    """Where the line through two known sizes meets the limit; half-way every other time, for costs that are no line."""
    if high is None:
        return max(_next(low[0]), min(_crossing(before, low, limit), FARTHEST * low[0]))
    n, taken = high
    if taken is None or not by_line:
        size = math.isqrt(low[0] * n)
    else:
        size = _crossing(low, (n, taken), limit)
    return min(max(_next(low[0]), size), n - 1)


def _next(size: int) -> int:
    return max(size + 1, int(size * PRECISION))


def _crossing(one: tuple[int, int], other: tuple[int, int], limit: int) -> int:
    slope = max(1.0, (other[1] - one[1]) / (other[0] - one[0]))
    # A little less: one that fits says more.
    return int(0.99 * (other[0] + (limit - other[1]) / slope))
