"""How many samples a batched kernel takes at a time, so that every thread has work and what it touches stays in its cache."""

from __future__ import annotations

import torch


def threads() -> int:
    """How many threads an operator may use."""
    return torch.get_num_threads()


# Dynamo cannot read it. Where a program is traced it holds as it is then.
threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def samples_at_once(n: int, sample_bytes: int, cache_bytes: int, scratch_bytes: int, workers: int) -> int:
    """The size of all pieces of ``n`` samples but perhaps the last.

    A product for one sample alone, of many small ones, hardly uses a second thread: there are as many samples at a time as threads, or a
    multiple of that.

    Args:
        n: the number of samples.
        sample_bytes: what a sample needs.
        cache_bytes: what the samples of one thread should need at most.
        scratch_bytes: what all of them may need at most; one sample's need is always granted.
        workers: the number of threads.
    """
    allowed = max(1, scratch_bytes // max(1, sample_bytes))
    most = min(allowed, workers * max(1, cache_bytes // max(1, sample_bytes)))
    if most >= n:
        return max(1, n)
    most -= most % workers if most > workers else 0
    even = -(-n // -(-n // most))  # pieces of one size
    return min(most, -(-even // workers) * workers)
