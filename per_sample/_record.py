"""What ``explain`` writes down while a transform runs."""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from per_sample.quantities.describe import form, held_bytes
from per_sample.quantities.leaf import LeafGrads
from per_sample.quantities.pieces import count
from per_sample.quantities.ways import Way, way_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from per_sample._arguments import Arguments
    from per_sample._factors import Factor


@dataclass
class Row:
    """One op on one route: how often, and the seconds it took in all, without what ran inside it under its own name."""

    op: str
    route: str
    count: int = 0
    seconds: float = 0.0


@dataclass
class Step:
    """One question that was asked of a parameter's gradients, and the way to the answer."""

    question: str  # the method of ``LeafGrads``, such as "sq_norm"
    way: str  # the name of the one chosen; empty where there is but one
    ways: dict[str, Way]  # all ways that were weighed against each other, for all samples of the largest run
    count: int = 0
    seconds: float = 0.0


@dataclass
class Leaf:
    """What arrived as the gradients of one parameter, in the run in which most was held."""

    shape: tuple[int, ...]
    factor: str
    form: str
    samples: int
    held_bytes: int
    formed_bytes: int
    steps: dict[tuple[str, str], Step] = field(default_factory=dict)


@dataclass
class Formed:
    """Gradients on their way to a parameter that an op wanted formed."""

    factor: str
    op: str
    bytes: int
    seconds: float = 0.0


@dataclass
class Recorder:
    """The ops of a call by route, what became of each parameter's gradients, and how often the function had to run."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    leaves: dict[int, Leaf] = field(default_factory=dict)
    formed: dict[tuple[str, str], Formed] = field(default_factory=dict)
    arguments: Arguments | None = None
    runs: int = 0
    # Chunks that had to be run in groups of samples, and the op that asked for their values.
    splits: list[str] = field(default_factory=list)
    # Fields of the ``Context`` that had to be set, for want of which the function began again.
    restarts: list[tuple[str, ...]] = field(default_factory=list)
    lost_seconds: float = 0.0  # in runs that had to begin again
    quantity_seconds: float = 0.0  # in the quantity's own code
    _route: str = ""
    _ops: list[str] = field(default_factory=list)
    _stopped_by: str = ""
    _inner: float = 0.0
    _began: float = 0.0
    _device: torch.device | None = None

    def begin(self, arguments: Arguments) -> None:
        """A call of the transform begins; only the first one's arguments are kept."""
        self.arguments = self.arguments or arguments
        devices = {x.device for x in arguments.leaves if isinstance(x, torch.Tensor)}
        self._device = next((device for device in devices if device.type not in ("cpu", "meta")), None)

    def copy(self) -> Any:
        """All that a run writes down as it stands, for one that may have to begin again."""
        self._began = self._now()
        leaves = {
            number: replace(leaf, steps={key: replace(step) for key, step in leaf.steps.items()}) for number, leaf in self.leaves.items()
        }
        rows, formed = ({key: replace(value) for key, value in own.items()} for own in (self.rows, self.formed))
        return rows, leaves, formed, self.quantity_seconds

    def begin_again(self, copied: Any, needs: tuple[str, ...] | None) -> None:
        """Forget the run under way; ``needs``: what the next one has that it lacked, None where the samples run apart instead."""
        self.lost_seconds += self._now() - self._began
        self.rows, self.leaves, self.formed, self.quantity_seconds = copied
        if needs is None:
            self.splits.append(self._stopped_by)
        else:
            self.restarts.append(needs)
        self._stopped_by = ""

    def op(self, op: Any, route: str, run: Callable[[], Any]) -> Any:
        """Run one op and count it under ``route``, or under the one that ``took`` names meanwhile."""
        outer, self._route = self._route, route
        self._ops.append(str(op))
        seconds = [0.0]
        try:
            return self._timed(run, seconds)
        except BaseException as err:
            if not isinstance(err, Exception):
                # A restart: the innermost op is the one that asked for it.
                self._stopped_by = self._stopped_by or str(op)
            raise
        finally:
            self._count(self._ops.pop(), self._route, seconds[0])
            self._route = outer

    def took(self, route: str) -> None:
        """Say that the op now running left its rule for another route."""
        self._route = route

    def materialize(self, factor: Factor, functional: bool) -> Tensor:
        """Form gradients for an op that wants their numbers, and count that under the algorithm chosen."""
        seconds = [0.0]
        value: Tensor = self._timed(lambda: factor.materialize(functional=functional), seconds)
        name, op = type(factor).__name__, self._ops[-1] if self._ops else "a read of its value"
        self._count(name, factor.algorithm(functional=functional), seconds[0])
        formed = self.formed.setdefault((name, op), Formed(name, op, 0))
        formed.bytes = max(formed.bytes, value.numel() * value.dtype.itemsize)
        formed.seconds += seconds[0]
        return value

    def watched(self, reduce: Callable[..., Any]) -> Callable[[int, Any, bool], Any]:
        """``reduce`` with its leaves and questions written down."""

        def watching(number: int, found: Any, functional: bool) -> Any:
            self._arrived(number, found if isinstance(found, list) else [found])
            make = functools.partial(RecordedGrads, recorder=self, number=number)
            seconds = [0.0]
            result = self._timed(lambda: reduce(number, found, functional, make), seconds)
            self.quantity_seconds += seconds[0]
            return result

        return watching

    def _arrived(self, number: int, factors: list[Factor]) -> None:
        first, n = factors[0], count(factors[0])
        size = sum(n * prod(factor.shape) * factor.like.dtype.itemsize for factor in factors)
        own = form(first) if len(factors) == 1 else f"{len(factors)} outputs: {form(first)}"
        found = Leaf(first.shape, type(first).__name__, own, n, sum(map(held_bytes, factors)), size)
        known = self.leaves.get(number)
        if known is None or known.held_bytes < found.held_bytes:
            self.leaves[number] = found if known is None else replace(found, steps=known.steps)

    def ask(self, grads: LeafGrads, number: int, question: str, answer: Callable[[], Any], order: float) -> Any:
        """Answer a question and write down which way that took."""
        way, ways = way_of(grads.factor, question, functional=grads.functional, order=order)
        seconds = [0.0]
        value = self._timed(answer, seconds)
        step = self.leaves[number].steps.setdefault((question, way), Step(question, way, ways))
        if _cost(ways, way) > _cost(step.ways, way):
            step.ways = ways
        step.count += 1
        step.seconds += seconds[0]
        return value

    def _timed(self, run: Callable[[], Any], seconds: list[float]) -> Any:
        """Run, and leave in ``seconds`` what that took beyond what is timed inside it."""
        outer, self._inner = self._inner, 0.0
        start = self._now()
        try:
            return run()
        finally:
            took = self._now() - start
            seconds[0] = took - self._inner
            self._inner = outer + took

    def _now(self) -> float:
        if self._device is not None:
            # What was only started is not done.
            torch.get_device_module(self._device).synchronize()
        return time.perf_counter()

    def _count(self, op: str, route: str, seconds: float) -> None:
        row = self.rows.setdefault((op, route), Row(op, route))
        row.count += 1
        row.seconds += seconds


