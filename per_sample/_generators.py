"""Random numbers that are not of torch's default generator: a second pass over the same function must draw them again."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

# The state that each generator had at its first use.
_states: ContextVar[dict[torch.Generator, Any] | None] = ContextVar("per_sample_generators", default=None)


@contextmanager
def repeatable() -> Iterator[Callable[[], None]]:
    """Where a first pass runs; what is yielded sets the generators back to where they were before it."""
    states: dict[torch.Generator, Any] = {}
    python = random.getstate()
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    arrays = None if numpy is None else numpy.get_state()

    def back() -> None:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(arrays)
        for generator, state in states.items():
            generator.set_state(state)

    token = _states.set(states)
    try:
        yield back
    finally:
        _states.reset(token)


def remember(generator: torch.Generator) -> None:
    """Called before the program draws from a generator of its own."""
    states = _states.get()
    if states is not None and generator not in states:
        states[generator] = generator.get_state()
