"""The `*_copy` ops: the rule of the view, copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from per_sample._combinators import table
from per_sample._registry import TABLE, rule
from per_sample.rules import strided, view  # noqa: F401  (they hold the rules looked up here)

aten = torch.ops.aten


def _copied(op: OpOverload) -> Any:
    name = op._schema.name.removeprefix("aten::").removesuffix("_copy")
    plain = TABLE[getattr(getattr(aten, name), op._overloadname)].run

    def run(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        if isinstance(out, (tuple, list)):
            return [x.clone() for x in out]
        # A factor makes a tensor of its own once it is materialised.
        return out.clone() if isinstance(out, Tensor) else out

    run.__qualname__ = f"copied({op})"
    return run


table(
    _copied,
    aten.alias_copy.default,
    aten.as_strided_copy.default,
    aten.diagonal_copy.default,
    aten.expand_copy.default,
    aten.permute_copy.default,
    aten.split_with_sizes_copy.default,
    aten.squeeze_copy.default,
    aten.squeeze_copy.dim,
    aten.squeeze_copy.dims,
    aten.t_copy.default,
    aten.transpose_copy.int,
    aten.unbind_copy.int,
    aten.unfold_copy.default,
    aten.unsqueeze_copy.default,
)


@rule(aten.view_copy.default)
def view_copy(self: Any, size: Any) -> Any:
    """Unlike the view, of any strides."""
    return self.physical.reshape(self.n, *size).clone()
