"""What a reader sees of a report: the README's tables, `docs/benchmarks.md`, the pictures. `python -m bench.pages` makes them anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import plot, summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results.json"
# Between these two lines of the README.
BEGIN, END = "<!-- python -m bench.pages -->\n", "<!-- end -->\n"


def write(results: Path, root: Path = ROOT) -> None:
    """All pages and pictures from one JSON file."""
    found = json.loads(results.read_text())
    docs = root / "docs"
    docs.mkdir(exist_ok=True)
    plot.write(found, docs)
    (docs / "benchmarks.md").write_text(page(found))
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{summary.summary(found)}\n\n{END}{after}", encoding="utf-8")


def page(found: dict[str, Any]) -> str:
    """Every number worth reading."""
    lines = [
        "# Every method on every workload",
        "",
        "Relative to the plain batched gradient; in brackets the quartiles over the rounds. `bench/README.md` says what is measured.",
        "",
        summary.measured(found),
        "",
        summary.tables(found),
    ]
    if "fits" in found:
        lines += [summary.heading(summary.largest_title(found["fits"])), "", *summary.largest(found["fits"]), ""]
    for kind in ("n", "width"):
        results = found.get("sweeps", {}).get(kind, [])
        for workload in dict.fromkeys(r["workload"] for r in results):
            lines += [summary.heading(f"{workload}, by {kind}: time / peak memory"), ""]
            lines += [*summary.sweep([r for r in results if r["workload"] == workload], kind), ""]
    notes = [r for r in found["results"] if r["reason"] and r["status"] != "absent"]
    failures = dict.fromkeys(f"- {r['workload']}, {r['method']}: {r['reason']}" for r in notes)
    return "\n".join([*lines, *(["**What failed**", "", *failures, ""] if failures else [])])


if __name__ == "__main__":
    write(RESULTS)
