"""What Python costs: the time this library adds to a plain step of tiny tensors, for each op it dispatches."""

from __future__ import annotations

import cProfile
import pstats
from dataclasses import dataclass
from statistics import median

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
    """Medians in seconds."""

    plain: float
    ours: float
    ops: Ops

    @property
    def microseconds(self) -> float:
        """For each op."""
        return (self.ours - self.plain) / self.ops.total * 1e6


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


def measure(rounds: int) -> Overhead:
    """The overhead of a training step's gradients on a ResNet-18 of 4 to 32 channels, two 8x8 images."""
    task = RESNET_TINY.build()
    times = interleaved({"plain": _plain(task), "ours": METHODS["ours"].prepare(task)}, rounds)
    return Overhead(median(times["plain"]), median(times["ours"]), count_ops(task))


def print_overhead(rounds: int) -> None:
    """Measure and print."""
    found = measure(rounds)
    print(
        f"{RESNET_TINY.name}, n={RESNET_TINY.n}: plain {found.plain * 1e3:.2f} ms, ours {found.ours * 1e3:.2f} ms, "
        f"{found.ops.total} ops: {found.microseconds:.1f} us an op (target: at most {TARGET_MICROSECONDS:.0f})"
    )
    print(found.ops)


def profile(task: Task, calls: int = 20, lines: int = 30) -> None:
    """Print the Python functions in which ours spends most, and the ops without a rule."""
    run = METHODS["ours"].prepare(task)
    run()  # what is resolved once is not what a call costs
    print(f"{task.workload.name}, {calls} calls; {count_ops(task)}")
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(calls):
            run()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(lines)
