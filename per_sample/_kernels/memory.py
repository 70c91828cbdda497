"""Memory for large results.

A fresh result of many megabytes costs more in page faults than in arithmetic: the kernel hands it out 4 KiB at a time. Asked for huge
pages, Linux needs one fault for 2 MiB, and the write of a large result takes about a quarter of the time.
"""

from __future__ import annotations

import mmap
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_HUGE = 2 * 2**20
_LARGE = 4 * _HUGE
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@lru_cache(maxsize=1)
def huge_pages() -> bool:
    """Whether this system gives huge pages to who asks for them (where it gives them to all, nobody need ask)."""
    try:
        return "[madvise]" in _SETTING.read_text() and hasattr(mmap, "MADV_HUGEPAGE")
    except OSError:
        return False


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor for a result, with the dtype and device of ``like``."""
    size = prod(shape) * like.dtype.itemsize
    if size < _LARGE or like.device.type != "cpu" or not huge_pages():
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return _mapped(size).view(like.dtype).view(shape)


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """As ``empty``, but all zeros."""
    size = prod(shape) * like.dtype.itemsize
    if size < _LARGE or like.device.type != "cpu" or not huge_pages():
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return _mapped(size).view(like.dtype).view(shape)


def _mapped(size: int) -> Tensor:
    """``size`` zero bytes that begin on a huge page; the mapping lives as long as the tensor's storage."""
    pages = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(pages, dtype=torch.uint8)
    start = -raw.data_ptr() % _HUGE
    return raw[start : start + size]
