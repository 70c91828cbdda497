"""Convolutions and transposed convolutions of every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._factors import ConvOuter, Factor
from per_sample._kernels.conv import ConvGeometry
from per_sample._registry import rule

aten = torch.ops.aten


def _samples_in_channels(x: Any, n: int) -> Tensor:
    """``[b, n * C, *S]``: each sample a group of channels, for a weight that differs between samples."""
    return physical(x, n).transpose(0, 1).flatten(1, 2)


def _rows(x: Tensor) -> Tensor:
    """``[n * b, C, *S]``."""
    shape = x.shape
    return x.reshape(shape[0] * shape[1], *shape[2:])


def _out_of_channels(x: Tensor, n: int) -> Tensor:
    return x.unflatten(1, (n, -1)).transpose(0, 1)


@rule(aten.convolution.default)
def convolution(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    """A shared weight meets all samples as one batch; with a weight per sample the samples are groups."""
    if input.dim() != weight.dim():
        return NotImplemented
    n = samples(input, weight, bias)
    own = None if type(bias) is Batched else bias
    if type(weight) is Batched:
        filters = weight.physical.flatten(0, 1)
        image = _samples_in_channels(input, n)
        out = torch.convolution(image, filters, None, stride, padding, dilation, transposed, output_padding, n * groups)
        out = _out_of_channels(out, n)
        added = bias
    else:
        value = physical(input, n)
        out = torch.convolution(_rows(value), weight, own, stride, padding, dilation, transposed, output_padding, groups)
        out = out.view(*value.shape[:2], *out.shape[1:])
        added = bias if own is None else None
    if added is None:
        return out
    # `[n | 1, 1, O, 1, ...]`
    return out + (added.physical if type(added) is Batched else added.unsqueeze(0)).reshape(
        -1, 1, added.shape[0], *(1,) * (weight.dim() - 2)
    )


@rule(aten.convolution_backward.default)
def convolution_backward(
    grad_output: Any,
    input: Any,
    weight: Any,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
) -> Any:
    """Input gradient by one folded kernel, weight gradient as a ``ConvOuter``, bias gradient by a sum."""
    if input.dim() != weight.dim():
        return NotImplemented
    n = samples(grad_output, input, weight)
    g, x = physical(grad_output, n), physical(input, n)
    kernel = tuple(weight.shape[2:])
    d = len(kernel)
    geometry = ConvGeometry(kernel, _each(stride, d), _each(padding, d), _each(dilation, d), groups)
    grad_weight: Any = None
    grad_input = grad_bias = None
    if output_mask[1]:
        factor = _weight_gradient(x, g, geometry, transposed)
        if factor is None:
            return NotImplemented
        ctx = next(a.ctx for a in (grad_output, input, weight) if type(a) is Batched)
        grad_weight = factor if ctx.backward else factor.materialize(functional=ctx.functional)
    if output_mask[0]:
        rest = (stride, padding, dilation, transposed, output_padding)
        grad_input = _input_gradient(g, x, weight, rest, groups)
    if output_mask[2]:
        grad_bias = g.sum([1, *range(3, g.dim())])
    return grad_input, grad_weight, grad_bias


def _each(values: Any, d: int) -> tuple[int, ...]:
    """One value for each spatial axis: a single one stands for all."""
    return tuple(values) * d if len(values) == 1 else tuple(values)


def _weight_gradient(x: Tensor, g: Tensor, geometry: ConvGeometry, transposed: bool) -> Factor | None:
    """In a transposed convolution input and output change places; None where the output reaches beyond all windows."""
    if not transposed:
        return ConvOuter(x, g, geometry)
    if geometry.locations(tuple(g.shape[3:])) != tuple(x.shape[3:]):
        return None
    return ConvOuter(g, x, geometry)


def _input_gradient(g: Tensor, x: Tensor, weight: Any, rest: Any, groups: int) -> Tensor:
    mask = (True, False, False)
    n, b = x.shape[:2]
    if type(weight) is Batched:
        image, grad = x.transpose(0, 1).flatten(1, 2), g.transpose(0, 1).flatten(1, 2)
        filters = weight.physical.flatten(0, 1)
        out, _, _ = aten.convolution_backward(grad, image, filters, None, *rest, n * groups, mask)
        return _out_of_channels(out, n)
    out, _, _ = aten.convolution_backward(_rows(g), _rows(x), weight, None, *rest, groups, mask)
    return out.view(n, b, *out.shape[1:])
