"""What a method is.

A method is prepared once for a task, outside the timed region, and gives a function without arguments that computes
its answer: a list of tensors. A method that cannot run a workload raises; the report gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bench.workloads import Task

Runner = Callable[[], list[Tensor]]
Prepare = Callable[[Task], Runner]


class Unavailable(Exception):
    """The method does not take part in this workload: nothing failed."""


@dataclass(frozen=True)
class Method:
    """One way to compute one quantity."""

    name: str
    # a name in `check.QUANTITIES`: what the answer is checked against; None: nothing to check
    quantity: str | None
    prepare: Prepare
    # left out unless asked for by name or with `--all`
    optional: bool = False
    # its first call compiles, which takes more memory than the step
    compiled: bool = False
