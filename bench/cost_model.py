"""How often the cost models pick the best algorithm: `python -m bench.cost_model`.

Every algorithm is forced in turn on a table of shapes, in interleaved rounds, after its answer has been compared with the others'.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median

import torch
from torch import Tensor

from bench.cost_model_ways import QUANTITIES, Choice
from bench.micro import assert_close

# What is this much slower than the pick on its first calls is not timed any further.
HOPELESS = 8
ROUND_SECONDS = 4e-3
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class Row:
    """The times of one choice, relative to the best way's."""

    name: str
    picked: str
    best: str
    loss: float  # of the pick
    to_plain: float  # the pick's time in units of the plain gradient's
    ways: dict[str, float]


def measure(choice: Choice, rounds: int, clock: Callable[[], float] = time.perf_counter) -> Row:
    """Check and time one choice."""
    answers = {name: way() for name, way in choice.ways.items()}
    for answer in answers.values():
        assert_close(answer, answers[choice.picked].double())
    del answers
    runs: dict[str, Callable[[], Tensor]] = {"(plain)": choice.plain, **choice.ways}
    first = {name: min(_timed(run, 1, clock) for _ in range(2)) for name, run in runs.items()}
    runs = {name: run for name, run in runs.items() if name == "(plain)" or first[name] <= HOPELESS * first[choice.picked]}
    repeats = {name: max(1, min(100, round(ROUND_SECONDS / max(first[name], 1e-6)))) for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(_timed(runs[name], repeats[name], clock))
    return _row(choice, times)


def _row(choice: Choice, times: dict[str, list[float]]) -> Row:
    """Ratios are taken within each round, where both sides met the same noise."""

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(times[one], times[other], strict=True))

    ways = {name: ratio(name, choice.picked) for name in times if name != "(plain)"}
    best = min(ways, key=ways.__getitem__)
    relative = {name: value / ways[best] for name, value in ways.items()}
    return Row(choice.name, choice.picked, best, relative[choice.picked], ratio(choice.picked, "(plain)"), relative)


def _timed(run: Callable[[], Tensor], repeats: int, clock: Callable[[], float]) -> float:
    """The seconds of one call, without giving the last result back."""
    start = clock()
    for _ in range(repeats):
        result = run()
    seconds = (clock() - start) / repeats
    del result
    return seconds


def summary(rows: Sequence[Row]) -> str:
    """The share of good picks, the worst one, and how the picks compare with the plain gradient."""
    losses = [row.loss for row in rows]
    good = sum(loss <= 1.1 for loss in losses) / len(losses)
    worst = max(rows, key=lambda row: row.loss)
    return (
        f"{len(rows)} shapes: within 10% of the best on {good:.0%}, worst {worst.loss:.2f} ({worst.name}), mean {_mean(losses):.3f}; "
        f"{_mean([row.to_plain for row in rows]):.2f} of the plain gradient's time in the mean"
    )


def _mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return exp(sum(map(log, ratios)) / len(ratios))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cost_model", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quantity", nargs="+", choices=list(QUANTITIES), default=list(QUANTITIES), metavar="NAME", help=", ".join(QUANTITIES))
    add("--shape", nargs="+", default=[""], metavar="TEXT", help="only shapes whose name contains one of these")
    add("--rounds", type=int, default=11, help="interleaved rounds of timing (default: %(default)s)")
    add("--threads", type=int, default=2, help="(default: %(default)s)")
    add("--clock", choices=list(CLOCKS), default="wall", help="cpu, with one thread: what it ran, whatever else the machine does")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for quantity in options.quantity:
        rows = []
        print(f"\n{quantity:32} pick         best         loss  /plain  every way, relative to the best")
        for choice in QUANTITIES[quantity]():
            if not any(text in choice.name for text in options.shape):
                continue
            row = measure(choice, options.rounds, CLOCKS[options.clock])
            rows.append(row)
            ways = "  ".join(f"{name} {value:.2f}" for name, value in sorted(row.ways.items(), key=lambda item: item[1]))
            print(f"{row.name:32} {row.picked:12} {row.best:12} {row.loss:4.2f}  {row.to_plain:6.2f}  {ways}", flush=True)
        if rows:
            print(summary(rows))


if __name__ == "__main__":
    main()
