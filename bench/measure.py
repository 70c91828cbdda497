"""Check the answers, then time the methods in interleaved rounds."""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor

from bench import check, memory
from bench.methods import BASELINES, METHODS, Method, Runner, Unavailable
from bench.workloads import Task, Workload

# A round of a fast method repeats it for about this long, since one call is too short for the clock.
ROUND_SECONDS = 5e-3
# Below this pages, not tensors, are what a ratio would be of.
LEAST_MEMORY = 2**20


@dataclass
class Result:
    """One method on one workload, for one quantity."""

    workload: str
    n: int
    width: int
    quantity: str
    method: str
    compiled: bool = False
    status: str = "ok"  # or "wrong", "failed", "absent" (not installed, or does not take part)
    reason: str = ""
    error: float | None = None  # the worst of `check.errors`
    first_call: float = 0.0  # seconds of preparation and first call, compilation included
    times: list[float] = field(default_factory=list)  # seconds a call, one for each round
    memory: int | None = None  # the bytes that the first call takes at its peak
    ratios: dict[str, float] = field(default_factory=dict)  # to "plain" and to "limit" (plain + write); "memory": to that of plain

    @property
    def median(self) -> float:
        """The median time in seconds."""
        return median(self.times)

    @property
    def iqr(self) -> float:
        """The distance of the quartiles in seconds."""
        if len(self.times) < 2:
            return 0.0
        low, _, high = quantiles(self.times, n=4, method="inclusive")
        return high - low


def run_workload(workload: Workload, tables: dict[str, list[Method]], rounds: int, with_memory: bool = False) -> list[Result]:
    """For each quantity every one of its methods: check, then time those whose answer is right.

    Quantities are timed apart, so that none is timed next to the gigabytes of another.
    """
    task = workload.build()
    gradients = check.reference(task)
    task = check.with_max_norm(task, gradients)
    found: list[Result] = []
    for quantity, methods in tables.items():
        chosen = with_baselines(quantity, methods)
        if any(m.compiled for m in chosen):
            # torch gives up on a function of which it has compiled some programs: those of other workloads shall not count.
            torch.compiler.reset()
        results = {m.name: Result(workload.name, workload.n, workload.width, quantity, m.name, m.compiled) for m in chosen}
        runners = _checked(task, chosen, gradients, results)
        if rounds:
            _time(runners, results, rounds)
        if with_memory:
            _weigh(task, [m for m in chosen if m.name in runners and not m.compiled], results)
        found += results.values()
    return found


def with_baselines(quantity: str, methods: Sequence[Method]) -> list[Method]:
    """The methods, the baselines that the quantity has before them."""
    first = [METHODS[quantity][name] for name in BASELINES if name in METHODS[quantity]]
    return first + [m for m in methods if m.name not in BASELINES]


def _time(runners: dict[str, Runner], results: dict[str, Result], rounds: int) -> None:
    times = interleaved(runners, rounds)
    for name, seconds in times.items():
        results[name].times = seconds
        _set_ratios(results[name], times)


def _weigh(task: Task, methods: Sequence[Method], results: dict[str, Result]) -> None:
    for method in methods:
        result = results[method.name]
        try:
            result.memory = memory.peak(task.workload, result.quantity, method.name, max_norm=task.max_norm)
        except (RuntimeError, MemoryError) as err:
            # The time stands: a process of its own may fail for reasons of its own.
            result.reason = f"no peak memory: {_in_one_line(err)}"
            continue
        plain = results["plain"].memory
        if plain is not None and plain >= LEAST_MEMORY:
            result.ratios["memory"] = result.memory / plain


def _checked(task: Task, methods: Sequence[Method], gradients: list[Tensor], results: dict[str, Result]) -> dict[str, Runner]:
    """The runners of the methods that run and whose answer is right."""
    wanted = {q: check.QUANTITIES[q](gradients, task.max_norm) for q in {m.quantity for m in methods} if q is not None}
    runners = {}
    for method in methods:
        result = results[method.name]
        try:
            start = time.perf_counter()
            runner = method.prepare(task)
            got = _quietly(runner)
            result.first_call = time.perf_counter() - start
            if method.quantity is not None:
                _check(task, method, got, wanted[method.quantity], result)
        except (ImportError, Unavailable) as err:
            result.status, result.reason = "absent", _in_one_line(err)
        except Exception as err:  # whatever a peer raises is its answer, and the report's
            result.status, result.reason = "failed", _in_one_line(err)
        if result.status == "ok":
            runners[method.name] = runner
    return runners


def _check(task: Task, method: Method, got: list[Tensor], want: list[Tensor], result: Result) -> None:
    quantity = method.quantity
    assert quantity is not None
    found = check.errors(got, want, quantity)
    result.error = float(found.max())

    def in_float64() -> Tensor:
        exact = task.double()
        exact_want = check.QUANTITIES[quantity](check.reference(exact), exact.max_norm)
        return check.errors(_quietly(method.prepare(exact)), exact_want, quantity)

    if not check.is_right(found, quantity, in_float64):
        result.status, result.reason = "wrong", f"off by {result.error:.1e} of the reference's norm"


def _in_one_line(err: Exception) -> str:
    text = " ".join(str(err).split())
    return f"{type(err).__name__}: {text[:200]}"


def interleaved(runners: dict[str, Runner], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """The seconds a call of each runner takes, one number for each round.

    In each round every runner has its turn, in an order drawn anew: what else the machine does hits all alike, and
    nobody always runs on the caches that the same neighbour leaves.
    """
    shuffle = random.Random(seed).shuffle
    repeats = {name: _repeats(runner) for name, runner in runners.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    for _ in range(rounds):
        shuffle(order)
        gc.collect()
        for name in order:
            times[name].append(timed(runners[name], repeats[name]))
    return times


def _repeats(runner: Runner) -> int:
    """How many calls make a round; the calls it takes to know are the warm-up."""
    timed(runner, 1)
    return max(1, round(ROUND_SECONDS / timed(runner, 1)))


def timed(runner: Runner, repeats: int) -> float:
    """The seconds of one call, without garbage collection and without giving the last result back."""
    with _no_gc(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        for _ in range(repeats):
            result = runner()
        seconds = time.perf_counter() - start
    del result
    return seconds / repeats


@contextmanager
def _no_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _quietly(runner: Callable[[], list[Tensor]]) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runner()


def _set_ratios(result: Result, times: dict[str, list[float]]) -> None:
    """The medians of the ratios in each round, in which both sides met the same noise."""
    plain = times.get("plain")
    if plain is None:
        return
    result.ratios["plain"] = median(t / p for t, p in zip(result.times, plain, strict=True))
    if "write" in times:
        result.ratios["limit"] = median(t / (p + w) for t, p, w in zip(result.times, plain, times["write"], strict=True))
