"""The types of the transforms: what they return takes what the wrapped function takes.

Shapes in docstrings, here as everywhere: ``n`` counts samples (``m`` those of a second batch), and ``[n, *shape]`` is a tensor with the
samples along its first axis and ``shape``, that of a parameter or of one sample's tensor, after it; ``[]`` is a tensor without axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec, Protocol, TypedDict, TypeVar

# The parameters of the wrapped function, and what it returns.
P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


# The words that options take.
Randomness = Literal["error", "different", "same"]
Memory = Literal["fast", "low"]
Across = Literal["samples", "sum", "whole"]


class RunOptions(TypedDict, total=False):
    """The options of every transform that do not change the type of its result."""

    keep_batch_dim: bool
    chunk_size: int | None
    randomness: Randomness


class Forward(Protocol[P, R_co]):
    """A module, by the signature of its ``forward``."""

    @property
    def forward(self) -> Callable[P, R_co]:
        """What a call of the module runs."""
