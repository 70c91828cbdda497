"""An explanation as text, for rich, and as HTML."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from per_sample._explanation.report import Explanation, Parameter, Question

_MEANING = {
    "rule": "a rule of the table, for the whole batch at once",
    "pointwise": "runs as it is on the whole batch",
    "shared": "no argument differs between samples: runs once",
    "fallback": "no rule: torch.vmap runs the op for the whole batch",
    "loop": "no rule, here or in torch.vmap: one call a sample",
}
_ASKED = {
    "materialize": "gradients",
    "formed": "gradients",
    "sq_norm": "norms",
    "norm": "norms",
    "settled": "norms",
    "sq_condition": "rounding",
    "weighted_sum": "weighted sum",
    "square_sum": "sum of squares",
    "moments": "mean and variance",
    "dot": "inner products",
    "gram": "Gram matrix",
    "project": "projections",
}
_RESTARTS = {
    "copies": "writes into its arguments",
    "expands": "writes into tensors that it made",
    "functions": "control flow, indices or packed sequences that differ between samples",
    "accumulates": "a reentrant checkpoint",
    "after": "gradients are read or written while they are made",
    "": "a tensor from outside requires grad",
}
# What is shown of ops on fast routes: the rest is one line.
_SHOWN = 0.002
# A parameter with less of all gradients than this is small, and where there are more than a few, small ones are one line.
_SMALL, _FEW = 0.01, 8
# Of lines of advice.
_WIDTH = 120


@dataclass(frozen=True)
class Table:
    """Rows of cells; the last columns, from number ``right`` on, are numbers."""

    title: str
    columns: tuple[str, ...]
    right: int
    rows: Sequence[tuple[str, ...]]
    shares: list[float]


def size(count: float, unit: str = "B") -> str:
    """A number of bytes, or of something else, for people."""
    prefixes = ["", "k", "M", "G", "T"]
    while count >= 1000 and len(prefixes) > 1:
        count /= 1000
        prefixes.pop(0)
    prefix = prefixes[0]
    return f"{count:.0f} {prefix}{unit}" if count >= 100 or not prefix else f"{count:.1f} {prefix}{unit}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def head(report: Explanation) -> str:
    """The line above all tables."""
    ops = sum(op.count for op in report.ops)
    found = f"{report.n} samples in {report.runs} run(s), {ops} ops, {1e3 * report.seconds:.2f} ms"
    if report.run.splits:
        found += f"; samples of different values ran apart ({', '.join(sorted({op or 'the function itself' for op in report.run.splits}))})"
    reasons = [_RESTARTS.get(need, need) for restart in report.run.restarts for need in restart or ("",)]
    if reasons:
        found += f"; begun again {len(report.run.restarts)} time(s): {', '.join(sorted(set(reasons)))}"
    return found


def advice(report: Explanation) -> list[str]:
    """The lines of advice."""
    return [f"{item.text} ({_percent(item.share)} of the time)" if 0 < item.share < 1 else item.text for item in report.advice]


def notes(report: Explanation) -> list[str]:
    """What the routes mean."""
    return [f"{route}: {_MEANING[route]}" for route in _MEANING if route in report.routes()]


def tables(report: Explanation) -> list[Table]:
    """The parameters and the ops."""
    return [_parameters(report.parameters), _ops(report)]


def _parameters(parameters: Sequence[Parameter]) -> Table:
    columns = ("parameter", "shape", "held as", "asked", "way", "held", "formed", "multiply-adds", "scratch", "next best", "ms", "share")
    rows: list[tuple[str, ...]] = []
    shares = []
    whole = sum(p.formed_bytes for p in parameters)
    small = [p for p in parameters if p.formed_bytes < _SMALL * whole and sum(q.share for q in p.questions) < _SHOWN]
    # Few are worth their lines even if they are small.
    small = small if len(parameters) > _FEW else []
    for p in parameters:
        if p in small:
            continue
        own = (p.name, "x".join(map(str, p.shape)) or "()", p.form)
        sizes = (size(p.held_bytes), size(p.formed_bytes))
        for q in p.questions:
            rows.append((*own, _ASKED[q.question], q.way, *sizes, *_costs(q), _ms(q.seconds), _percent(q.share)))
            shares.append(q.share)
            own, sizes = ("", "", ""), ("", "")
        if not p.questions:
            rows.append((*own, "", "", *sizes, *("",) * 5))
            shares.append(0.0)
    if small:
        held, formed = (size(sum(getattr(p, name) for p in small)) for name in ("held_bytes", "formed_bytes"))
        seconds, share = sum(p.seconds for p in small), sum(q.share for p in small for q in p.questions)
        rows.append(
            (
                f"{len(small)} small {'one' if len(small) == 1 else 'ones'}",
                "",
                "",
                "",
                "",
                held,
                formed,
                "",
                "",
                "",
                _ms(seconds),
                _percent(share),
            )
        )
        shares.append(share)
    return Table("Parameters", columns, 5, rows, shares)


def _costs(question: Question) -> tuple[str, str, str]:
    """What the chosen way costs, and the best of the others in its terms."""
    chosen = question.ways.get(question.way)
    if chosen is None:
        return "", "", ""
    others = {name: way.multiply_adds for name, way in question.ways.items() if name != question.way}
    best = min(others, key=others.__getitem__, default="")
    times = question.saves
    other = f"{best} {times:.3g}x" if best and times is not None and times != float("inf") else ""
    return size(chosen.multiply_adds, ""), size(chosen.scratch_bytes), other


def _ops(report: Explanation) -> Table:
    shown = [op for op in report.ops if op.share >= _SHOWN or op.route in ("fallback", "loop")]
    small = [op for op in report.ops if op not in shown]
    rows = [(op.op, op.route, str(op.count), _ms(op.seconds), _percent(op.share)) for op in shown]
    shares = [op.share for op in shown]
    rest = [(f"{len(small)} more", sum(op.count for op in small), sum(op.seconds for op in small))] if small else []
    rest += [(name, 0, seconds) for name, seconds in _elsewhere(report) if seconds > 0]
    for name, count, seconds in rest:
        share = seconds / (report.seconds or 1.0)
        rows.append((name, "", str(count or ""), _ms(seconds), _percent(share)))
        shares.append(share)
    return Table("Ops", ("op", "route", "count", "ms", "share"), 2, rows, shares)


def _elsewhere(report: Explanation) -> list[tuple[str, float]]:
    """Where the rest of the time went."""
    parameters = sum(parameter.seconds for parameter in report.parameters)
    known = [
        ("(the parameters' gradients, see above)", parameters),
        ("(the transform's own code)", report.run.quantity_seconds),
        ("(runs that began again)", report.run.lost_seconds),
    ]
    left = report.seconds - sum(op.seconds for op in report.ops) - sum(seconds for _, seconds in known)
    return [*known, ("(between the ops, and small parameters together)", max(0.0, left))]


def text(report: Explanation) -> str:
    """For a terminal."""
    parts = [head(report)]
    if report.advice:
        lines = [textwrap.fill(line, _WIDTH, initial_indent="  - ", subsequent_indent="    ") for line in advice(report)]
        parts.append("\n".join(["Advice", *lines]))
    parts += [_text_table(table) for table in tables(report)]
    return "\n\n".join([*parts, "\n".join(notes(report))])


def _text_table(table: Table) -> str:
    used = [i for i in range(len(table.columns)) if any(row[i] for row in table.rows)]
    cells = [table.columns, *table.rows]
    widths = {i: max(len(row[i]) for row in cells) for i in used}
    lines = ["  ".join(row[i].ljust(widths[i]) if i < table.right else row[i].rjust(widths[i]) for i in used).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * widths[i] for i in used))
    return "\n".join([table.title, *lines])


def rich_group(report: Explanation) -> Any:
    """For rich, which asks for it."""
    from rich.console import Group
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table as RichTable

    parts: list[Any] = [f"[bold]{escape(head(report))}[/bold]"]
    if report.advice:
        parts.append(
            Panel("\n".join(f"{i}. {escape(line)}" for i, line in enumerate(advice(report), 1)), title="Advice", title_align="left")
        )
    for table in tables(report):
        used = [i for i in range(len(table.columns)) if any(row[i] for row in table.rows)]
        shown = RichTable(title=table.title, title_justify="left", header_style="bold")
        for i in used:
            shown.add_column(table.columns[i], justify="left" if i < table.right else "right", overflow="fold")
        for row, share in zip(table.rows, table.shares, strict=True):
            style = "red" if {"fallback", "loop"} & set(row) else "bold" if share >= 0.1 else ""
            shown.add_row(*(escape(row[i]) for i in used), style=style)
        parts.append(shown)
    return Group(*parts, *(f"[dim]{escape(note)}[/dim]" for note in notes(report)))


# No colours of text or background but translucent ones: it reads on light and dark pages.
_LINE, _BAR = "border-bottom:1px solid rgba(128,128,128,.35)", "rgba(64,128,255,.28)"


def fragment(report: Explanation) -> str:
    """For a notebook."""
    out = ['<div class="per-sample-explanation" style="font-size:90%">', f"<p><strong>{html.escape(head(report))}</strong></p>"]
    if report.advice:
        out.append("<ol>" + "".join(f"<li>{html.escape(line)}</li>" for line in advice(report)) + "</ol>")
    out += [_html_table(table) for table in tables(report)]
    out.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes(report)) + "</ul></div>")
    return "".join(out)


def _html_table(table: Table) -> str:
    used = [i for i in range(len(table.columns)) if any(row[i] for row in table.rows)]

    def line(row: Sequence[str], tag: str, last: str = "") -> str:
        cells = []
        for i in used:
            align = "left" if i < table.right else "right"
            style = f"text-align:{align};padding:2px 8px;{_LINE}" + (last if i == used[-1] else "")
            cells.append(f'<{tag} style="{style}">{html.escape(row[i])}</{tag}>')
        return "<tr>" + "".join(cells) + "</tr>"

    body = []
    for row, share in zip(table.rows, table.shares, strict=True):
        width = f"{100 * max(0.0, min(1.0, share)):.1f}%"
        body.append(line(row, "td", f";background:linear-gradient(to left,{_BAR} {width},transparent {width})"))
    caption = f'<caption style="text-align:left;font-weight:bold">{html.escape(table.title)}</caption>'
    return (
        f'<table style="border-collapse:collapse">{caption}<thead>{line(table.columns, "th")}</thead><tbody>{"".join(body)}</tbody></table>'
    )


def page(report: Explanation) -> str:
    """A page of its own."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        "<title>per_sample: explanation</title><style>body{font-family:system-ui,sans-serif;margin:2rem}table{margin:1rem 0}"
        f"caption{{margin-bottom:.3rem}}</style></head><body>{fragment(report)}</body></html>\n"
    )
