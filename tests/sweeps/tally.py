"""What a sweep finds, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .exceptions import EXCEPTIONS, PROMISES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# right: agrees with the loop. wrong: does not. refused: raises a typed error. raw: raises anything else.
# void: the loop itself has no gradient there.
VERDICTS = ("right", "wrong", "refused", "raw", "void")


@dataclass(frozen=True)
class Finding:
    """One case of a sweep and what became of it."""

    name: str
    verdict: str
    detail: str = ""
    # The ops that ran, each with its route.
    routes: frozenset[tuple[str, str]] = frozenset()
    # vmap(grad) runs it: then it may not be refused, except where that is promised.
    possible: bool = False

    @property
    def looped(self) -> tuple[str, ...]:
        """Ops that ran sample by sample."""
        return tuple(sorted(op for op, route in self.routes if route == "loop"))

    @property
    def excuse(self) -> str | None:
        """The pattern of the row that lets a refusal pass, if there is one."""
        if self.verdict != "refused":
            return None
        table = PROMISES if self.possible else PROMISES | EXCEPTIONS
        return next((pattern for pattern in table if fnmatchcase(self.name, pattern)), None)

    @property
    def fine(self) -> bool:
        """Right, void, or a refusal that a table explains; a wrong number never is."""
        return self.verdict in ("right", "void") or self.excuse is not None


@dataclass(frozen=True)
class Case:
    """A named check."""

    name: str
    check: Callable[[], Finding]


def routes_of(explanation: Any) -> frozenset[tuple[str, str]]:
    """The ops of a run as ``explain`` tells them, without times."""
    return frozenset((row.op, row.route) for row in explanation.rows)


def checked(cases: Iterable[Case]) -> list[Finding]:
    """What became of every case; a line shows how far it is."""
    return [case.check() for case in track(cases, "checking", total=None, console=Console(), transient=True)]


def report(found: list[Finding], *, complete: Iterable[str] = ()) -> bool:
    """Print the tally and everything that is not fine; True where all is.

    ``complete`` names the sweeps of which all cases are among the findings, so that a row of the tables that none of them needs is wrong.
    """
    console = Console()
    table = Table(title="per-sample gradients against a loop of plain autograd")
    for column in ("sweep", *VERDICTS, "excepted"):
        table.add_column(column, justify="left" if column == "sweep" else "right")
    for sweep in dict.fromkeys(f.name.split("/")[0] for f in found):
        rows = [f for f in found if f.name.startswith(f"{sweep}/")]
        count = Counter(f.verdict for f in rows)
        table.add_row(sweep, *(str(count[v]) for v in VERDICTS), str(sum(f.excuse is not None for f in rows)))
    console.print(table)
    bad = [f for f in found if not f.fine]
    for f in bad:
        note = " (vmap(grad) runs it)" if f.possible else ""
        console.print(f"{f.verdict:8} {f.name}{note}: {f.detail}", markup=False, highlight=False)
    looped = Counter(op for f in found for op in f.looped)
    if looped:
        console.print("ops that ran sample by sample: " + ", ".join(f"{op} ({k})" for op, k in looped.most_common()), markup=False)
    unused = set(EXCEPTIONS | PROMISES) - {f.excuse for f in found}
    unused = {pattern for pattern in unused if pattern.split("/")[0] in complete}
    for pattern in sorted(unused):
        console.print(f"unused   {pattern}: no case is refused, so the row can go", markup=False, highlight=False)
    return not bad and not unused
