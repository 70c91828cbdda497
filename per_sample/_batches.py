"""A whole batch as one run, or as several: chunks, and groups of samples whose values lead different ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample import _arguments
from per_sample import _trees as trees
from per_sample._errors import ArgumentError
from per_sample._options import progress_bar
from per_sample._record import current_recorder, recording
from per_sample._run import Outcome, Program, run
from per_sample._surroundings import Split, random_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from per_sample._arguments import Arguments
    from per_sample._record import Recorder

    # Makes the `reduce` of the run of these samples; None: all, in order. A recorder adds a last argument, what makes ``LeafGrads``.
    Reducer = Callable[[Sequence[int] | None], Callable[..., Any]]


def outcomes(program: Program, arguments: Arguments, chunk_size: int | None, reducer: Reducer) -> Iterator[Outcome]:
    """One ``Outcome`` for each chunk of samples, or group that runs apart.

    An empty batch yields that of one sample of zeros; nothing if the function asks for the values of that sample, which does not exist.
    """
    n, recorder = arguments.n, current_recorder()
    if recorder is not None:
        recorder.begin(arguments)
    if n == 0:
        yield from _groups(program, arguments, _arguments.one_zero_sample(arguments), 1, None, reducer, recorder)
    elif chunk_size is None or chunk_size >= n:
        yield from _groups(program, arguments, arguments.leaves, n, None, reducer, recorder)
    else:
        # As torch.vmap has it: with randomness="same" every chunk draws the same numbers again.
        restores = random_states(arguments.leaves) if program.randomness == "same" else []
        with progress_bar(n) as advance:
            for start in range(0, n, chunk_size):
                size = min(chunk_size, n - start)
                if start:
                    for restore in restores:
                        restore()
                chunk = _arguments.chunk(arguments, start, size)
                yield from _groups(program, arguments, chunk, size, range(start, start + size), reducer, recorder)
                advance(size)


def _groups(
    program: Program,
    arguments: Arguments,
    leaves: list[Any],
    n: int,
    samples: Sequence[int] | None,
    reducer: Reducer,
    recorder: Recorder | None,
) -> Iterator[Outcome]:
    """The samples in one run; in several where their values lead different ways."""
    try:
        outcome = _run(program, arguments, leaves, n, samples, reducer, recorder)
    except Split as split:
        groups = split.groups
    else:
        yield outcome
        return
    restores = random_states(leaves) if program.randomness == "same" else []
    for i, group in enumerate(groups):
        if i:
            for restore in restores:
                restore()
        part, numbers = _arguments.pick(arguments, leaves, group), group if samples is None else [samples[k] for k in group]
        yield from _groups(program, arguments, part, len(group), numbers, reducer, recorder)


def _run(
    program: Program,
    arguments: Arguments,
    leaves: list[Any],
    n: int,
    samples: Sequence[int] | None,
    reducer: Reducer,
    recorder: Recorder | None,
) -> Outcome:
    if recorder is None:
        return run(program, arguments, leaves, n, reducer(samples), None, samples)
    # A transform that the function calls is made of ops like any others.
    with recording(None):
        outcome = run(program, arguments, leaves, n, recorder.watched(reducer(samples)), recorder, samples)
    recorder.runs += 1
    return outcome


def in_order(parts: list[Tensor], samples: list[Sequence[int] | None]) -> Tensor:
    """The rows of several runs, in the caller's order."""
    if len(parts) == 1:
        return parts[0]
    numbers = [k for some in samples for k in some or ()]
    whole = torch.cat(parts)
    return whole if numbers == sorted(numbers) else whole[torch.tensor(numbers).argsort().to(whole.device)]


def joined(pieces: list[Any], samples: list[Sequence[int] | None]) -> Any:
    """Trees of all samples' values and auxiliary values, in the caller's order."""
    if len(pieces) == 1:
        return pieces[0]

    def join(*parts: Any) -> Any:
        first = parts[0]
        if all(isinstance(p, Tensor) and p.shape[1:] == first.shape[1:] and p.dtype == first.dtype for p in parts):
            return in_order(list(parts), samples)
        if any(isinstance(p, Tensor) for p in parts) or any(not _same(first, p) for p in parts):
            shown = [f"a tensor {list(p.shape)} of {p.dtype}" if isinstance(p, Tensor) else repr(p) for p in (first, parts[-1])]
            raise ArgumentError(f"`aux` differs between samples that ran apart (`chunk_size`, groups): {shown[0]} and {shown[1]}.")
        return first

    structures = [trees.flatten(piece)[1] for piece in pieces]
    if any(structure != structures[0] for structure in structures):
        raise ArgumentError("`aux` must have the same structure for all samples, also for those that ran apart (`chunk_size`, groups).")
    return trees.map(join, *pieces)


_COMPARED = (int, float, complex, str, bytes, frozenset, set, torch.dtype, torch.device, torch.Size)


def _same(x: Any, y: Any) -> bool:
    """Equality of plain values, NaN among them; of other objects nobody can tell."""
    return x is y or (type(x) is type(y) and isinstance(x, _COMPARED) and repr(x) == repr(y))


def rows(x: Tensor, samples: Sequence[int] | None) -> Tensor:
    """The rows of ``x [n, ...]`` that belong to some of the samples; None: all."""
    if samples is None:
        return x
    if isinstance(samples, range):
        return x[samples.start : samples.stop]
    return x[torch.tensor(samples, device=x.device)]
