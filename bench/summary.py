"""The tables of the README and of `docs/benchmarks.md`, from the JSON that a run wrote: `python -m bench.summary bench/results.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

Results = list[dict[str, Any]]
Cell = Callable[[dict[str, Any]], str]
# from the results of one workload to a cell
Column = Callable[[Results], str]

BASELINES = ("plain", "write")


def summary(found: dict[str, Any]) -> str:
    """For each quantity the best of the peers beside this library, relative to the plain batched gradient: time, then memory."""
    lines = []
    by_quantity = _by_quantity(found["results"])
    for title, ratio in (("time", "plain"), ("peak memory", "memory")):
        if any(ratio in r["ratios"] for r in found["results"] if r["method"] != "plain"):
            lines += [heading(title), "", *_beside_peers(by_quantity, ratio), ""]
    if found.get("fits"):
        lines += [heading(largest_title(found["fits"])), "", *largest(found["fits"]), ""]
    return "\n".join([*lines, measured(found)])


def measured(found: dict[str, Any]) -> str:
    """Where, when, and with what."""
    machine, versions = found["machine"], found["versions"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {versions['torch']}"
    peers = ", ".join(f"{name} {versions[name]}" for name in ("opacus", "backpack", "jax") if name in versions)
    return f"Measured on {found['date'][:10]}: {where}, {peers}, medians of {found['settings']['rounds']} interleaved rounds."


def tables(found: dict[str, Any]) -> str:
    """Every method, with the quartiles over the rounds; then how long the first calls of compiled methods take."""
    lines = []
    for quantity, results in _by_quantity(found["results"]).items():
        plain = {r["workload"]: r for r in results if r["method"] == "plain"}
        peers = [r for r in results if r["method"] != "plain"]
        compiled = [r for r in peers if r.get("compiled")]
        for title, rows, cell in (
            ("time", peers, lambda r, plain=plain: _spread(r, plain[r["workload"]])),
            ("peak memory", [r for r in peers if not r.get("compiled")], lambda r: _ratio(r, "memory")),
            ("first call, seconds", compiled, lambda r: f"{r['first_call']:.1f}"),
        ):
            table = _method_table(rows, cell)
            if table:
                lines += [heading(f"{quantity}: {title}"), "", *table, ""]
    return "\n".join(lines)


def sweep(results: Results, kind: str) -> list[str]:
    """One workload's growth with `kind`: times and memory, relative to plain."""
    results = [r for r in results if r["method"] not in BASELINES]
    columns = list(dict.fromkeys((r["quantity"], r["method"]) for r in results))
    cell = {(r[kind], r["quantity"], r["method"]): f"{_ratio(r, 'plain')} / {_ratio(r, 'memory')}" for r in results}
    rows = [[str(size), *(cell.get((size, *column), "-") for column in columns)] for size in dict.fromkeys(r[kind] for r in results)]
    return _markdown([kind, *(f"{quantity} {method}" for quantity, method in columns)], rows)


def largest_title(fits: dict[str, Any]) -> str:
    """With the limit."""
    first = fits["largest"][0]
    return f"{first['quantity']}: the largest batch in {first['limit'] / 2**30:g} GiB"


def largest(fits: dict[str, Any]) -> list[str]:
    """The largest batch that fits: a row for each workload, a column for each method."""
    found = fits["largest"]
    cell = {(f["workload"], f["method"]): "failed" if f["n"] is None else str(f["n"]) for f in found}
    methods = list(dict.fromkeys(f["method"] for f in found))
    workloads = dict.fromkeys(f["workload"] for f in found)
    return _markdown(["workload", *methods], [[w, *(cell.get((w, m), "-") for m in methods)] for w in workloads])


def _by_quantity(results: Results) -> dict[str, Results]:
    return {q: [r for r in results if r["quantity"] == q] for q in dict.fromkeys(r["quantity"] for r in results)}


def heading(title: str) -> str:
    return f"**{title[0].upper()}{title[1:]}**"


def _beside_peers(by_quantity: dict[str, Results], ratio: str) -> list[str]:
    columns: dict[str, Column] = {}
    for quantity in by_quantity:

        def within(column: Column, quantity: str = quantity) -> Column:
            return lambda rows: column([r for r in rows if r["quantity"] == quantity])

        columns |= {
            f"{quantity}: best peer": within(lambda rows: _best([r for r in rows if _is_peer(r)], ratio)),
            f"{quantity}: ours": within(_of("ours", ratio)),
        }
    return _columns([r for results in by_quantity.values() for r in results], columns)


def _columns(results: Results, columns: dict[str, Column]) -> list[str]:
    """A row for each workload; a column that is empty everywhere is left out."""
    titles = _workloads(results)
    rows = {w: [r for r in results if (r["workload"], r["n"]) == w] for w in titles}
    cells = {name: [column(rows[w]) for w in titles] for name, column in columns.items()}
    cells = {name: column for name, column in cells.items() if set(column) != {"-"}}
    return _markdown(["workload (N)", *cells], [list(row) for row in zip(titles.values(), *cells.values(), strict=True)])


def _of(method: str, ratio: str) -> Column:
    return lambda rows: next((_ratio(r, ratio) for r in rows if r["method"] == method), "-")


def _is_peer(result: dict[str, Any]) -> bool:
    return not result["method"].startswith("ours") and result["method"] not in BASELINES and not result.get("compiled", False)


def _best(results: Results, ratio: str) -> str:
    """The smallest, and whose it is."""
    known = [r for r in results if r["status"] == "ok" and ratio in r["ratios"]]
    if known:
        first = min(known, key=lambda r: r["ratios"][ratio])
        return f"{_ratio(first, ratio)} {first['method']}"
    return "failed" if any(r["status"] in ("failed", "wrong") for r in results) else "-"


def _method_table(results: Results, cell: Cell) -> list[str]:
    # A method that has no number anywhere has no column, unless it fails everywhere.
    cells = {(r["workload"], r["n"], r["method"]): cell(r) if r["status"] == "ok" else _status(r) for r in results}
    methods = [m for m in dict.fromkeys(r["method"] for r in results) if {c for (_, _, name), c in cells.items() if name == m} != {"-"}]
    if set(cells.values()) <= {"-", "failed", "wrong"}:
        return []
    return _markdown(
        ["workload (N)", *methods], [[title, *(cells.get((*w, m), "-") for m in methods)] for w, title in _workloads(results).items()]
    )


def _workloads(results: Results) -> dict[tuple[str, int], str]:
    return {(r["workload"], r["n"]): f"{r['workload']} ({r['n']})" for r in results}


def _ratio(result: dict[str, Any], ratio: str) -> str:
    if result["status"] != "ok":
        return _status(result)
    return f"{result['ratios'][ratio]:.2f}" if ratio in result["ratios"] else "-"


def _status(result: dict[str, Any]) -> str:
    return "-" if result["status"] == "absent" else str(result["status"])


def _spread(result: dict[str, Any], plain: dict[str, Any]) -> str:
    """The median of the ratios in each round, and their quartiles."""
    times = result.get("times", [])
    if len(times) < 2:
        return _ratio(result, "plain")
    ratios = [t / p for t, p in zip(times, plain["times"], strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return f"{_ratio(result, 'plain')} ({low:.2f}-{high:.2f})"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())))
