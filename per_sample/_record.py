"""What ``explain`` writes down while a transform runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from per_sample._factors import Factor


@dataclass
class Row:
    """One op on one route: how often, and the seconds it took in all."""

    op: str
    route: str
    count: int = 0
    seconds: float = 0.0


@dataclass
class Recorder:
    """Counts the ops of a run by route; ``rows`` is keyed by op and route."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    _route: str = ""

    def copy(self) -> dict[tuple[str, str], Row]:
        """The rows as they stand, for a run that may have to begin again."""
        return {key: replace(row) for key, row in self.rows.items()}

    def op(self, op: Any, route: str, run: Callable[[], Any]) -> Any:
        """Run one op and count it under ``route``, or under the one that ``took`` names meanwhile."""
        outer, self._route = self._route, route
        start = time.perf_counter()
        try:
            return run()
        finally:
            self._count(str(op), self._route, time.perf_counter() - start)
            self._route = outer

    def took(self, route: str) -> None:
        """Say that the op now running left its rule for another route."""
        self._route = route

    def materialize(self, factor: Factor, functional: bool) -> Tensor:
        """Materialise a factor and count it under the algorithm chosen."""
        start = time.perf_counter()
        value = factor.materialize(functional=functional)
        self._count(type(factor).__name__, factor.algorithm(functional=functional), time.perf_counter() - start)
        return value

    def _count(self, op: str, route: str, seconds: float) -> None:
        row = self.rows.setdefault((op, route), Row(op, route))
        row.count += 1
        row.seconds += seconds
