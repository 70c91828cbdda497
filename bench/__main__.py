"""`python -m bench`: see the README beside this file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import overhead, report
from bench.measure import Result, run_workload
from bench.methods import METHODS
from bench.workloads import RESNET_TINY, WORKLOADS, Workload


def _parser() -> argparse.ArgumentParser:
    names = list(WORKLOADS)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time per-sample gradients.")
    add = parser.add_argument
    add("--workload", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--method", nargs="+", choices=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    add("--all", action="store_true", help="the optional methods too (loop, chunked, compiled)")
    add("--rounds", type=int, default=15, help="interleaved rounds of timing (default: %(default)s)")
    add("--samples", type=int, help="the batch size, instead of each workload's own")
    add("--threads", type=int, default=2, help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="every number, with machine and versions")
    add("--markdown", type=Path, metavar="FILE", help="the table")
    add("--overhead", action="store_true", help="what Python costs, for each op, instead of the table")
    add("--profile", action="store_true", help="the hottest Python functions, instead of the table")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    workloads = [WORKLOADS[name] for name in options.workload]
    if options.samples is not None:
        workloads = [replace(w, n=options.samples) for w in workloads]
    if options.overhead:
        overhead.print_overhead(options.rounds)
        workloads = [RESNET_TINY]
    if options.profile:
        for workload in workloads:
            overhead.profile(workload.build(), calls=20 if options.overhead else 3)
    elif not options.overhead:
        _table(workloads, options)


def _table(workloads: Sequence[Workload], options: argparse.Namespace) -> None:
    methods = [METHODS[name] for name in options.method or METHODS]
    if not options.method and not options.all:
        methods = [m for m in methods if not m.optional]
    print(report.title())
    print("limit: plain + write of the result; ratios are medians over the rounds")
    results: list[Result] = []
    for workload in workloads:
        found = run_workload(workload, methods, options.rounds)
        report.print_table(found)
        results += found
        # After each workload, so that an interrupted run leaves what it has.
        if options.json:
            report.write_json(options.json, results, {"rounds": options.rounds})
        if options.markdown:
            options.markdown.write_text(report.markdown(results))


if __name__ == "__main__":
    main()
