"""Per-sample counterparts of `torch.nn.grad`: each sample's own weight gradient from one call.

All are differentiable, and work under functorch transforms and `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from per_sample._conv_arguments import conv_input, conv_weight, expect
from per_sample._errors import ArgumentError
from per_sample._kernels.outer import outer_product
from per_sample._kernels.rows import scatter_rows

__all__ = [
    "conv1d_input",
    "conv1d_weight",
    "conv2d_input",
    "conv2d_weight",
    "conv3d_input",
    "conv3d_weight",
    "embedding_weight",
    "linear_weight",
]


def conv1d_weight(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Each sample's gradient of the weight of `torch.nn.functional.conv1d`.

    The counterpart of `torch.nn.grad.conv1d_weight`, which sums over the samples.

    Args:
        input: `(n, c, s)`.
        weight_size: `(o, c / groups, k)`.
        grad_output: the gradient of the output, `(n, o, l)`.
        stride, padding, dilation, groups: as in the convolution, with "same" and "valid" padding.

    Returns:
        `(n, o, c / groups, k)`.

    Raises:
        ArgumentError: a shape or a setting does not fit the others.

    Example:
        >>> conv1d_weight(torch.ones(4, 2, 7), (3, 2, 3), torch.ones(4, 3, 5)).shape
        torch.Size([4, 3, 2, 3])
    """
    return conv_weight(1, input, weight_size, grad_output, stride, padding, dilation, groups)


