"""What a frozen `nn.TransformerEncoder` in evaluation mode asks before it takes torch's fused kernel, which drops padded positions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from per_sample._batched import physical
from per_sample._errors import UnsupportedError
from per_sample._registry import rule

if TYPE_CHECKING:
    from types import FrameType

    from torch import Tensor

aten = torch.ops.aten
_FORWARD = nn.TransformerEncoder.forward.__code__


@rule(aten._nested_tensor_from_mask_left_aligned.default)
def nested_tensor_from_mask_left_aligned(t: Any, mask: Any) -> Any:
    """The op itself is left to the loop; refused is what torch would do with a yes."""
    valid = physical(mask, t.n if hasattr(t, "n") else mask.n).flatten(1, -2)
    aligned = (valid[..., :-1] >= valid[..., 1:]).all(-1).all(-1)
    if _is_frozen() and bool((aligned & ~valid.all(-1).all(-1)).any()):
        raise UnsupportedError(
            "Where nothing in a `nn.TransformerEncoder` is differentiated, torch takes a fused kernel in evaluation mode whose outputs are "
            "zero at padded positions, and otherwise are not. It cannot be taken here; to compute the same everywhere, call "
            "`torch.backends.mha.set_fastpath_enabled(False)`, or pass `enable_nested_tensor=False` to the encoder."
        )
    return NotImplemented


def _is_frozen() -> bool:
    """Whether autograd would record nothing in the encoder that asks, so that torch may take the fused kernel."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _FORWARD:
        frame = frame.f_back
    if frame is None:
        return False
    tensors: list[Tensor] = [frame.f_locals["src"], *frame.f_locals["self"].parameters()]
    with torch._C.DisableTorchFunction():
        return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
