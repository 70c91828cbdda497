"""Layer, RMS, group and weight norm.

Where the result may be differentiated once more (``functional``) the backward is written out in differentiable ops; the
statistics are then recomputed from the input, because torch hands them on without their derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, Context, physical, samples
from per_sample._combinators import at_rank
from per_sample._registry import rule

aten = torch.ops.aten


def context(*args: Any) -> Context:
    """The context of the first per-sample argument."""
    return next(a.ctx for a in args if type(a) is Batched)


def with_gradient(mean: Tensor, rstd: Tensor, x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """The same statistics as functions of ``x``."""
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    eps = (rstd.pow(-2) - var).detach()
    return mean, (var + eps).rsqrt()


def input_gradient(h: Tensor, xhat: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    """Through the normalisation itself; ``h`` is the gradient of ``xhat``."""
    return rstd * (h - h.mean(dims, keepdim=True) - xhat * (h * xhat).mean(dims, keepdim=True))


def affine(out: Tensor, weight: Any, bias: Any, ndim: int) -> Tensor:
    """Weight and bias of which at least one differs between samples."""
    if weight is not None:
        out = out * at_rank(weight, ndim)
    return out if bias is None else out + at_rank(bias, ndim)


def over_positions(per_position: Tensor, shape: Any) -> Tensor:
    """``[n, *shape]``: the sum over the positions in between."""
    n, size = per_position.shape[0], math.prod(shape)
    return per_position.reshape(n, -1, size).sum(1).view(n, *shape)


@rule(aten.native_layer_norm.default)
def native_layer_norm(input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    x = physical(input, samples(input, weight, bias))
    if type(weight) is Batched or type(bias) is Batched:
        out, mean, rstd = torch.native_layer_norm(x, normalized_shape, None, None, eps)
        return affine(out, weight, bias, input.dim()), mean, rstd
    return torch.native_layer_norm(x, normalized_shape, weight, bias, eps)


@rule(aten.native_layer_norm_backward.default)
def native_layer_norm_backward(
    grad_out: Any,
    input: Any,
    normalized_shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    bias: Any,
    output_mask: Any,
) -> Any:
    n = samples(grad_out, input, weight, mean)
    ctx = context(grad_out, input, weight, mean)
    g, x, mean, rstd = physical(grad_out, n), physical(input, n), physical(mean, n), physical(rstd, n)
    if ctx.functional:
        dims = list(range(-len(normalized_shape), 0))
        mean, rstd = with_gradient(mean, rstd, x, dims)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        if ctx.functional:
            h = g if weight is None else g * at_rank(weight, input.dim())
            grad_input = input_gradient(h, (x - mean) * rstd, rstd, dims).to(x.dtype)
        else:
            own = None if type(weight) is Batched else weight
            h = g * at_rank(weight, input.dim()) if type(weight) is Batched else g
            mask = (True, False, False)
            # The kernel reads the statistics by pointer: those of a shared input are expanded, which it does not see.
            stats = (mean.contiguous(), rstd.contiguous())
            grad_input, _, _ = aten.native_layer_norm_backward(h, x, normalized_shape, *stats, own, None, mask)
    if output_mask[1]:
        grad_weight = _scaled_sum(x - mean, g, rstd, normalized_shape, ctx.functional).to(weight.dtype)
    if output_mask[2]:
        grad_bias = over_positions(g, normalized_shape).to(bias.dtype)
    return grad_input, grad_weight, grad_bias


def _scaled_sum(centred: Tensor, g: Tensor, rstd: Tensor, shape: Any, functional: bool) -> Tensor:
    """The sum over the positions of ``centred * rstd * g``; ``centred`` is used up, to save a temporary of its size."""
    n, size = g.shape[0], math.prod(shape)
    product = centred * g if functional or centred.dtype != g.dtype else centred.mul_(g)
    product = product.reshape(n, -1, size)
    scale = rstd.reshape(n, 1, -1).to(product.dtype)
    if torch.compiler.is_compiling():
        # A product of matrices is a call that nothing is fused with.
        return (scale.transpose(1, 2) * product).sum(1).view(n, *shape)
    return torch.bmm(scale, product).view(n, *shape)


@rule(aten._fused_rms_norm.default)
def fused_rms_norm(input: Any, normalized_shape: Any, weight: Any, eps: float | None) -> Any:
    x = physical(input, samples(input, weight))
    if type(weight) is Batched:
        out, rstd = aten._fused_rms_norm(x, normalized_shape, None, eps)
        return affine(out, weight, None, input.dim()), rstd
    return aten._fused_rms_norm(x, normalized_shape, weight, eps)


@rule(aten._fused_rms_norm_backward.default)
def fused_rms_norm_backward(grad_out: Any, input: Any, normalized_shape: Any, rstd: Any, weight: Any, output_mask: Any) -> Any:
    n = samples(grad_out, input, weight, rstd)
    ctx = context(grad_out, input, weight, rstd)
    g, x, rstd = physical(grad_out, n), physical(input, n), physical(rstd, n)
    if ctx.functional:
        dims = list(range(-len(normalized_shape), 0))
        square = x.square().mean(dims, keepdim=True)
        rstd = (square + (rstd.pow(-2) - square).detach()).rsqrt()
    grad_input = grad_weight = None
    if output_mask[0]:
        grad_input = _rms_input_gradient(g, x, rstd, weight, normalized_shape, ctx.functional)
    if output_mask[1]:
        grad_weight = _scaled_sum(x * g, torch.ones_like(g), rstd, normalized_shape, True)
        grad_weight = grad_weight.to(weight.dtype)
    return grad_input, grad_weight


def _rms_input_gradient(g: Tensor, x: Tensor, rstd: Tensor, weight: Any, shape: Any, functional: bool) -> Tensor:
    h = g if weight is None else g * at_rank(weight, x.dim() - 1)
    dims = list(range(-len(shape), 0))
    xhat = x * rstd
    return (rstd * (h - xhat * (h * xhat).mean(dims, keepdim=True))).to(x.dtype)


@rule(aten.native_group_norm.default)
def native_group_norm(input: Any, weight: Any, bias: Any, N: int, C: int, HxW: int, group: int, eps: float) -> Any:
    n = samples(input, weight, bias)
    x = physical(input, n)
    own = type(weight) is Batched or type(bias) is Batched
    w, b = (None, None) if own else (weight, bias)
    out, mean, rstd = aten.native_group_norm(_dense(x.flatten(0, 1)), w, b, n * N, C, HxW, group, eps)
    out = out.view(x.shape)
    if own:
        channels = (1, C, *(1,) * (input.dim() - 2))
        out = affine_channels(out, weight, bias, channels)
    return out, mean.view(n, N, group), rstd.view(n, N, group)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _dense(x: Tensor) -> Tensor:
    """The kernels of group norm read memory in order, as none of an expanded or sliced batch lies."""
    order = _CHANNELS_LAST.get(x.dim())
    return x if order is not None and x.is_contiguous(memory_format=order) else x.contiguous()


def affine_channels(out: Tensor, weight: Any, bias: Any, channels: tuple[int, ...]) -> Tensor:
    """Weight and bias of one sample's shape ``[C]`` along the channels of ``out [n, b, C, ...]``."""
    if weight is not None:
        out = out * (weight.physical if type(weight) is Batched else weight).reshape(-1, *channels)
    return out if bias is None else out + (bias.physical if type(bias) is Batched else bias).reshape(-1, *channels)


