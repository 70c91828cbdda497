"""The table of the README, from the JSON that a run wrote: `python -m bench.summary bench/results.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def summary(found: dict[str, Any]) -> str:
    """One row for each workload, one column for each method: time relative to the plain batched gradient."""
    results = [r for r in found["results"] if r["method"] not in ("plain",)]
    methods = list(dict.fromkeys(r["method"] for r in results))
    workloads = list(dict.fromkeys((r["workload"], r["n"]) for r in results))
    cell = {(r["workload"], r["method"]): f"{r['ratios']['plain']:.2f}" if r["status"] == "ok" else r["status"] for r in results}
    lines = ["| workload (N) | " + " | ".join(methods) + " |", "| --- |" + " ---: |" * len(methods)]
    lines += [f"| {name} ({n}) | " + " | ".join(cell.get((name, m), "-") for m in methods) + " |" for name, n in workloads]
    machine, versions = found["machine"], found["versions"]
    rounds = found["settings"]["rounds"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {versions['torch']}"
    lines += ["", f"Measured on {found['date'][:10]}: {where}, opacus {versions['opacus']}, medians of {rounds} interleaved rounds."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())))