def conv1d_input(
    input_size: Sequence[int],
    weight: Tensor,
    grad_output: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Each sample's gradient of the input of `torch.nn.functional.conv1d`.

    The counterpart of `torch.nn.grad.conv1d_input`, and equal to it: an input gradient is per sample already.

    Args:
        input_size: `(n, c, s)`.
        weight: `(o, c / groups, k)`.
        grad_output: the gradient of the output, `(n, o, l)`.
        stride, padding, dilation, groups: as in the convolution, with "same" and "valid" padding.

    Returns:
        `(n, c, s)`.

    Raises:
        ArgumentError: a shape or a setting does not fit the others.

    Example:
        >>> conv1d_input((4, 2, 7), torch.ones(3, 2, 3), torch.ones(4, 3, 5)).shape
        torch.Size([4, 2, 7])
    """
    return conv_input(1, input_size, weight, grad_output, stride, padding, dilation, groups)


def conv2d_weight(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Each sample's gradient of the weight of `torch.nn.functional.conv2d`.

    The counterpart of `torch.nn.grad.conv2d_weight`, which sums over the samples.

    Args:
        input: `(n, c, s0, s1)`.
        weight_size: `(o, c / groups, k0, k1)`.
        grad_output: the gradient of the output, `(n, o, l0, l1)`.
        stride, padding, dilation, groups: as in the convolution, with "same" and "valid" padding.

    Returns:
        `(n, o, c / groups, k0, k1)`.

    Raises:
        ArgumentError: a shape or a setting does not fit the others.

    Example:
        >>> conv2d_weight(torch.ones(4, 2, 7, 8), (3, 2, 3, 2), torch.ones(4, 3, 5, 7)).shape
        torch.Size([4, 3, 2, 3, 2])
    """
    return conv_weight(2, input, weight_size, grad_output, stride, padding, dilation, groups)


def conv2d_input(
    input_size: Sequence[int],
    weight: Tensor,
    grad_output: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Each sample's gradient of the input of `torch.nn.functional.conv2d`.

    The counterpart of `torch.nn.grad.conv2d_input`, and equal to it: an input gradient is per sample already.

    Args:
        input_size: `(n, c, s0, s1)`.
        weight: `(o, c / groups, k0, k1)`.
        grad_output: the gradient of the output, `(n, o, l0, l1)`.
        stride, padding, dilation, groups: as in the convolution, with "same" and "valid" padding.

    Returns:
        `(n, c, s0, s1)`.

    Raises:
        ArgumentError: a shape or a setting does not fit the others.

    Example:
        >>> conv2d_input((4, 2, 7, 8), torch.ones(3, 2, 3, 2), torch.ones(4, 3, 5, 7)).shape
        torch.Size([4, 2, 7, 8])
    """
    return conv_input(2, input_size, weight, grad_output, stride, padding, dilation, groups)


def conv3d_weight(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Each sample's gradient of the weight of `torch.nn.functional.conv3d`.

    The counterpart of `torch.nn.grad.conv3d_weight`, which sums over the samples.

    Args:
        input: `(n, c, s0, s1, s2)`.
        weight_size: `(o, c / groups, k0, k1, k2)`.
        grad_output: the gradient of the output, `(n, o, l0, l1, l2)`.
        stride, padding, dilation, groups: as in the convolution, with "same" and "valid" padding.

    Returns:
        `(n, o, c / groups, k0, k1, k2)`.

    Raises:
        ArgumentError: a shape or a setting does not fit the others.

    Example:
        >>> conv3d_weight(torch.ones(4, 2, 7, 8, 4), (3, 2, 3, 2, 1), torch.ones(4, 3, 5, 7, 4)).shape
        torch.Size([4, 3, 2, 3, 2, 1])
    """
    return conv_weight(3, input, weight_size, grad_output, stride, padding, dilation, groups)


def conv3d_input(
    input_size: Sequence[int],
    weight: Tensor,
    grad_output: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Each sample's gradient of the input of `torch.nn.functional.conv3d`.

    The counterpart of `torch.nn.grad.conv3d_input`, and equal to it: an input gradient is per sample already.

    Args:
        input_size: `(n, c, s0, s1, s2)`.
        weight: `(o, c / groups, k0, k1, k2)`.
        grad_output: the gradient of the output, `(n, o, l0, l1, l2)`.
        stride, padding, dilation, groups: as in the convolution, with "same" and "valid" padding.

    Returns:
        `(n, c, s0, s1, s2)`.

    Raises:
        ArgumentError: a shape or a setting does not fit the others.

    Example:
        >>> conv3d_input((4, 2, 7, 8, 4), torch.ones(3, 2, 3, 2, 1), torch.ones(4, 3, 5, 7, 4)).shape
        torch.Size([4, 2, 7, 8, 4])
    """
    return conv_input(3, input_size, weight, grad_output, stride, padding, dilation, groups)


def linear_weight(input: Tensor, weight_size: Sequence[int], grad_output: Tensor) -> Tensor:
    """Each sample's gradient of the weight of `torch.nn.functional.linear`.

    `torch.nn.grad` has no counterpart; summed over samples it is `grad_output.T @ input`.

    Args:
        input: `(n, *, i)`; axes between the first and the last are positions to sum over.
        weight_size: `(o, i)`.
        grad_output: the gradient of the output, `(n, *, o)`.

    Returns:
        `(n, o, i)`.

    Raises:
        ArgumentError: the shapes do not fit each other.

    Example:
        >>> linear_weight(torch.ones(4, 7, 2), (3, 2), torch.ones(4, 7, 3)).shape
        torch.Size([4, 3, 2])
    """
    if len(weight_size) != 2:
        raise ArgumentError(f"`weight_size` must be (o, i); got {tuple(weight_size)}.")
    o, i = weight_size
    if input.dim() < 2 or input.shape[-1] != i:
        raise ArgumentError(f"`input` must be (n, *, {i}) for the weight ({o}, {i}); got {tuple(input.shape)}.")
    expect("grad_output", grad_output, (*input.shape[:-1], o))
    if input.dim() == 2:
        input, grad_output = input[:, None], grad_output[:, None]
    return outer_product(grad_output.flatten(1, -2).transpose(1, 2), input.flatten(1, -2))


def embedding_weight(
    indices: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Each sample's gradient of the weight of `torch.nn.functional.embedding`.

    `torch.nn.grad` has no counterpart.

    Args:
        indices: integers, `(n, *)`.
        weight_size: `(v, d)`, the number of embeddings and their size.
        grad_output: the gradient of the output, `(n, *, d)`.
        padding_idx: the row without a gradient; negative counts from the end.
        scale_grad_by_freq: divide by how often an index occurs within its sample.

    Returns:
        `(n, v, d)`.

    Raises:
        ArgumentError: the shapes do not fit each other, or `padding_idx` is no row of the weight.

    Example:
        >>> embedding_weight(torch.tensor([[0, 2], [2, 2]]), (3, 1), torch.ones(2, 2, 1)).squeeze(-1)
        tensor([[1., 0., 1.],
                [0., 0., 2.]])
    """
    if len(weight_size) != 2:
        raise ArgumentError(f"`weight_size` must be (v, d); got {tuple(weight_size)}.")
    v, d = weight_size
    if indices.dim() == 0 or indices.is_floating_point() or indices.is_complex():
        raise ArgumentError(f"`indices` must be integers (n, *); got {indices.dtype} {tuple(indices.shape)}.")
    expect("grad_output", grad_output, (*indices.shape, d))
    if padding_idx is not None and not -v <= padding_idx < v:
        raise ArgumentError(f"`padding_idx` must be within [{-v}, {v}); got {padding_idx}.")
    index = (indices.flatten(1) if indices.dim() > 1 else indices[:, None]).long()
    grads = grad_output.reshape(*index.shape, d)
    if scale_grad_by_freq:
        counts = index.new_zeros(index.shape[0], v).scatter_add(1, index, torch.ones_like(index))
        grads = grads / counts.gather(1, index)[..., None]
    if padding_idx is not None:
        grads = grads.masked_fill((index == padding_idx % v)[..., None], 0)
    return scatter_rows(index, grads, v)
