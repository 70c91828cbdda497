"""Pointwise ops that torch does not tag as such, or whose tag does not tell enough."""

from __future__ import annotations

from typing import Any

import torch

from per_sample._batched import Batched, context_of, physical
from per_sample._combinators import at_rank, pointwise_table
from per_sample._guards import refuse_random
from per_sample._pointwise import pointwise
from per_sample._registry import rule

aten = torch.ops.aten

pointwise_table(
    aten.abs_.default,
    aten.copysign_.Scalar,
    aten.copysign_.Tensor,
    aten.eq_.Scalar,
    aten.eq_.Tensor,
    aten.ne_.Scalar,
    aten.ne_.Tensor,
    aten.lt_.Scalar,
    aten.lt_.Tensor,
    aten.le_.Scalar,
    aten.le_.Tensor,
    aten.gt_.Scalar,
    aten.gt_.Tensor,
    aten.ge_.Scalar,
    aten.ge_.Tensor,
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.floor_divide_.Scalar,
    aten.floor_divide_.Tensor,
    aten.gelu_.default,
    aten.celu_.default,
    aten.elu_.default,
    aten.hardsigmoid_.default,
    aten.hardtanh_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.selu_.default,
    aten._conj_physical.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.heaviside_.default,
    aten.mish_.default,
    aten.rsub.Tensor,
    aten.threshold_.default,
    aten.xlogy_.Scalar_Other,
    aten.zero.default,
    aten.fill.Scalar,
    aten.fill_.Scalar,
    aten.zero_.default,
    aten.masked_fill_.Scalar,
    aten.hardtanh_backward.default,
    aten.elu_backward.default,
    aten.softplus_backward.default,
    aten.leaky_relu_backward.default,
    aten.hardswish_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardshrink_backward.default,
    aten.softshrink_backward.default,
    aten.rrelu_with_noise_backward.default,
    aten.polar.default,
    aten.complex.default,
    aten._prelu_kernel.default,
    aten._prelu_kernel_backward.default,
)


@rule(aten.masked_fill.Tensor)
def masked_fill(self: Any, mask: Any, value: Any) -> Any:
    """A value that differs between samples is no longer the 0-dim tensor that torch's own kernel asks for."""
    if type(value) is not Batched:
        return _masked_fill(self, mask, value)
    ndim = max(self.dim(), mask.dim())
    return torch.where(at_rank(mask, ndim), at_rank(value, ndim).to(self.dtype), at_rank(self, ndim))


_masked_fill = pointwise(aten.masked_fill.Tensor)


@rule(aten.masked_fill_.Tensor)
def masked_fill_(self: Any, mask: Any, value: Any) -> Any:
    target = self.physical
    if type(value) is not Batched:
        return target.masked_fill_(at_rank(mask, self.dim()), value)
    filled = torch.where(at_rank(mask, self.dim()), at_rank(value, self.dim()).to(target.dtype), target)
    return target.copy_(filled)


@rule(aten.fill.Tensor)
def fill(self: Any, value: Any) -> Any:
    n = self.n if type(self) is Batched else value.n
    shape = (n, *self.shape)
    return at_rank(value, self.dim()).to(self.dtype).expand(shape).clone()


@rule(aten.fill_.Tensor)
def fill_(self: Any, value: Any) -> Any:
    return self.physical.copy_(at_rank(value, self.dim()))


@rule(aten.copy_.default)
def copy_(self: Any, src: Any, non_blocking: bool = False) -> Any:
    return self.physical.copy_(at_rank(src, self.dim()), non_blocking)


@rule(aten.log_sigmoid_forward.default)
def log_sigmoid_forward(self: Any) -> Any:
    """On a GPU the buffer that the CPU kernel fills is empty."""
    out, buffer = aten.log_sigmoid_forward(self.physical)
    return out, buffer if buffer.dim() == out.dim() else buffer.new_empty(self.n, 0)


@rule(aten.log_sigmoid_backward.default)
def log_sigmoid_backward(grad_output: Any, self: Any, buffer: Any) -> Any:
    ndim = max(grad_output.dim(), self.dim())
    values = [at_rank(a, ndim) for a in (grad_output, self, buffer)]
    if buffer.shape != self.shape:
        values[2] = buffer.physical[0]
    return aten.log_sigmoid_backward(*values)


_silu_backward = pointwise(aten.silu_backward.default)
_mish_backward = pointwise(aten.mish_backward.default)


@rule(aten.silu_backward.default)
def silu_backward(grad_output: Any, self: Any) -> Any:
    """The fused kernel has no derivative of its own."""
    if not _functional(grad_output, self):
        return _silu_backward(grad_output, self)
    g, x = at_rank(grad_output, self.dim()), at_rank(self, self.dim())
    s = torch.sigmoid(x)
    return g * s * (1 + x * (1 - s))


@rule(aten.mish_backward.default)
def mish_backward(grad_output: Any, self: Any) -> Any:
    """The fused kernel has no derivative of its own."""
    if not _functional(grad_output, self):
        return _mish_backward(grad_output, self)
    g, x = at_rank(grad_output, self.dim()), at_rank(self, self.dim())
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    return g * (t + x * s * (1 - t * t))


def _functional(*args: Any) -> bool:
    return next(a.ctx.functional for a in args if type(a) is Batched)


@rule(aten.rrelu_with_noise.default)
def rrelu_with_noise(self: Any, noise: Any, lower: Any = 0.125, upper: Any = 1 / 3, training: bool = False, generator: Any = None) -> Any:
    """Slopes are drawn for each element alone, in training; otherwise there is no noise."""
    op = aten.rrelu_with_noise.default
    if not training:
        return op(self.physical, torch.empty_like(self.physical), lower, upper)
    ctx = context_of(self, noise)
    if ctx.randomness == "error":
        refuse_random(op)
    x, drawn = physical(self, ctx.n), torch.empty_like(noise.physical, memory_format=torch.contiguous_format)
    if ctx.randomness == "same":
        # As for each sample alone from the same seed: its k-th negative element takes the k-th number.
        numbers = torch.empty_like(drawn[0]).flatten()
        op(torch.full_like(numbers, -1.0), numbers, lower, upper, True, generator)
        negative = (x <= 0).reshape(ctx.n, -1)
        place = negative.cumsum(1).sub(1).clamp(min=0)
        drawn = torch.where(negative, numbers[place], 1).view(x.shape)
    else:
        op(x.contiguous(), drawn, lower, upper, True, generator)
    noise.physical.copy_(drawn)
    return x * drawn


@rule(aten.rrelu_with_noise_.default)
def rrelu_with_noise_(self: Any, noise: Any, lower: Any = 0.125, upper: Any = 1 / 3, training: bool = False, generator: Any = None) -> Any:
    return self.physical.copy_(rrelu_with_noise(self, noise, lower, upper, training, generator))
