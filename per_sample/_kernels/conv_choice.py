"""Which algorithm computes a convolution's per-sample weight gradients, and how many samples at a time.

Both are functions of shapes alone, so the same call always takes the same way.
"""

from __future__ import annotations

from math import prod

import torch

from per_sample._errors import ArgumentError
from per_sample._kernels.conv_algorithms import better_transposed, merged_groups
from per_sample._kernels.conv_geometry import ConvGeometry
from per_sample._kernels.onednn import available, fast_mm
from per_sample._kernels.threads import samples_at_once

Shape = tuple[int, ...]

# What a thread's samples may touch: it should stay in the cache. `group` is one operator, best left whole.
_PIECE_BYTES = {"fold": 6 * 2**20, "fold_merged": 6 * 2**20, "unfold": 4 * 2**20, "onednn": 1}


def choose_conv(
    x_shape: Shape,
    g_shape: Shape,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    device: torch.device,
    functional: bool,
    scratch_bytes: int,
) -> str:
    """The algorithm for `x (n, b, c, *s)` and `g (n, b, o, *l)`.

    Args:
        x_shape: of the input.
        g_shape: of the output gradient.
        geometry: of the convolution.
        dtype: of both.
        device: of both.
        functional: whether only differentiable operators will do.
        scratch_bytes: memory to use beyond the result; one sample's need is always granted.

    Returns:
        A name in `ALGORITHMS`.
    """
    return plan_conv(x_shape, g_shape, geometry, dtype, device, functional, scratch_bytes)[0]


def plan_conv(
    x_shape: Shape,
    g_shape: Shape,
    geometry: ConvGeometry,
    dtype: torch.dtype,
    device: torch.device,
    functional: bool,
    scratch_bytes: int,
    override: str | None = None,
    workers: int = 1,
) -> tuple[str, int]:
    """The algorithm, `override` if given, and how many samples it takes at a time on so many `workers`; else as `choose_conv`."""
    if override is not None:
        _check(override, geometry, dtype, device, functional)
        name = override
    elif dtype.is_complex:
        name = "unfold"
    elif device.type != "cpu":
        name = _choose_elsewhere(x_shape, geometry)
    elif geometry.groups > 1:
        name = _choose_grouped(x_shape[2], g_shape[2], geometry)
    else:
        name = _choose_dense(x_shape, g_shape, geometry, dtype == torch.float32 and not functional)
    on_cpu = device.type == "cpu"
    cache = _PIECE_BYTES.get(name, scratch_bytes) if on_cpu else scratch_bytes
    one = sample_bytes(name, x_shape, g_shape, geometry, dtype.itemsize)
    # A sample at a time is what makes `onednn` worth its while.
    workers = workers if on_cpu and name != "onednn" else 1
    return name, samples_at_once(x_shape[0], one, cache, scratch_bytes, workers)


def sample_bytes(name: str, x_shape: Shape, g_shape: Shape, geometry: ConvGeometry, itemsize: int) -> int:
    """What an algorithm allocates at most for one sample, its gradient included."""
    b, channels, *sizes = x_shape[1:]
    padded = b * channels * prod([s + 2 * p for s, p in zip(sizes, geometry.padding, strict=True)])
    outputs = prod(g_shape[1:])
    gradient = prod(geometry.weight_shape(x_shape, g_shape))
    if name == "group":
        axes = zip(sizes, g_shape[3:], geometry.stride, geometry.padding, geometry.dilation, strict=True)
        offsets = prod([(s + 2 * p - step * (there - 1) - 1) // d + 1 for s, there, step, p, d in axes])
        gradient += gradient // max(1, prod(geometry.kernel)) * offsets
    elif name == "fold_merged":
        gradient *= 1 + merged_groups(channels, geometry)
    elif name in ("unfold", "onednn"):
        padded += b * channels * prod(geometry.kernel) * prod(g_shape[3:])
    return itemsize * (padded + outputs + gradient)


def _choose_elsewhere(x_shape: Shape, geometry: ConvGeometry) -> str:
    """Off the CPU a grouped weight gradient is slow and a batched product fast."""
    if geometry.groups == 1:
        return "unfold"
    return "group" if x_shape[2] == geometry.groups else "fold"


def _choose_grouped(channels: int, outputs: int, geometry: ConvGeometry) -> str:
    taps, width = prod(geometry.kernel), channels // geometry.groups
    if channels == geometry.groups == outputs and taps > 1:
        return _choose_depthwise(taps, len(geometry.kernel))
    if taps == 1 or (width == 1 and outputs > channels):
        return "unfold"
    # Merging multiplies the arithmetic, and pays only where a group is too narrow for vector instructions.
    return "fold_merged" if 2 <= width <= 4 and merged_groups(channels, geometry) >= 4 else "fold"


def _choose_depthwise(taps: int, axes: int) -> str:
    if axes == 1:
        return "group" if taps <= 32 else "unfold"
    return "group" if taps > 9 else "fold"


def _choose_dense(x_shape: Shape, g_shape: Shape, geometry: ConvGeometry, may_use_onednn: bool) -> str:
    channels, outputs = x_shape[2], g_shape[2]
    taps, locations = prod(geometry.kernel), x_shape[1] * prod(g_shape[3:])
    flops = 2 * channels * outputs * taps * locations
    slow_mm = may_use_onednn and not fast_mm()
    if taps == 1:
        if not slow_mm:
            return "unfold"
        return "onednn" if flops >= 1e7 else "fold"
    if channels < 16:
        return _choose_narrow(channels, outputs, taps, g_shape[3:], slow_mm and flops > 1e7)
    if outputs < 16:
        return "group" if outputs == 1 else "unfold"
    # Where there are few locations for many weights, the product's shape suits a matrix library better.
    if locations >= (0.75 if flops < 2e6 else 1.5) * outputs:
        return "fold"
    return "onednn" if slow_mm and flops >= 2e6 else "unfold"


def _choose_narrow(channels: int, outputs: int, taps: int, locations: Shape, prefer_onednn: bool) -> str:
    """For few input channels, of which vector instructions make little."""
    axes, count = len(locations), prod(locations)
    one_by_one = axes == 1 or (taps > 25 and not better_transposed(outputs, count, taps))
    if axes == 3 or (channels == 1 and one_by_one):
        return "group"
    if axes == 2 and count > (2500 if 1 < channels and taps <= 9 else 4096):
        return "fold"
    return "onednn" if prefer_onednn else "unfold"


def _check(name: str, geometry: ConvGeometry, dtype: torch.dtype, device: torch.device, functional: bool) -> None:
    """Raise where an algorithm that the caller asked for cannot serve."""
    if dtype.is_complex and name != "unfold":
        raise ArgumentError(f"The algorithm {name!r} has no {dtype}; allowed: 'unfold'.")
    if name != "onednn":
        return
    reasons = {
        "differentiable operators (`functional=True`)": functional,
        f"dtype {dtype}, only torch.float32": dtype != torch.float32,
        f"device {device}, only the CPU": device.type != "cpu",
        f"{geometry.groups} groups, only one": geometry.groups != 1,
    }
    for reason, unsuitable in reasons.items():
        if unsuitable:
            raise ArgumentError(f"The algorithm 'onednn' does not serve {reason}.")
    if not available():
        raise ArgumentError("The algorithm 'onednn' needs an operator that this build of torch lacks.")
