"""Batch norm with fixed statistics, and with each sample's own (which is what instance norm amounts to).

Running statistics updated from a batch mix the samples, so there is no per-sample gradient to give: those forms are
refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._errors import BatchNormError
from per_sample._registry import register, rule
from per_sample.rules.norm import affine_channels

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch._ops import OpOverload

aten = torch.ops.aten


def _refuse() -> NoReturn:
    raise BatchNormError(
        "Batch normalisation in training mode (or instance normalisation with running statistics) takes its statistics from the batch "
        "and updates the running ones, so it mixes samples and no sample has a gradient of its own. Call `.eval()` on the module, or "
        "use `torch.nn.GroupNorm`, or instance norm without running statistics, which normalise each sample by itself."
    )


def _forward(input: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float) -> Any:
    """``(out, save_mean, save_invstd)`` of every sample."""
    n = samples(input, weight, bias, mean, var)
    if training and mean is not None:
        _refuse()
    if training:
        return _own_statistics(physical(input, n), weight, bias, momentum, eps, n)
    x = physical(input, n)
    channels = (1, input.shape[1], *(1,) * (input.dim() - 2))
    if any(type(a) is Batched for a in (weight, bias, mean, var)):
        rstd = (physical(var, n) + eps).rsqrt().reshape(n, *channels)
        out = (x - physical(mean, n).reshape(n, *channels)) * rstd
        out = affine_channels(out, weight, bias, channels).to(x.dtype)
    else:
        out = aten.native_batch_norm(x.flatten(0, 1), weight, bias, mean, var, False, momentum, eps)[0].view(x.shape)
    return out, x.new_empty(n, 0), x.new_empty(n, 0)


def _samples_in_channels(x: Tensor) -> Tensor:
    """``[n, b, C, *S]`` to ``[b, n * C, *S]``."""
    return x.transpose(0, 1).flatten(1, 2)


def _out_of_channels(x: Tensor, n: int) -> Tensor:
    return x.unflatten(1, (n, -1)).transpose(0, 1)


def _per_channel(x: Any, n: int) -> Tensor | None:
    return None if x is None else physical(x, n).reshape(-1).contiguous()


def _own_statistics(x: Tensor, weight: Any, bias: Any, momentum: float, eps: float, n: int) -> Any:
    """Each channel of each sample is a channel of its own."""
    out, mean, invstd = aten.native_batch_norm(
        _samples_in_channels(x), _per_channel(weight, n), _per_channel(bias, n), None, None, True, momentum, eps
    )
    return _out_of_channels(out, n), mean.view(n, -1), invstd.view(n, -1)


@rule(aten.native_batch_norm.default)
def native_batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    return _forward(input, weight, bias, running_mean, running_var, training, momentum, eps)


@rule(aten._native_batch_norm_legit.no_stats)
def native_batch_norm_legit_no_stats(input: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float) -> Any:
    return _forward(input, weight, bias, None, None, training, momentum, eps)


@rule(aten._native_batch_norm_legit_no_training.default)
def native_batch_norm_legit_no_training(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float
) -> Any:
    return _forward(input, weight, bias, running_mean, running_var, False, momentum, eps)


@rule(aten._batch_norm_no_update.default)
def batch_norm_no_update(input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float) -> Any:
    out = _forward(input, weight, bias, running_mean, running_var, False, momentum, eps)
    return *out, torch.empty(out[0].shape[0], 0, dtype=torch.uint8, device=out[0].device)


@rule(aten.cudnn_batch_norm.default)
def cudnn_batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    exponential_average_factor: float,
    epsilon: float,
) -> Any:
    """cuDNN's reserve is empty, and its backward rule, too, goes to the native kernel."""
    out = _forward(input, weight, bias, running_mean, running_var, training, exponential_average_factor, epsilon)
    return *out, torch.empty(out[0].shape[0], 0, dtype=torch.uint8, device=out[0].device)


@rule(aten.miopen_batch_norm.default)
def miopen_batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    exponential_average_factor: float,
    epsilon: float,
) -> Any:
    return _forward(input, weight, bias, running_mean, running_var, training, exponential_average_factor, epsilon)


def _refusing(op: OpOverload) -> Callable[..., Any]:
    """The rule of an op that updates running statistics; with ``training=False`` it is left to the fallback."""
    at = [a.name for a in op._schema.arguments].index("training") if "training" in str(op._schema) else None

    def run(*args: Any, **kwargs: Any) -> Any:
        if at is None or args[at]:
            _refuse()
        return NotImplemented

    run.__qualname__ = f"refusing({op})"
    return run


for _op in (
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_functional.default,
    aten._batch_norm_with_update.default,
    aten._batch_norm_with_update_functional.default,
):
    register(_op, _refusing(_op), "rule")


def _backward(
    grad_out: Any,
    input: Any,
    weight: Any,
    mean: Any,
    var: Any,
    save_mean: Any,
    save_invstd: Any,
    train: bool,
    eps: float,
    mask: Any,
) -> Any:
    n = samples(grad_out, input, weight, mean, var)
    g, x = physical(grad_out, n), physical(input, n)
    if not train:
        return _fixed_backward(g, x, weight, physical(mean, n), (physical(var, n) + eps).rsqrt(), mask)
    grad_input, grad_weight, grad_bias = aten.native_batch_norm_backward(
        _samples_in_channels(g),
        _samples_in_channels(x),
        _per_channel(weight, n),
        None,
        None,
        _per_channel(save_mean, n),
        _per_channel(save_invstd, n),
        True,
        eps,
        mask,
    )
    return (
        _out_of_channels(grad_input, n) if mask[0] else None,
        grad_weight.view(n, -1) if mask[1] else None,
        grad_bias.view(n, -1) if mask[2] else None,
    )


def _fixed_backward(g: Tensor, x: Tensor, weight: Any, mean: Tensor, rstd: Tensor, mask: Any) -> Any:
    """With fixed statistics batch norm is a product and a sum for each channel."""
    n, ones = x.shape[0], (1,) * (x.dim() - 3)
    positions = [1, *range(3, x.dim())]
    grad_input = grad_weight = grad_bias = None
    if mask[0]:
        scale = rstd if weight is None else rstd * physical(weight, n)
        grad_input = (g * scale.reshape(n, 1, -1, *ones)).to(x.dtype)
    if mask[2] or mask[1]:
        grad_bias = g.sum(positions)
    if mask[1]:
        grad_weight = ((g * (x - mean.reshape(n, 1, -1, *ones))).sum(positions) * rstd).to(weight.dtype)
    return grad_input, grad_weight, grad_bias if mask[2] else None


@rule(aten.native_batch_norm_backward.default)
def native_batch_norm_backward(
    grad_out: Any,
    input: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    save_mean: Any,
    save_invstd: Any,
    train: bool,
    eps: float,
    output_mask: Any,
) -> Any:
    return _backward(grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps, output_mask)


@rule(aten.batch_norm_backward.default)
def batch_norm_backward(
    grad_out: Any,
    input: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    save_mean: Any,
    save_var: Any,
    update: bool,
    eps: float,
    output_mask: Any,
    reserve: Any,
) -> Any:
    return _backward(grad_out, input, weight, running_mean, running_var, save_mean, save_var, update, eps, output_mask)


@rule(aten.cudnn_batch_norm_backward.default)
def cudnn_batch_norm_backward(
    input: Any,
    grad_output: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    save_mean: Any,
    save_var: Any,
    epsilon: float,
    reserveSpace: Any,
) -> Any:
    mask = (True, True, True)
    return _backward(grad_output, input, weight, running_mean, running_var, save_mean, save_var, True, epsilon, mask)
