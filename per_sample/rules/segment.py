"""`segment_reduce`, whose segments are told by a tensor with the same leading axes as the data."""

from __future__ import annotations

from typing import Any

import torch

from per_sample._batched import physical, samples
from per_sample._registry import rule

aten = torch.ops.aten


def _whole(x: Any, n: int) -> Any:
    """``[n, *shape]`` in one piece: the kernels read segments without a look at their strides."""
    return None if x is None else physical(x, n).contiguous()


@rule(aten.segment_reduce.default)
def segment_reduce(
    data: Any,
    reduce: str,
    *,
    lengths: Any = None,
    indices: Any = None,
    offsets: Any = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: Any = None,
) -> Any:
    n = samples(data, lengths, offsets)
    segments = {"lengths": _whole(lengths, n), "offsets": _whole(offsets, n), "axis": axis + 1}
    return aten.segment_reduce(_whole(data, n), reduce, **segments, unsafe=unsafe, initial=initial)


@rule(aten._segment_reduce_backward.default)
def segment_reduce_backward(
    grad: Any, output: Any, data: Any, reduce: str, *, lengths: Any = None, offsets: Any = None, axis: int = 0, initial: Any = None
) -> Any:
    n = samples(grad, output, data, lengths, offsets)
    tensors = [_whole(x, n) for x in (grad, output, data)]
    segments = {"lengths": _whole(lengths, n), "offsets": _whole(offsets, n), "axis": axis + 1}
    return aten._segment_reduce_backward(*tensors, reduce, **segments, initial=initial)
