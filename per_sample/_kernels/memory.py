"""Memory for large results.

A fresh result of many megabytes costs more in page faults than in arithmetic, since the system takes large blocks back as soon as they are
freed and hands them out again page by page. So what a result occupied is kept for a result of the same size in the next step of a
training loop, which finds it warm.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import OrderedDict
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

# Below this the allocator of the C library does well: it keeps what is freed.
_LARGE = 4 * 2**20
_ALIGNMENT = mmap.PAGESIZE


class Pool:
    """Freed memory kept for the next result of the same size, at most ``limit`` bytes; thread-safe.

    What has not been asked for while 256 others were freed is given back.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._clock = 0
        self._free: OrderedDict[int, mmap.mmap] = OrderedDict()  # by the time of their freeing
        self._lock = threading.RLock()  # the garbage collector may free one result while another is taken

    def take(self, size: int) -> mmap.mmap:
        """Memory of just that size, what it last held still in it."""
        with self._lock:
            for time, pages in self._free.items():
                if len(pages) == size:
                    del self._free[time]
                    self.held -= size
                    return pages
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def put(self, pages: mmap.mmap) -> None:
        """Keep freed memory if it fits."""
        with self._lock:
            self._clock += 1
            while self._free and next(iter(self._free)) < self._clock - 256:
                self.held -= len(self._free.popitem(last=False)[1])
            if self.held + len(pages) <= self.limit:
                self._free[self._clock] = pages
                self.held += len(pages)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


POOL = Pool(_physical_memory() // 8)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor for a result, with the dtype and device of ``like``."""
    size = prod(shape) * like.dtype.itemsize
    _teach_malloc()
    if not _LARGE <= size <= POOL.limit or like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    pages = POOL.take(-(-size // _ALIGNMENT) * _ALIGNMENT)
    view = memoryview(pages)
    # The tensor's storage holds the view, so that the pool gets the memory back when the last tensor on it has gone.
    weakref.finalize(view, POOL.put, pages).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=prod(shape)).view(shape)


@lru_cache(maxsize=1)
def _teach_malloc() -> None:
    """Have glibc keep freed scratch memory between steps.

    It returns to the system what lies free at the end of its heap beyond twice the largest block freed so far, and every step would
    fault it in again. A block just under glibc's own limit of 32 MiB, never touched, teaches it to keep 64 MiB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
