"""Modules whose parameters torch's ``fully_shard`` has sharded: run as the modules they were, on the parameters one has."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_FSDP = "torch.distributed.fsdp"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def resharded(module: nn.Module) -> nn.Module:
    """The module, its parameters sharded again where a forward pass of its own left them whole."""
    for own in _sharded(module):
        own.reshard()
    return module


@contextmanager
def hooks_off(module: nn.Module) -> Iterator[None]:
    """Where the module uses the parameters that it is called with: the hooks of ``fully_shard`` would put its own in their place."""
    kept: list[tuple[Any, str, Any]] = []
    if next(_sharded(module), None) is not None:
        for own in module.modules():
            for name in _HOOKS:
                hooks = vars(own)[name]
                others = {key: hook for key, hook in hooks.items() if not _is_own(hook)}
                if len(others) != len(hooks):
                    kept.append((own, name, hooks))
                    vars(own)[name] = type(hooks)(others)
    try:
        yield
    finally:
        for own, name, hooks in kept:
            vars(own)[name] = hooks


def _sharded(module: nn.Module) -> Iterator[Any]:
    kind = getattr(sys.modules.get(_FSDP), "FSDPModule", None)
    if kind is None:  # nobody has imported it
        return iter(())
    return (own for own in module.modules() if isinstance(own, kind))


def _is_own(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)
