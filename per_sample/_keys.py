"""Dispatch keys: running ops with autograd and functorch active again from inside ``__torch_dispatch__``."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.overrides import enable_reentrant_dispatch

if TYPE_CHECKING:
    from collections.abc import Iterator

_PYTHON = (torch._C.DispatchKey.Python, torch._C.DispatchKey.PythonTLSSnapshot)
_LAZY = (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative)


@contextmanager
def all_keys() -> Iterator[None]:
    """Every dispatch key active, as the program had them."""
    with enable_reentrant_dispatch():
        # The snapshot was taken while the interpreter's mode stood on the stack. It is popped now; where it was the only one,
        # the keys that say "some mode is active" must go too. The guard above sets all back.
        if torch._C._len_torch_dispatch_stack() == 0:
            for key in _PYTHON:
                torch._C._dispatch_tls_set_dispatch_key_included(key, False)
        yield


def see_conjugates() -> None:
    """Let kernels called from inside ``__torch_dispatch__`` resolve lazy conjugation; torch's own guard sets the keys back."""
    for key in _LAZY:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
