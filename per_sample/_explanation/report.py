"""What ``explain`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from per_sample._explanation import display

if TYPE_CHECKING:
    from per_sample.quantities.ways import Way


@dataclass(frozen=True)
class Op:
    """One op on one route.

    ``route`` is "rule", "pointwise", "shared", "fallback" or "loop". Where gradients on their way to a parameter had to be formed, ``op``
    is the form that they had, and ``route`` the algorithm.
    """

    op: str
    route: str
    count: int
    seconds: float
    share: float  # of the time of the call


@dataclass(frozen=True)
class Question:
    """What was asked of a parameter's gradients, and the way to the answer.

    ``question`` is a method of ``LeafGrads``, such as "sq_norm"; ``way`` is empty where there is but one. ``ways`` has the costs of those
    that were weighed against each other, by name, for all samples: multiply-adds as the choice counts them (the arithmetic, and so much
    more for elements that are written and read again), and bytes of scratch memory.
    """

    question: str
    way: str
    count: int
    seconds: float
    share: float
    ways: dict[str, Way]

    @property
    def saves(self) -> float | None:
        """How many times as much the best other way would cost; None where there is no other."""
        others = [way.multiply_adds for name, way in self.ways.items() if name != self.way]
        return min(others) / max(1, self.ways[self.way].multiply_adds) if others and self.way in self.ways else None


@dataclass(frozen=True)
class Parameter:
    """What became of one parameter's gradients; sizes are those of the run that held most.

    ``factor`` is the class of the form in which they arrived, ``form`` the same in words. ``held_bytes`` is what that takes,
    ``formed_bytes`` what the gradients ``[samples, *shape]`` themselves take, or would take.
    """

    name: str
    shape: tuple[int, ...]
    factor: str
    form: str
    samples: int
    held_bytes: int
    formed_bytes: int
    questions: tuple[Question, ...]

    @property
    def seconds(self) -> float:
        """The time that all questions took."""
        return sum(question.seconds for question in self.questions)


@dataclass(frozen=True)
class Advice:
    """One thing to do, and the share of the time that it is about."""

    text: str
    share: float


@dataclass(frozen=True)
class Run:
    """How often the function ran, and why."""

    runs: int
    seconds: float  # of the whole call
    lost_seconds: float  # in runs that had to begin again
    quantity_seconds: float  # in the transform's own code, such as a quantity of yours
    splits: tuple[str, ...]  # the ops that asked for values on which samples do not agree ("": no op, but the program itself)
    restarts: tuple[tuple[str, ...], ...]  # what the function turned out to need, for each time that it began again
    differentiable: bool  # the arguments require grad, and so does the result


@dataclass(frozen=True, repr=False)
class Explanation:
    """The ops of one call, slowest first, what became of each parameter's gradients, and what would help."""

    ops: tuple[Op, ...]
    parameters: tuple[Parameter, ...]
    advice: tuple[Advice, ...]
    n: int
    run: Run

    @property
    def seconds(self) -> float:
        """The time of the whole call."""
        return self.run.seconds

    @property
    def runs(self) -> int:
        """How often the function ran to its end: more than once with ``chunk_size``, and where samples of different values ran apart."""
        return self.run.runs

    @property
    def rows(self) -> tuple[Op, ...]:
        """The same as ``ops``."""
        return self.ops

    @property
    def factors(self) -> dict[str, str]:
        """The class of the form in which each parameter's gradients arrived."""
        return {parameter.name: parameter.factor for parameter in self.parameters}

    def routes(self) -> dict[str, int]:
        """How many ops took each route."""
        out: dict[str, int] = {}
        for op in self.ops:
            out[op.route] = out.get(op.route, 0) + op.count
        return out

    def __str__(self) -> str:
        return display.text(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        return display.rich_group(self)

    def _repr_html_(self) -> str:
        return display.fragment(self)

    def to_html(self) -> str:
        """A page of its own, to be written into a file."""
        return display.page(self)