def _cost(ways: dict[str, Way], way: str) -> float:
    return ways[way].multiply_adds if way in ways else 0.0


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class RecordedGrads(LeafGrads):
    """The same gradients, with every question written down."""

    recorder: Recorder
    number: int

    def _again(self, value: Any) -> Any:
        """What an answer holds of the gradients is recorded, too."""
        if isinstance(value, tuple):
            return tuple(map(self._again, value))
        if type(value) is LeafGrads:
            return RecordedGrads(value.factor, value.functional, recorder=self.recorder, number=self.number)
        return value


def _recorded(name: str, *, timed: bool) -> Callable[..., Any]:
    plain = getattr(LeafGrads, name)

    @functools.wraps(plain)
    def method(self: RecordedGrads, *args: Any, **kwargs: Any) -> Any:
        if not timed:
            return self._again(plain(self, *args, **kwargs))
        order = kwargs.get("ord", args[0] if args else 2.0) if name == "norm" else 2.0
        return self._again(self.recorder.ask(self, self.number, name, lambda: plain(self, *args, **kwargs), order))

    return method


QUESTIONS = (
    *("materialize", "formed", "sq_norm", "norm", "settled", "sq_condition", "weighted_sum"),
    *("square_sum", "moments", "dot", "gram", "project"),
)
for _name in (*QUESTIONS, "of", "kept"):
    setattr(RecordedGrads, _name, _recorded(_name, timed=_name in QUESTIONS))


_current: ContextVar[Recorder | None] = ContextVar("per_sample_recorder", default=None)


def current_recorder() -> Recorder | None:
    """The recorder of the transforms that are called here, in this thread or task."""
    return _current.get()


@contextmanager
def recording(recorder: Recorder | None) -> Iterator[None]:
    """Have the transforms that are called inside recorded; None: not."""
    token = _current.set(recorder)
    try:
        yield
    finally:
        _current.reset(token)
