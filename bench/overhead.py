"""What Python costs: the time the interpreter adds to each op of a step of tiny tensors."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.measure import interleaved
from bench.methods import METHODS, Runner
from bench.workloads import RESNET_TINY, Task

TARGET_MICROSECONDS = 15.0
# The routes of `explain` that are slow for want of a rule.
SLOW_ROUTES = ("fallback", "loop")


@dataclass(frozen=True)
class Ops:
    """The ops of one run, as `explain` counts them: what autograd detaches for itself is not among them."""

    total: int
    slow: dict[str, int]  # those on a slow route

    def __str__(self) -> str:
        names = ", ".join(f"{op} x{count}" for op, count in self.slow.items())
        return f"without a rule: {sum(self.slow.values())} of {self.total} ops" + (f" ({names})" if names else "")


@dataclass(frozen=True)
class Overhead:
    """Medians in seconds: of whole steps, and of what the interpreter adds to an op beside the rule's own work."""

    plain: float
    ours: float
    dispatch: float
    ops: Ops

    @property
    def added(self) -> float:
        """Seconds that an op of ours takes longer in the mean, its rule's work included."""
        return (self.ours - self.plain) / self.ops.total


def _plain(task: Task) -> Runner:
    """The batched gradient by the same functional loss, since the price of `functional_call` is not ours."""
    params = {k: p.clone().requires_grad_() for k, p in task.params.items()}
    return lambda: list(torch.autograd.grad(task.fn(params, task.x, task.y), list(params.values())))


def count_ops(task: Task) -> Ops:
    """The ops that one call dispatches, without the factors that are materialised after them."""
    from per_sample import explain

    report = explain(task.fn, keep_batch_dim=task.workload.keep_batch_dim)(task.params, task.x, task.y)
    ops = [row for row in report.rows if "." in row.op]
    return Ops(sum(row.count for row in ops), {row.op: row.count for row in ops if row.route in SLOW_ROUTES})


def _recorded(task: Task) -> list[tuple[Any, Any, Any, Any]]:
    """Every op that a step brings to the interpreter: context, op, arguments."""
    from per_sample import _interpreter

    calls: list[tuple[Any, Any, Any, Any]] = []
    original: Any = _interpreter.dispatch

    def recording(ctx: Any, op: Any, args: Any, kwargs: Any) -> Any:
        calls.append((ctx, op, args, kwargs))
        return original(ctx, op, args, kwargs)

    _interpreter.dispatch = recording  # type: ignore[assignment]
    try:
        METHODS["gradients"]["ours"].prepare(task)()
    finally:
        _interpreter.dispatch = original
    return calls


def _fastest(run: Callable[[], Any], context: Any, repeats: int = 30) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        context.pending.clear()
    return best


def dispatch_overheads(task: Task) -> list[float]:
    """For each op with a rule, seconds: the op on per-sample tensors, less the body of its rule on the same arguments."""
    from per_sample._batched import Batched
    from per_sample._entries import ENTRIES
    from per_sample._interpreter import Interpreter

    found = []
    for ctx, op, args, kwargs in _recorded(task):
        entry = ENTRIES.get(op)
        if entry is None or not entry.simple or not any(type(a) is Batched and not a.shared for a in args):
            continue
        ctx.closed = False
        values = [a._value if type(a) is Batched and a.shared else a for a in args]
        with torch.no_grad(), Interpreter(ctx):
            whole = _fastest(partial(op, *args, **kwargs), ctx)
        body = _fastest(partial(entry.run, *values, **kwargs), ctx)
        ctx.closed = True
        found.append(whole - body)
    return found


def measure(rounds: int) -> Overhead:
    """The overhead of a training step's gradients on a ResNet-18 of 4 to 32 channels, two 8x8 images."""
    task = RESNET_TINY.build()
    times = interleaved({"plain": _plain(task), "ours": METHODS["gradients"]["ours"].prepare(task)}, rounds)
    dispatch = median(dispatch_overheads(task))
    return Overhead(median(times["plain"]), median(times["ours"]), dispatch, count_ops(task))


def print_overhead(rounds: int) -> None:
    """Measure and print."""
    found = measure(rounds)
    print(
        f"{RESNET_TINY.name}, n={RESNET_TINY.n}, {found.ops.total} ops: dispatch adds {found.dispatch * 1e6:.1f} us to the median op "
        f"(target: at most {TARGET_MICROSECONDS:.0f})"
    )
    print(
        f"whole step: plain {found.plain * 1e3:.2f} ms, ours {found.ours * 1e3:.2f} ms, which is {found.added * 1e6:.1f} us an op, "
        "the separate weight gradients included"
    )
    print(found.ops)


def profile(task: Task, calls: int = 20, lines: int = 30) -> None:
    """Print the Python functions in which ours spends most, and the ops without a rule."""
    run = METHODS["gradients"]["ours"].prepare(task)
    run()  # what is resolved once is not what a call costs
    print(f"{task.workload.name}, {calls} calls; {count_ops(task)}")
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(calls):
            run()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(lines)
