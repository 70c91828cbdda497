"""When a kernel must be made of ordinary differentiable operators."""

from __future__ import annotations

import torch
from torch import Tensor


def must_be_functional(*tensors: Tensor) -> bool:
    """Whether anything but these tensors' values is asked for (derivatives, a transform, a trace), or they have none."""
    differentiates = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return True
        if tensor.is_meta or (differentiates and tensor.requires_grad):
            return True
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
