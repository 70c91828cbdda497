"""``explain``: which op took which route, how often, and how long it took."""

from __future__ import annotations

import html
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optree
from torch import Tensor

from per_sample import _arguments
from per_sample._batches import outcomes
from per_sample._packed import opened
from per_sample._record import Recorder, Row
from per_sample._run import Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._arguments import Argnums, Arguments
    from per_sample._factors import Factor

_MEANING = {
    "rule": "a rule of the table, for the whole batch at once",
    "pointwise": "runs as it is on the whole batch",
    "shared": "no argument differs between samples: runs once",
    "fallback": "no rule: torch.vmap runs the op for the whole batch; `per_sample.rule` can make it faster",
    "loop": "no rule, here or in torch.vmap: one call a sample; register a rule with `per_sample.rule`",
}
_COLUMNS = ("op", "route", "count", "ms", "share")


@dataclass(frozen=True)
class Explanation:
    """The ops of one run, slowest first, and the form each parameter's gradient took."""

    rows: tuple[Row, ...]
    factors: dict[str, str]
    seconds: float
    n: int
    # More than one where samples of different values had to run apart.
    runs: int = 1

    def routes(self) -> dict[str, int]:
        """How many ops took each route."""
        out: dict[str, int] = {}
        for row in self.rows:
            out[row.route] = out.get(row.route, 0) + row.count
        return out

    def _cells(self) -> list[tuple[str, ...]]:
        total = sum(row.seconds for row in self.rows) or 1.0
        return [(row.op, row.route, str(row.count), f"{1e3 * row.seconds:.3f}", f"{100 * row.seconds / total:.1f}%") for row in self.rows]

    def _notes(self) -> list[str]:
        return [f"{route}: {_MEANING[route]}" for route in _MEANING if route in self.routes()]

    def __str__(self) -> str:
        cells = [_COLUMNS, *self._cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
        lines = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
        lines.insert(1, "  ".join("-" * w for w in widths))
        ops = sum(row.count for row in self.rows)
        held = ", ".join(f"{count} {kind}" for kind, count in Counter(self.factors.values()).items())
        head = f"{self.n} samples in {self.runs} run(s), {ops} ops, {1e3 * self.seconds:.2f} ms; gradients: {held}"
        return "\n".join([head, "", *lines, "", *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{c}</th>" for c in _COLUMNS)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self._cells())
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self._notes())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><ul>{notes}</ul>"


def _names(arguments: Arguments, args: tuple[Any, ...]) -> list[str]:
    """The path of each differentiated leaf in its argument, with the argument's number where there are several."""
    names = []
    for i in sorted(arguments.argnums):
        prefix = [str(i)] if len(arguments.argnums) > 1 else []
        for path, leaf in zip(optree.tree_paths(args[i]), optree.tree_leaves(args[i]), strict=True):
            if isinstance(leaf, Tensor):
                names.append(".".join([*prefix, *map(str, path)]))
    return names


def explain(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    randomness: str = "error",
) -> Callable[..., Explanation]:
    """Transform a per-sample loss into a function that reports how ``per_sample_grad`` runs it.

    Args:
        fn: as in ``per_sample_grad``, and so are the other arguments.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments. It returns an ``Explanation``: a table of every op that ran, with route, count and time, which
        prints in a terminal and in a notebook. Times are of one run, so the first call includes warm-up.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import explain
        >>> report = explain(lambda w, x: (x @ w).square().sum())(torch.ones(3, 2), torch.ones(5, 4, 3))
        >>> report.n, "fallback" in report.routes()
        (5, False)
    """
    _arguments.check_options(fn, argnums, randomness, None)

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        recorder = Recorder()
        function, args, kwargs = opened(fn, args, kwargs, argnums)
        arguments = _arguments.read(args, argnums, in_dims)
        program = Program(function, kwargs, has_aux, keep_batch_dim, randomness)
        start = time.perf_counter()
        runs = 0
        factors: dict[int, str] = {}

        def reduce(number: int, factor: Factor, functional: bool) -> None:
            factors[number] = type(factor).__name__
            recorder.materialize(factor, functional)

        for _ in outcomes(program, arguments, None, lambda samples: reduce, recorder):
            runs += 1
        seconds = time.perf_counter() - start
        rows = tuple(sorted(recorder.rows.values(), key=lambda row: -row.seconds))
        named = {name: factors[number] for number, name in enumerate(_names(arguments, args))}
        return Explanation(rows, named, seconds, arguments.n, runs)

    return explained
