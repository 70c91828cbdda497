"""Settings that steer speed, memory and what is allowed; never values."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from per_sample._errors import ArgumentError

CONV_ALGORITHMS = ("fold", "fold_merged", "group", "unfold", "onednn")


@dataclass(frozen=True)
class Options:
    """What `options` sets; `conv_algorithm` None: chosen by shape; `progress` None: no bar, else what makes one."""

    conv_algorithm: str | None = None
    scratch_bytes: int = 64 * 2**20
    split_batch: bool = False
    progress: Callable[..., Any] | None = None


_DEFAULT = Options()
_current: ContextVar[Options] = ContextVar("per_sample_options", default=_DEFAULT)


def current_options() -> Options:
    """The options in force here, in this thread or task."""
    return _current.get()


# Dynamo cannot read a context variable. An option holds as it is when a program is traced.
current_options._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def options(
    *,
    conv_algorithm: str | None = None,
    scratch_bytes: int | None = None,
    split_batch: bool | None = None,
    progress: bool | Callable[..., Any] | None = None,
) -> Iterator[Options]:
    """Set options for a block of code.

    A setting left out (or None) keeps the value it has outside the block. Settings hold for the
    current thread or asynchronous task only.

    Args:
        conv_algorithm: the algorithm for every convolution weight gradient, instead of the choice by shape: ``"fold"``,
            ``"fold_merged"``, ``"group"``, ``"unfold"`` or ``"onednn"``.
        scratch_bytes: how much memory a kernel may use beyond its result.
        split_batch: where the function asks for the Python value of a per-sample tensor (a branch, `.item()`, `nonzero`), run the samples
            in groups that have the same value, each group on its own, instead of raising `DataDependentError`. The groups draw their
            random numbers one after the other, so that which numbers a sample gets depends on the others' groups.
        progress: True shows a bar of tqdm's where `chunk_size` makes several runs, which counts samples; so does a function that is called
            as `tqdm` is, `progress(total=n, unit=...)`, and returns something with `update(k)` and `close()`. False: no bar. There is none
            under `torch.compile`.

    Returns:
        A context manager that yields the options in force.

    Raises:
        ArgumentError: the algorithm is unknown, `scratch_bytes` is not a positive integer, `split_batch` not a bool, or `progress` neither
            a bool nor callable.
        ImportError: `progress=True`, and tqdm is not installed.

    Example:
        >>> with options(scratch_bytes=2**20) as settings:
        ...     settings.scratch_bytes
        1048576
    """
    if conv_algorithm is not None and conv_algorithm not in CONV_ALGORITHMS:
        allowed = ", ".join(map(repr, CONV_ALGORITHMS))
        raise ArgumentError(f"`conv_algorithm` must be one of {allowed}; got {conv_algorithm!r}.")
    if scratch_bytes is not None and (type(scratch_bytes) is not int or scratch_bytes <= 0):
        raise ArgumentError(f"`scratch_bytes` must be a positive integer; got {scratch_bytes!r}.")
    if split_batch is not None and type(split_batch) is not bool:
        raise ArgumentError(f"`split_batch` must be a bool; got {split_batch!r}.")
    if progress is not None and type(progress) is not bool and not callable(progress):
        raise ArgumentError(f"`progress` must be a bool, or a function that is called as tqdm is; got {progress!r}.")
    outer = _current.get()
    settings = Options(
        conv_algorithm or outer.conv_algorithm,
        scratch_bytes or outer.scratch_bytes,
        outer.split_batch if split_batch is None else split_batch,
        outer.progress if progress is None else _bar(progress),
    )
    token = _current.set(settings)
    try:
        yield settings
    finally:
        _current.reset(token)


def _bar(progress: bool | Callable[..., Any]) -> Callable[..., Any] | None:
    """What makes a bar."""
    if type(progress) is not bool:
        return progress
    if not progress:
        return None
    try:
        tqdm: Callable[..., Any] = importlib.import_module("tqdm.auto").tqdm
    except ImportError as err:
        raise ImportError(
            "`options(progress=True)` shows a bar of tqdm's, which is not installed: `pip install tqdm` (or `per_sample[progress]`). Or "
            "pass a function that makes a bar of your own."
        ) from err
    return tqdm


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], Any]]:
    """The bar that the options ask for, as a function that is told how many samples more are done; closed with the block."""
    make = current_options().progress
    if make is None:
        yield lambda done: None
        return
    bar = make(total=total, unit=" samples")
    try:
        yield bar.update
    finally:
        bar.close()
