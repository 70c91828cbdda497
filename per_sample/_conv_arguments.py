"""Arguments of convolutions as `torch.nn.functional` takes them: checked, and turned into a geometry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from per_sample._errors import ArgumentError
from per_sample._kernels.conv import ConvGeometry, conv_weight_grad

IntOrInts = int | Sequence[int]


def conv_weight(
    d: int,
    x: Tensor,
    weight_size: Sequence[int],
    g: Tensor,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
) -> Tensor:
    """`(n, *weight_size)` for `x (n, c, *s)` and `g (n, o, *l)`."""
    geometry, extra = _geometry(d, weight_size, stride, padding, dilation, groups)
    if x.dim() != d + 2:
        raise ArgumentError(f"`input` must have the axes n, c and {d} sizes; got {tuple(x.shape)}.")
    _check_channels(weight_size, x.shape[1], groups)
    x = _pad_end(x, extra)
    expect("grad_output", g, (x.shape[0], weight_size[0], *geometry.locations(x.shape[2:])))
    return conv_weight_grad(x[:, None], g[:, None], geometry)


def conv_input(
    d: int,
    input_size: Sequence[int],
    weight: Tensor,
    g: Tensor,
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
) -> Tensor:
    """`(n, c, *s)` for `weight (o, c / groups, *k)` and `g (n, o, *l)`."""
    geometry, extra = _geometry(d, weight.shape, stride, padding, dilation, groups)
    if len(input_size) != d + 2:
        raise ArgumentError(f"`input_size` must be n, c and {d} sizes; got {tuple(input_size)}.")
    _check_channels(weight.shape, input_size[1], groups)
    n, c, *sizes = input_size
    padded = [size + end for size, end in zip(sizes, extra, strict=True)]
    expect("grad_output", g, (n, weight.shape[0], *geometry.locations(padded)))
    # The operator reads only the shape of the input.
    like = g.new_empty(1).expand(n, c, *padded)
    settings = (geometry.stride, geometry.padding, geometry.dilation, False, [0] * d, groups)
    wanted = (True, False, False)
    grad: Tensor = torch.ops.aten.convolution_backward(g, like, weight, None, *settings, wanted)[0]
    for axis, size in enumerate(sizes, start=2):
        grad = grad.narrow(axis, 0, size)
    return grad


def expect(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise unless the tensor has this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ArgumentError(f"`{name}` must have the shape {tuple(shape)}; got {tuple(tensor.shape)}.")


def _geometry(
    d: int,
    weight_size: Sequence[int],
    stride: IntOrInts,
    padding: IntOrInts | str,
    dilation: IntOrInts,
    groups: int,
) -> tuple[ConvGeometry, tuple[int, ...]]:
    """The geometry, and the zeros that "same" puts at the end of each axis beyond those at both ends."""
    if len(weight_size) != d + 2:
        raise ArgumentError(f"The weight must have the axes o, i and {d} sizes; got {tuple(weight_size)}.")
    kernel = tuple(weight_size[2:])
    strides, dilations = _each("stride", stride, d, 1), _each("dilation", dilation, d, 1)
    if groups < 1:
        raise ArgumentError(f"`groups` must be at least 1; got {groups}.")
    extra: tuple[int, ...] = (0,) * d
    if padding == "same":
        if any(step != 1 for step in strides):
            raise ArgumentError(f'`padding="same"` needs a stride of 1; got {stride}.')
        total = [step * (k - 1) for step, k in zip(dilations, kernel, strict=True)]
        paddings, extra = tuple(p // 2 for p in total), tuple(p % 2 for p in total)
    elif padding == "valid":
        paddings = (0,) * d
    elif isinstance(padding, str):
        raise ArgumentError(f'`padding` must be integers, "same" or "valid"; got {padding!r}.')
    else:
        paddings = _each("padding", padding, d, 0)
    return ConvGeometry(kernel, strides, paddings, dilations, groups), extra


def _each(name: str, value: IntOrInts, d: int, least: int) -> tuple[int, ...]:
    values = (value,) * d if isinstance(value, int) else tuple(value)
    values = values * d if len(values) == 1 else values
    if len(values) != d or any(entry < least for entry in values):
        raise ArgumentError(f"`{name}` must be an integer or {d} integers, each at least {least}; got {value}.")
    return values


def _check_channels(weight_size: Sequence[int], channels: int, groups: int) -> None:
    if weight_size[1] * groups != channels or weight_size[0] % groups:
        raise ArgumentError(
            f"The weight {tuple(weight_size)} with {groups} groups needs {weight_size[1] * groups} input "
            f"channels, and output channels that the groups divide; got {channels} input channels."
        )


def _pad_end(x: Tensor, extra: Sequence[int]) -> Tensor:
    if not any(extra):
        return x
    return F.pad(x, [p for end in reversed(extra) for p in (0, end)])
