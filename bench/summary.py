"""The tables of the README, from the JSON that a run wrote: `python -m bench.summary bench/results.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TITLES = {"plain": "time", "memory": "peak memory"}


def summary(found: dict[str, Any]) -> str:
    """For each quantity a row for each workload, a column for each method: time, then memory, relative to the plain batched gradient."""
    tables = {}
    for quantity in dict.fromkeys(r["quantity"] for r in found["results"]):
        results = [r for r in found["results"] if r["quantity"] == quantity and r["method"] != "plain"]
        for ratio, title in TITLES.items():
            if any(ratio in r["ratios"] for r in results):
                tables[f"{quantity}: {title}"] = _table(results, ratio)
    lines = []
    for title, table in tables.items():
        if len(tables) > 1:
            lines += [f"**{title[0].upper()}{title[1:]}**", ""]
        lines += [*table, ""]
    machine, versions = found["machine"], found["versions"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {versions['torch']}"
    peers = ", ".join(f"{name} {versions[name]}" for name in ("opacus", "backpack") if name in versions)
    lines += [f"Measured on {found['date'][:10]}: {where}, {peers}, medians of {found['settings']['rounds']} interleaved rounds."]
    return "\n".join(lines)


def _table(results: list[dict[str, Any]], ratio: str) -> list[str]:
    # A method that was not asked for the number has no column; one that fails everywhere has.
    methods = [m for m in dict.fromkeys(r["method"] for r in results) if _has_column([r for r in results if r["method"] == m], ratio)]
    workloads = list(dict.fromkeys((r["workload"], r["n"]) for r in results))
    cell = {(r["workload"], r["method"]): _cell(r, ratio) for r in results}
    lines = ["| workload (N) | " + " | ".join(methods) + " |", "| --- |" + " ---: |" * len(methods)]
    return lines + [f"| {name} ({n}) | " + " | ".join(cell.get((name, m), "-") for m in methods) + " |" for name, n in workloads]


def _has_column(results: list[dict[str, Any]], ratio: str) -> bool:
    return any(ratio in r["ratios"] for r in results) or all(r["status"] != "ok" for r in results)


def _cell(result: dict[str, Any], ratio: str) -> str:
    if result["status"] != "ok":
        return str(result["status"])
    return f"{result['ratios'][ratio]:.2f}" if ratio in result["ratios"] else "-"


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())))
