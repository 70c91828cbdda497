"""What was measured, as a table in the terminal, as Markdown, as JSON."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import check
from bench.measure import Result

HEADER = ("workload", "n", "quantity", "method", "median ms", "IQR ms", "x plain", "x limit", "MiB", "x memory", "note")
# Where a package is installed by another name.
DISTRIBUTIONS = {"backpack": "backpack-for-pytorch"}
NUMERIC = (1, 4, 5, 6, 7, 8, 9)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def versions() -> dict[str, str]:
    """Of Python and of each package that takes part."""
    found = {"python": platform.python_version()}
    for package in ("torch", "per_sample", "opacus", "backpack", "jax"):
        try:
            found[package] = importlib.metadata.version(DISTRIBUTIONS.get(package, package))
        except importlib.metadata.PackageNotFoundError:
            found[package] = "source tree" if importlib.util.find_spec(package) else "not installed"
    return found


def title() -> str:
    """One line for the head of a table."""
    place, found = machine(), versions()
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"{place['cpu']}, {place['cores']} cores, {place['threads']} threads; {packages}"


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table's cells, one row for each result."""
    table = []
    for r in results:
        times = [_milliseconds(r.median), _milliseconds(r.iqr)] if r.times else ["-", "-"]
        memory = "-" if r.memory is None else f"{r.memory / 2**20:.1f}"
        plain, limit, weight = (f"{r.ratios[name]:.2f}" if name in r.ratios else "-" for name in ("plain", "limit", "memory"))
        note = f"{r.status}: {r.reason}" if r.reason else ""
        table.append((r.workload, str(r.n), r.quantity, r.method, *times, plain, limit, memory, weight, note))
    return table


def _milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.3f}"


def print_table(results: Sequence[Result]) -> None:
    """By rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(results))
        return
    table = Table(show_edge=False)
    for i, name in enumerate(HEADER[:-1]):
        table.add_column(name, justify="right" if i in NUMERIC else "left", no_wrap=True)
    for row in rows(results):
        table.add_row(*row[:-1], style="bold" if row[3].startswith("ours") else None)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    # Below the table: the reasons are longer than a column is wide.
    for r in results:
        if r.reason:
            console.print(f"{r.quantity} {r.method} {r.status}: {r.reason}", markup=False, highlight=False)


def plain(results: Sequence[Result]) -> str:
    """The table in columns of equal width."""
    cells = [HEADER, *rows(results)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def markdown(results: Sequence[Result]) -> str:
    """The table for a README, with machine, versions and date."""
    lines = [f"{title()}; {datetime.now(UTC).date()}", "", _markdown_row(HEADER), _markdown_row(["---"] * len(HEADER))]
    lines += [_markdown_row(row) for row in rows(results)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_json(path: Path, content: dict[str, Any], settings: dict[str, Any], part: str | None = None) -> None:
    """Everything, each round's time included, so that other statistics can be had later.

    What else the file holds stays: the table is at its top, each other part under its name, with its own machine and date.
    """
    found = json.loads(path.read_text()) if path.exists() else {}
    section = found if part is None else found.setdefault(part, {})
    section |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": {**settings, "tolerance": check.TOLERANCE},
        **content,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def as_json(r: Result) -> dict[str, Any]:
    """One result, with its statistics."""
    statistics = {"median": r.median, "iqr": r.iqr} if r.times else {}
    return {**asdict(r), **statistics}
