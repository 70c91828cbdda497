"""The pictures of a report: `python -m bench.plot bench/results.json --out docs`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # after the choice of backend
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# For each method a colour that stands out from white and from nearly black, and a marker; those compiled are hollow.
STYLES = {
    "ours": ("#e4572e", "o"),
    "ours-low": ("#e4572e", "v"),
    "ours-compiled": ("#e4572e", "o"),
    "vmap": ("#3f8fd2", "s"),
    "vmap-compiled": ("#3f8fd2", "s"),
    "jax": ("#8a6fd1", "D"),
    "expanded-weights": ("#2fa37c", "^"),
    "opacus-hooks": ("#b58b1b", "P"),
    "opacus-functorch": ("#b58b1b", "X"),
    "opacus-ghost": ("#b58b1b", "d"),
    "backpack": ("#c65aa0", "<"),
    "book-keeping": ("#6f7f8f", ">"),
}
HOLLOW = ("ours-compiled", "vmap-compiled", "jax")
THEMES = {"": ("white", "#24292f", "#d8dee4"), "-dark": ("#0d1117", "#d1d7e0", "#30363d")}
QUANTITIES = {"gradients": "every sample's gradient", "norms": "their norms", "clipped": "their clipped sum"}
# The ends of the axis of ratios.
LEAST, MOST = 0.3, 20
# label, style, points
Curve = tuple[str, dict[str, Any], list[tuple[float, float]]]
LINES = {"gradients": "-", "norms": "--", "clipped": ":"}


def write(found: dict[str, Any], folder: Path) -> None:
    """`benchmarks.png` and, of a run with sweeps, `sweeps.png`, each for light and for dark pages."""
    for suffix, (background, ink, grid) in THEMES.items():
        colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        colours |= {"figure.facecolor": background, "axes.facecolor": background, "axes.edgecolor": grid, "grid.color": grid}
        with plt.rc_context({"font.size": 9, **colours}):
            _save(_ratios(found["results"], ink), folder / f"benchmarks{suffix}.png")
            if any(found.get("sweeps", {}).get(kind) for kind in ("n", "width")):
                _save(_sweeps(found["sweeps"], ink), folder / f"sweeps{suffix}.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _ratios(results: list[dict[str, Any]], ink: str) -> Any:
    """A row for each workload, a panel for each quantity, a mark for each method."""
    workloads = list(dict.fromkeys((r["workload"], r["n"]) for r in results))
    figure, panels = plt.subplots(1, 3, figsize=(8, 1.4 + 0.42 * len(workloads)), sharey=True, layout="constrained")
    for axes, (quantity, title) in zip(panels, QUANTITIES.items(), strict=True):
        known = [r for r in results if r["quantity"] == quantity and r["status"] == "ok" and "plain" in r["ratios"]]
        axes.set_title(title, fontsize=10)
        _marks(axes, known, workloads, {r["method"] for r in results})
        axes.axvline(1, color=ink, linewidth=1)
        axes.set(xscale="log", xlim=(LEAST * 0.9, MOST * 1.15))
        _plain_ticks(axes.xaxis)
        axes.set_xticks([0.5, 1, 2, 4, 8, MOST])
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].set(yticks=range(len(workloads)), ylim=(len(workloads) - 0.5, -0.5))
    panels[0].set_yticklabels([f"{name} ({n})" for name, n in workloads])
    panels[1].set_xlabel(
        f"time relative to the plain batched gradient: left is better; at the right edge: {MOST} or more; hollow: compiled"
    )
    _legend(figure, panels[0], 6)
    return figure


def _marks(axes: Axes, known: Sequence[dict[str, Any]], workloads: list[tuple[str, int]], methods: set[str]) -> None:
    """Ours in the middle of a row; the others above or below it, so that equals do not hide each other."""
    for row in range(0, len(workloads), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#808080", alpha=0.08, linewidth=0)
    for number, name in enumerate(name for name in STYLES if name in methods):
        shift = 0.0 if name.startswith("ours") else (number % 5 - 2) * 0.14
        found = [r for r in known if r["method"] == name]
        x = [min(max(r["ratios"]["plain"], LEAST), MOST) for r in found]
        y = [workloads.index((r["workload"], r["n"])) + shift for r in found]
        axes.plot(x, y, **_mark(name), linestyle="none", label=name)


def _mark(name: str) -> dict[str, Any]:
    colour, marker = STYLES[name]
    ours = name.startswith("ours")
    face = "none" if name in HOLLOW else colour
    return {"marker": marker, "color": colour, "markerfacecolor": face, "markersize": 7 if ours else 4.5, "zorder": 3 if ours else 2}


def _sweeps(sweeps: dict[str, Any], ink: str) -> Any:
    """Time and memory, by batch and by width, a column for each workload."""
    pairs = [(kind, unit) for unit in ("time", "memory") for kind in ("n", "width")]
    rows = [(kind, unit) for kind, unit in pairs if any(_value(r, unit) is not None for r in sweeps.get(kind, ()))]
    workloads = list(dict.fromkeys(r["workload"] for kind, _ in rows for r in sweeps[kind]))
    shape = len(rows), len(workloads)
    figure, panels = plt.subplots(*shape, figsize=(8, 0.8 + 1.9 * len(rows)), squeeze=False, layout="constrained")
    for (kind, unit), line in zip(rows, panels, strict=True):
        for axes, workload in zip(line, workloads, strict=True):
            for label, style, points in _curves([r for r in sweeps[kind] if r["workload"] == workload], kind, unit, ink):
                axes.plot(*zip(*points, strict=True), label=label, marker=".", **style)
            axes.set(xscale="log", yscale="log", xlabel="batch" if kind == "n" else kind)
            axes.set_xticks(sorted({r[kind] for r in sweeps[kind] if r["workload"] == workload}))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            for axis in (axes.xaxis, axes.yaxis):
                _plain_ticks(axis)
            axes.grid(linewidth=0.6)
        line[0].set_ylabel("time, ms" if unit == "time" else "peak memory, MiB")
    for axes, workload in zip(panels[0], workloads, strict=True):
        axes.set_title(workload, fontsize=10)
    _legend(figure, panels[0, 0], 4)
    return figure


def _curves(results: Sequence[dict[str, Any]], kind: str, unit: str, ink: str) -> Iterator[Curve]:
    """Plain once, each other method for each quantity."""
    for quantity, method in dict.fromkeys((r["quantity"], r["method"]) for r in results):
        chosen = [r for r in results if (r["quantity"], r["method"]) == (quantity, method) and r["status"] == "ok"]
        points = [(r[kind], value) for r in chosen if (value := _value(r, unit)) is not None]
        if not points or method == "write" or (method == "plain" and quantity != results[0]["quantity"]):
            continue
        colour = ink if method == "plain" else STYLES[method][0]
        label = method if method == "plain" else f"{method}: {quantity}"
        yield label, {"color": colour, "linestyle": LINES.get(quantity, "-"), "linewidth": 1.3}, points


def _value(result: dict[str, Any], unit: str) -> float | None:
    if unit == "time":
        return result["median"] * 1e3 if result.get("times") else None
    return result["memory"] / 2**20 if result["memory"] else None


def _plain_ticks(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _legend(figure: Any, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handletextpad=0.3, columnspacing=1.2
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description="Draw the pictures of a report.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="FOLDER")
    options = parser.parse_args()
    write(json.loads(options.results.read_text()), options.out)
