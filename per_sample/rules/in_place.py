"""In-place ops whose rule is that of the op without the underscore: its result goes into the target."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from per_sample._combinators import table
from per_sample._errors import UnsupportedError
from per_sample._registry import TABLE
from per_sample.rules import index, linear, masked, reduce, take  # noqa: F401  (they hold the rules looked up here)

aten = torch.ops.aten


def _written_back(op: OpOverload) -> Any:
    """The rule of ``op_`` from the one of ``op``; the target keeps its size and dtype."""
    name = op._schema.name.removeprefix("aten::").removesuffix("_")
    plain = TABLE[getattr(getattr(aten, name), op._overloadname)].run

    def run(*args: Any, **kwargs: Any) -> Any:
        target = args[0]
        out = plain(*args, **kwargs)
        if out is NotImplemented:
            return out
        if out.shape[1:] != target.shape:
            raise UnsupportedError(
                f"`{op}` would change the shape of its target from {list(target.shape)} to {list(out.shape[1:])}; use the form that "
                "returns its result."
            )
        return target.physical.copy_(out)

    run.__qualname__ = f"written_back({op})"
    return run


table(
    _written_back,
    aten.addmm_.default,
    aten.addmv_.default,
    aten.addr_.default,
    aten.addbmm_.default,
    aten.baddbmm_.default,
    aten.cumsum_.default,
    aten.cumprod_.default,
    aten.index_copy_.default,
    aten.index_fill_.int_Scalar,
    aten.index_fill_.int_Tensor,
    aten.scatter_reduce_.two,
    aten.index_reduce_.default,
    aten.masked_scatter_.default,
    aten.put_.default,
    aten.renorm_.default,
)
