"""`python -m bench`: see the README beside this file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import overhead, report
from bench.measure import Result, run_workload
from bench.methods import METHODS, Method
from bench.workloads import RESNET_TINY, WORKLOADS, Workload

# The Gram matrix has no peer but those that form every gradient: only where asked for.
DEFAULT = ("gradients", "norms", "clipped")


def _parser() -> argparse.ArgumentParser:
    names = list(WORKLOADS)
    methods = list(dict.fromkeys(name for table in METHODS.values() for name in table))
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time per-sample gradients and what is made of them.")
    add = parser.add_argument
    add("--workload", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--quantity", nargs="+", choices=list(METHODS), default=DEFAULT, metavar="NAME", help=f"{', '.join(METHODS)}; not all by default")
    add("--method", nargs="+", choices=methods, metavar="NAME", help=", ".join(methods))
    add("--all", action="store_true", help="the optional methods too (loop, chunked, compiled)")
    add("--rounds", type=int, default=15, help="interleaved rounds of timing (default: %(default)s); 0: answers are checked only")
    add("--memory", action="store_true", help="the peak memory too, each method in a process of its own")
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
    tables = {quantity: _chosen(quantity, options) for quantity in options.quantity}
    print(report.title())
    print("limit: plain + write of the result; ratios are medians over the rounds")
    results: list[Result] = []
    for workload in workloads:
        found = run_workload(workload, tables, options.rounds, options.memory)
        report.print_table(found)
        results += found
        # After each workload, so that an interrupted run leaves what it has.
        if options.json:
            report.write_json(options.json, results, {"rounds": options.rounds})
        if options.markdown:
            options.markdown.write_text(report.markdown(results))


def _chosen(quantity: str, options: argparse.Namespace) -> list[Method]:
    table = METHODS[quantity]
    if options.method:
        return [table[name] for name in options.method if name in table]
    return [m for m in table.values() if options.all or not m.optional]


if __name__ == "__main__":
    main()