@rule(aten.native_group_norm_backward.default)
def native_group_norm_backward(
    grad_out: Any,
    input: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    N: int,
    C: int,
    HxW: int,
    group: int,
    output_mask: Any,
) -> Any:
    """All samples' channels as those of one sample: the kernel then gives one weight gradient for each of them."""
    n = samples(grad_out, input, mean, weight)
    ctx = context(grad_out, input, mean, weight)
    g, x = physical(grad_out, n), physical(input, n)
    if ctx.functional:
        return _group_norm_backward(g, x, physical(rstd, n), weight, (N, C, HxW, group), output_mask)
    rows = n * N
    scale = None if weight is None else physical(weight, n).unsqueeze(1).expand(n, N, C).reshape(rows * C)
    grad_input, grad_weight, grad_bias = aten.native_group_norm_backward(
        g.reshape(1, rows * C, HxW).contiguous(),
        x.reshape(1, rows * C, HxW).contiguous(),
        physical(mean, n).reshape(1, rows * group).contiguous(),
        physical(rstd, n).reshape(1, rows * group).contiguous(),
        None if scale is None else scale.contiguous(),
        1,
        rows * C,
        HxW,
        rows * group,
        output_mask,
    )
    return (
        grad_input.view(x.shape) if output_mask[0] else None,
        grad_weight.view(n, N, C).sum(1) if output_mask[1] else None,
        grad_bias.view(n, N, C).sum(1) if output_mask[2] else None,
    )


def _group_norm_backward(g: Tensor, x: Tensor, rstd: Tensor, weight: Any, sizes: Any, output_mask: Any) -> Any:
    """In differentiable ops; the groups are ``[n, b, group, channel, position]``."""
    N, C, HxW, group = sizes
    n = x.shape[0]
    split = (n, N, group, C // group, HxW)
    xs, gs = x.reshape(split), g.reshape(split)
    dims = [3, 4]
    mean, rstd = with_gradient(rstd, rstd.reshape(n, N, group, 1, 1), xs, dims)
    xhat = (xs - mean) * rstd
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        h = gs if weight is None else gs * physical(weight, n).reshape(n, 1, group, C // group, 1)
        grad_input = input_gradient(h, xhat, rstd, dims).reshape(x.shape).to(x.dtype)
    if output_mask[1]:
        grad_weight = (gs * xhat).sum([1, 4]).reshape(n, C).to(weight.dtype)
    if output_mask[2]:
        grad_bias = gs.sum([1, 4]).reshape(n, C)
    return grad_input, grad_weight, grad_bias


@rule(aten._weight_norm_interface.default)
def weight_norm_interface(v: Any, g: Any, dim: int = 0) -> Any:
    n = samples(v, g)
    direction = physical(v, n)
    norms = _norms(direction, dim)
    return direction * (physical(g, n) / norms), norms


def _others(x: Tensor, dim: int) -> list[int]:
    """All axes of one sample but ``dim``."""
    return [i for i in range(1, x.dim()) if i != dim + 1]


def _norms(v: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(v, 2, _others(v, dim), keepdim=True)


@rule(aten._weight_norm_interface_backward.default)
def weight_norm_interface_backward(grad_w: Any, saved_v: Any, saved_g: Any, saved_norms: Any, dim: int) -> Any:
    n = samples(grad_w, saved_v, saved_g, saved_norms)
    grad, v, g = physical(grad_w, n), physical(saved_v, n), physical(saved_g, n)
    functional = context(grad_w, saved_v, saved_g, saved_norms).functional
    norms = _norms(v, dim) if functional else physical(saved_norms, n)
    grad_g = (grad * v).sum(_others(v, dim), keepdim=True) / norms
    return (grad - v * (grad_g / norms)) * (g / norms), grad_g
