"""Where torch compiles parts of an eager program (`torch.cond`, a compiled module), dynamo must leave the library alone."""

from __future__ import annotations

from typing import Any

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

_SKIP = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)


def skip(function: Any) -> None:
    """Run a function, and what it calls, as it is."""
    set_code_exec_strategy(function.__code__, _SKIP)
