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

from torch import Tensor

from bench import check
from bench.methods import BASELINES, METHODS, Method, Runner
from bench.workloads import Task, Workload

# A round of a fast method repeats it for about this long, since one call is too short for the clock.
ROUND_SECONDS = 5e-3


@dataclass
class Result:
    """One method on one workload."""

    workload: str
    n: int
    method: str
    quantity: str | None
    status: str = "ok"  # or "wrong", "failed"
    reason: str = ""
    error: float | None = None  # the worst of `check.errors`
    first_call: float = 0.0  # seconds of preparation and first call, compilation included
    times: list[float] = field(default_factory=list)  # seconds a call, one for each round
    ratios: dict[str, float] = field(default_factory=dict)  # to "plain" and to "limit" (plain + write)

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


def run_workload(workload: Workload, methods: Sequence[Method], rounds: int, seed: int = 0) -> list[Result]:
    """Every method on a workload: check, then time those whose answer is right."""
    task = workload.build(seed)
    chosen = [METHODS[name] for name in BASELINES] + [m for m in methods if m.name not in BASELINES]
    results = {m.name: Result(workload.name, workload.n, m.name, m.quantity) for m in chosen}
    runners = _checked(task, chosen, results)
    times = interleaved(runners, rounds, seed)
    for name, seconds in times.items():
        results[name].times = seconds
    for result in results.values():
        if result.times:
            _set_ratios(result, times)
    return list(results.values())


def _checked(task: Task, methods: Sequence[Method], results: dict[str, Result]) -> dict[str, Runner]:
    """The runners of the methods that run and whose answer is right."""
    want = check.reference(task)
    runners = {}
    for method in methods:
        result = results[method.name]
        try:
            start = time.perf_counter()
            runner = method.prepare(task)
            got = _quietly(runner)
            result.first_call = time.perf_counter() - start
            if method.quantity is not None:
                _check(task, method, got, want, result)
        except Exception as err:  # whatever a peer raises is its answer, and the report's
            result.status, result.reason = "failed", _in_one_line(err)
        if result.status == "ok":
            runners[method.name] = runner
    return runners


def _check(task: Task, method: Method, got: list[Tensor], want: list[Tensor], result: Result) -> None:
    quantity = method.quantity
    assert quantity is not None
    found = check.errors(got, check.QUANTITIES[quantity](want), quantity)
    result.error = float(found.max())

    def in_float64() -> Tensor:
        exact = task.double()
        exact_want = check.QUANTITIES[quantity](check.reference(exact))
        return check.errors(_quietly(method.prepare(exact)), exact_want, quantity)

    if not check.is_right(found, quantity, in_float64):
        result.status, result.reason = "wrong", f"off by {result.error:.1e} of a gradient's norm"


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
    if not all(name in times for name in BASELINES):
        return
    plain, write = (times[name] for name in BASELINES)
    rows = list(zip(result.times, plain, write, strict=True))
    result.ratios["plain"] = median(t / p for t, p, _ in rows)
    result.ratios["limit"] = median(t / (p + w) for t, p, w in rows)
