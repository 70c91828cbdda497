"""Per-sample weight gradients of convolutions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from per_sample._errors import ArgumentError
from per_sample._kernels.conv_algorithms import ALGORITHMS, unfold
from per_sample._kernels.conv_choice import choose_conv, plan_conv
from per_sample._kernels.conv_geometry import ConvGeometry
from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.memory import empty
from per_sample._kernels.threads import threads
from per_sample._options import current_options

__all__ = ["ALGORITHMS", "ConvGeometry", "choose_conv", "conv_algorithm", "conv_weight_grad"]


def conv_weight_grad(x: Tensor, g: Tensor, geometry: ConvGeometry, *, functional: bool = False) -> Tensor:
    """Each sample's gradient of a convolution's weight, summed over the program's own batch.

    For complex numbers it is `g` times the conjugate of `x`, as autograd has it. A transposed convolution is
    served with the roles of `x` and `g` exchanged.

    Beyond the result, memory for `max(1, m)` samples is used, where `m` samples fit into the option
    `scratch_bytes`. A sample needs its padded input, output gradient and weight gradient, and its unfolded
    input for "unfold" and "onednn", the untrimmed gradient for "group", the merged one for "fold_merged".

    Args:
        x: the input, `(n, b, c, *s)`.
        g: the gradient of the output, `(n, b, o, *l)`.
        geometry: of the convolution.
        functional: use out-of-place differentiable operators only; implied where a derivative, a functorch
            transform or a trace is under way.

    Returns:
        `(n, o, c / groups, *k)`.

    Raises:
        ArgumentError: the shapes do not fit the geometry, or the option `conv_algorithm` names one that does not
            serve this case.
    """
    functional = functional or must_be_functional(x, g)
    name, step, missing = _prepare(x, g, geometry, functional)
    if missing:
        g = F.pad(g, missing)
    algorithm = ALGORITHMS[name]
    n = x.shape[0]
    if functional:
        pieces = zip(torch.split(x, step), torch.split(g, step), strict=True) if step < n else [(x, g)]
        grads = [algorithm(*piece, geometry) for piece in pieces]
        return torch.cat(grads) if len(grads) > 1 else grads[0]
    # Piecewise into the result: concatenation would hold every gradient twice.
    out = empty((n, *geometry.weight_shape(x.shape, g.shape)), like=g)
    for start in range(0, n, step):
        size = min(step, n - start)
        target, piece = out.narrow(0, start, size), (x.narrow(0, start, size), g.narrow(0, start, size))
        if algorithm is unfold:
            unfold(*piece, geometry, out=target)
        else:
            target.copy_(algorithm(*piece, geometry))
    return out


def conv_algorithm(x: Tensor, g: Tensor, geometry: ConvGeometry, *, functional: bool = False) -> str:
    """The name of the algorithm that `conv_weight_grad` takes for the same arguments."""
    return _prepare(x, g, geometry, functional or must_be_functional(x, g))[0]


def _prepare(x: Tensor, g: Tensor, geometry: ConvGeometry, functional: bool) -> tuple[str, int, tuple[int, ...]]:
    """The algorithm, the samples it takes at a time, and how `g` is to be padded."""
    settings = current_options()
    case = (x.dtype, x.device, functional, settings.scratch_bytes, settings.conv_algorithm, threads())
    # Sizes unknown to a trace cannot be looked up; dynamo warns of caches, and has no need of them.
    traced = torch.compiler.is_compiling() or not all(type(size) is int for size in (*x.shape, *g.shape))
    prepare = _prepare_shapes.__wrapped__ if traced else _prepare_shapes
    return prepare(tuple(x.shape), tuple(g.shape), geometry, *case)


@lru_cache(maxsize=4096)
def _prepare_shapes(
    x_shape: Any, g_shape: Any, geometry: ConvGeometry, dtype: Any, device: Any, functional: bool, scratch: int, override: Any, workers: int
) -> tuple[str, int, tuple[int, ...]]:
    missing = missing_locations(x_shape, g_shape, geometry)
    if not all(type(size) is int for size in (*x_shape, *g_shape)):
        # Sizes unknown to a trace must not be compared: take all samples at once.
        return override or ("unfold" if dtype.is_complex else "fold"), x_shape[0], missing
    if 0 in x_shape or 0 in g_shape:
        # An empty sum, which only the plain product computes.
        return "unfold", max(1, x_shape[0]), missing
    g_shape = (*g_shape[:3], *geometry.locations(x_shape[3:]))
    return *plan_conv(x_shape, g_shape, geometry, dtype, device, functional, scratch, override, workers), missing


def missing_locations(x_shape: Any, g_shape: Any, geometry: ConvGeometry) -> tuple[int, ...]:
    """Padding for the locations that a transposed convolution left out of its output gradient."""
    locations = geometry.locations(x_shape[3:])
    missing = [there - given for there, given in zip(locations, g_shape[3:], strict=True)]
    if x_shape[:2] != g_shape[:2] or any(count < 0 for count in missing):
        raise ArgumentError(
            f"The output gradient {tuple(g_shape)} does not fit the input {tuple(x_shape)}: expected "
            f"{(*x_shape[:2], g_shape[2], *locations)} or less along the last {len(locations)} axes."
        )
    return tuple(p for count in reversed(missing) for p in (0, count)) if any(missing) else ()
