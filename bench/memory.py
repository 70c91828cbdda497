"""The peak memory of a call, in a process of its own: `memory.peak(task, quantity, method)`.

Measured is the resident memory of the first call at its peak, above what it was just before; that includes what libraries
take beside torch's allocator. What would blur it is kept still: see `_ENVIRONMENT` and `_settle`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.methods import METHODS
from bench.workloads import WORKLOADS, Workload

# glibc keeps freed blocks for later, in an arena for each thread, so that the peak would depend on the order of sizes freed.
# Here each block of 64 KiB or more is mapped by itself, and gone once freed; a fixed limit is one that glibc does not move.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": str(2**30),
}
_PR_SET_THP_DISABLE = 41
_OUT_OF_MEMORY = re.compile(r"MemoryError|bad_alloc|allocate memory|failed to allocate|out of memory", re.IGNORECASE)


def peak(workload: Workload, quantity: str, method: str, *, max_norm: float = 1.0, limit: int | None = None) -> int:
    """The bytes that the method's first call takes at its peak; one that takes much more than `limit` is ended.

    Raises:
        MemoryError: there is not enough.
        RuntimeError: the system does not tell, or the call fails.
    """
    # A baseline is the same for every quantity, and measured once.
    if method == "plain":
        quantity, max_norm = next(iter(METHODS)), 1.0
    return _peak(workload.name, workload.n, workload.width, quantity, method, max_norm, torch.get_num_threads(), limit)


@cache
def _peak(*job: Any) -> int:
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("the peak of resident memory can be read and reset on Linux only")
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", json.dumps(job)],
        env={**os.environ, **_ENVIRONMENT},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        # A process that the system kills for memory says nothing.
        raise (MemoryError if done.returncode < 0 or _OUT_OF_MEMORY.search(reason) else RuntimeError)(reason)
    return int(done.stdout.splitlines()[-1])


def _measured(
    workload_name: str, n: int, width: int, quantity: str, method_name: str, max_norm: float, threads: int, limit: int | None
) -> int:
    torch.set_num_threads(threads)
    if limit is not None:
        _bound(2 * limit)
    method, workload = METHODS[quantity][method_name], replace(WORKLOADS[workload_name], n=n, width=width)
    # What is loaded and set up once, at the first call of all, belongs to no batch. Half the batch is large enough to need all of it.
    method.prepare(replace(workload, n=max(2, n // 2)).build())()
    runner = method.prepare(replace(workload.build(), max_norm=max_norm))
    _settle()
    # Resets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _kibibytes("VmRSS")
    answer = runner()
    after = _kibibytes("VmHWM")
    del answer
    return (after - before) * 1024


def _bound(more: int) -> None:
    """Let allocations fail that go far beyond the limit: the data want room too, and a number says more than a failure."""
    import resource  # not on Windows

    most = _kibibytes("VmData") * 1024 + more
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _settle() -> None:
    """Give back what is free, and let no huge page be resident for the sake of a part of it."""
    libc = ctypes.CDLL(None)
    gc.collect()
    libc.malloc_trim(0)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def _kibibytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no {name} in /proc/self/status")
    return int(found[1])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(_measured(*json.loads(sys.argv[1])))
