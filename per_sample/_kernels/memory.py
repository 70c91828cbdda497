"""Memory for large results.

A fresh result of many megabytes costs more in page faults than in arithmetic: the system hands it out 4 KiB at a time, and takes it back
when it is freed. Two remedies, for results on the CPU: huge pages, of which one fault brings 2 MiB (a quarter of the time of a first
write), and a small pool of freed memory, which the next step of a training loop finds warm (an eighth).
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_HUGE = 2 * 2**20
# Below this the allocator of the C library does well: it keeps what is freed.
_LARGE = 2 * _HUGE
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@lru_cache(maxsize=1)
def huge_pages() -> bool:
    """Whether this system gives huge pages to who asks for them."""
    try:
        return "[never]" not in _SETTING.read_text() and hasattr(mmap, "MADV_HUGEPAGE")
    except OSError:
        return False


@lru_cache(maxsize=1)
def _teach_malloc() -> None:
    """Have glibc keep freed scratch memory between steps.

    It returns to the system what lies free at the end of its heap beyond twice the largest block freed so far, and every step would
    fault it in again. A block just under glibc's own limit of 32 MiB, never touched, teaches it to keep 64 MiB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor for a result, with the dtype and device of ``like``."""
    size = prod(shape) * like.dtype.itemsize
    _teach_malloc()
    if size < _LARGE or like.device.type != "cpu" or not huge_pages():
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    rounded = -(-size // _HUGE) * _HUGE
    return _tensor(POOL.take(rounded) or _map(rounded), size).view(like.dtype).view(shape)


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """As ``empty``, but all zeros, which fresh memory is by itself."""
    size = prod(shape) * like.dtype.itemsize
    if size < _LARGE or like.device.type != "cpu" or not huge_pages():
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return _tensor(_map(-(-size // _HUGE) * _HUGE), size).view(like.dtype).view(shape)


class Pool:
    """Freed memory kept for the next result of the same size, at most ``limit`` bytes; thread-safe.

    What has not been asked for while 256 others were freed is given back.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._clock = 0
        self._free: OrderedDict[int, tuple[int, mmap.mmap]] = OrderedDict()  # by the time of their freeing
        self._lock = threading.RLock()  # the garbage collector may free one result while another is taken

    def take(self, size: int) -> mmap.mmap | None:
        """Memory of just that size, or None."""
        with self._lock:
            for time, (held, pages) in self._free.items():
                if held == size:
                    del self._free[time]
                    self.held -= size
                    return pages
        return None

    def put(self, pages: mmap.mmap) -> None:
        """Keep freed memory if it fits."""
        size = len(pages) - _HUGE
        with self._lock:
            self._clock += 1
            while self._free and next(iter(self._free)) < self._clock - 256:
                self.held -= self._free.popitem(last=False)[1][0]
            if self.held + size <= self.limit:
                self._free[self._clock] = (size, pages)
                self.held += size


POOL = Pool(256 * 2**20)


def _map(size: int) -> mmap.mmap:
    """Zero bytes, with room to begin on a huge page."""
    pages = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _tensor(pages: mmap.mmap, size: int) -> Tensor:
    """``size`` bytes of the memory; the pool gets it back when the last tensor on it has gone."""
    view = memoryview(pages)
    weakref.finalize(view, POOL.put, pages).atexit = False
    raw = torch.frombuffer(view, dtype=torch.uint8)
    start = -raw.data_ptr() % _HUGE
    return raw[start : start + size]
