"""Settings that steer speed, memory and what is allowed; never values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

CONV_ALGORITHMS = ("fold", "fold_merged", "group", "unfold", "onednn")


@dataclass(frozen=True)
class Options:
    """What `options` sets; `conv_algorithm` None: chosen by shape."""

    conv_algorithm: str | None = None
    scratch_bytes: int = 64 * 2**20
    split_batch: bool = False


_DEFAULT = Options()
_current: ContextVar[Options] = ContextVar("per_sample_options", default=_DEFAULT)


def current_options() -> Options:
    """The options in force here, in this thread or task."""
    return _current.get()


# Dynamo cannot read a context variable. An option holds as it is when a program is traced.
current_options._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def options(*, conv_algorithm: str | None = None, scratch_bytes: int | None = None, split_batch: bool | None = None) -> Iterator[Options]:
    """Set options for a block of code.

    A setting left out (or None) keeps the value it has outside the block. Settings hold for the
    current thread or asynchronous task only.

    Args:
        conv_algorithm: the algorithm for every convolution weight gradient, instead of the choice by shape.
        scratch_bytes: how much memory a kernel may use beyond its result.
        split_batch: where the function asks for the Python value of a per-sample tensor (a branch, `.item()`, `nonzero`), run the samples
            in groups that have the same value, each group on its own, instead of raising `DataDependentError`. The groups draw their
            random numbers one after the other, so that which numbers a sample gets depends on the others' groups.

    Returns:
        A context manager that yields the options in force.

    Raises:
        ValueError: the algorithm is unknown, `scratch_bytes` is not a positive integer, or `split_batch` not a bool.

    Example:
        >>> with options(scratch_bytes=2**20) as settings:
        ...     settings.scratch_bytes
        1048576
    """
    if conv_algorithm is not None and conv_algorithm not in CONV_ALGORITHMS:
        allowed = ", ".join(map(repr, CONV_ALGORITHMS))
        raise ValueError(f"`conv_algorithm` must be one of {allowed}; got {conv_algorithm!r}.")
    if scratch_bytes is not None and (type(scratch_bytes) is not int or scratch_bytes <= 0):
        raise ValueError(f"`scratch_bytes` must be a positive integer; got {scratch_bytes!r}.")
    if split_batch is not None and type(split_batch) is not bool:
        raise ValueError(f"`split_batch` must be a bool; got {split_batch!r}.")
    outer = _current.get()
    settings = Options(
        conv_algorithm or outer.conv_algorithm,
        scratch_bytes or outer.scratch_bytes,
        outer.split_batch if split_batch is None else split_batch,
    )
    token = _current.set(settings)
    try:
        yield settings
    finally:
        _current.reset(token)
