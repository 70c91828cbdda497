"""`python -m bench`: see the README beside this file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import overhead, pages, report, sweep
from bench.measure import Result, run_workload
from bench.methods import METHODS, Method
from bench.workloads import RESNET_TINY, WORKLOADS, Workload

# The Gram matrix has no peer but those that form every gradient: only where asked for.
DEFAULT = ("gradients", "norms", "clipped")
# What the report shows the growth of, and the largest batch.
IN_SWEEPS = ("mlp", "convnet", "gpt")
IN_FITS = ("mlp", "convnet", "gpt")


def _parser() -> argparse.ArgumentParser:
    names = list(WORKLOADS)
    methods = list(dict.fromkeys(name for table in METHODS.values() for name in table))
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time per-sample gradients and what is made of them.")
    add = parser.add_argument
    add("--workload", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--quantity", nargs="+", choices=list(METHODS), default=DEFAULT, metavar="NAME", help=f"{', '.join(METHODS)}; not all by default")
    add("--method", nargs="+", choices=methods, metavar="NAME", help=", ".join(methods))
    add("--compiled", action="store_true", help="the compiled methods too (JAX among them), and how long their first calls take")
    add("--all", action="store_true", help="every method: the compiled ones, the loop, chunks")
    add("--rounds", type=int, default=15, help="interleaved rounds of timing (default: %(default)s); 0: answers are checked only")
    add("--memory", action="store_true", help="the peak memory too, each method in a process of its own")
    add("--samples", type=int, help="the batch size, instead of each workload's own")
    add("--threads", type=int, default=2, help="(default: %(default)s)")
    add(
        "--sweep",
        nargs="+",
        choices=list(sweep.FACTORS),
        metavar="KIND",
        help="growth with the batch (n) or the width, instead of the table",
    )
    add("--until", type=float, metavar="GIB", help="the largest batch that fits in so much memory, instead of the table")
    add("--json", type=Path, metavar="FILE", help="every number, with machine and versions")
    add("--markdown", type=Path, metavar="FILE", help="the table")
    add("--report", action="store_true", help="all of it, with memory and compiled methods: JSON, Markdown and plots, those of the README")
    add("--overhead", action="store_true", help="what Python costs, for each op, instead of the table")
    add("--profile", action="store_true", help="the hottest Python functions, instead of the table")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    # What a run before this one has compiled would make the first call of a compiled method look cheap.
    torch.compiler.config.force_disable_caches = True
    workloads = [WORKLOADS[name] for name in options.workload]
    if options.samples is not None:
        workloads = [replace(w, n=options.samples) for w in workloads]
    if options.overhead:
        overhead.print_overhead(options.rounds)
        workloads = [RESNET_TINY]
    if options.profile:
        for workload in workloads:
            overhead.profile(workload.build(), calls=20 if options.overhead else 3)
    elif options.report:
        _report(workloads, options)
    elif options.sweep:
        _sweep(workloads, options)
    elif options.until:
        _fits(workloads, options)
    elif not options.overhead:
        _table(workloads, options)


def _report(workloads: Sequence[Workload], options: argparse.Namespace) -> None:
    options.json = options.json or pages.RESULTS
    options.compiled = options.memory = True
    _table(workloads, options)
    options.sweep = list(sweep.FACTORS)
    _sweep([w for w in workloads if w.name in IN_SWEEPS], options)
    options.quantity, options.until = ["clipped"], options.until or 8
    _fits([w for w in workloads if w.name in IN_FITS], options)
    pages.write(options.json)


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
            report.write_json(options.json, {"results": [report.as_json(r) for r in results]}, {"rounds": options.rounds})
        if options.markdown:
            options.markdown.write_text(report.markdown(results))


def _sweep(workloads: Sequence[Workload], options: argparse.Namespace) -> None:
    tables = {q: _chosen(q, options, sweep.IN_SWEEPS) for q in options.quantity}
    for kind in options.sweep:
        results: list[Result] = []
        for workload in workloads:
            for found in sweep.sweep(workload, kind, tables, options.rounds, options.memory):
                report.print_table(found)
                results += found
                if options.json:
                    report.write_json(options.json, {kind: [report.as_json(r) for r in results]}, {"rounds": options.rounds}, "sweeps")


def _fits(workloads: Sequence[Workload], options: argparse.Namespace) -> None:
    tables = {q: _chosen(q, options) for q in options.quantity}
    found: list[sweep.Fit] = []
    for workload in workloads:
        for fit in sweep.fits(workload, tables, int(options.until * 2**30)):
            print(f"{fit.workload} {fit.quantity} {fit.method}: {fit.n or fit.reason} samples in {options.until:g} GiB")
            found.append(fit)
            if options.json:
                report.write_json(options.json, {"largest": [asdict(f) for f in found]}, {}, "fits")


def _chosen(quantity: str, options: argparse.Namespace, default: Sequence[str] = ()) -> list[Method]:
    table = METHODS[quantity]
    names = options.method or default
    if names:
        return [table[name] for name in names if name in table]
    return [m for m in table.values() if options.all or not m.optional or (options.compiled and m.compiled)]


if __name__ == "__main__":
    main()
