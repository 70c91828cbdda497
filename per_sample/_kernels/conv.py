"""Per-sample weight gradients of convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from per_sample._kernels.conv_algorithms import ALGORITHMS, unfold
from per_sample._kernels.conv_choice import choose_conv, plan_conv
from per_sample._kernels.conv_geometry import ConvGeometry
from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.memory import empty
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
        ValueError: the shapes do not fit the geometry, or the option `conv_algorithm` names one that does not
            serve this case.
    """
    g = _complete(x, g, geometry)
    functional = functional or must_be_functional(x, g)
    settings = current_options()
    name, step = _plan(x, g, geometry, functional, settings.conv_algorithm, settings.scratch_bytes)
    algorithm = ALGORITHMS[name]
    if functional and x.shape[0] <= step:
        return algorithm(x, g, geometry)
    pieces = zip(torch.split(x, step), torch.split(g, step), strict=True)
    if functional:
        return torch.cat([algorithm(*piece, geometry) for piece in pieces])
    # Piecewise into the result: concatenation would hold every gradient twice.
    out = empty((x.shape[0], *geometry.weight_shape(x.shape, g.shape)), like=g)
    for target, piece in zip(torch.split(out, step), pieces, strict=True):
        if algorithm is unfold:
            unfold(*piece, geometry, out=target)
        else:
            target.copy_(algorithm(*piece, geometry))
    return out


def conv_algorithm(x: Tensor, g: Tensor, geometry: ConvGeometry, *, functional: bool = False) -> str:
    """The name of the algorithm that `conv_weight_grad` takes for the same arguments."""
    settings = current_options()
    functional = functional or must_be_functional(x, g)
    return _plan(x, g, geometry, functional, settings.conv_algorithm, settings.scratch_bytes)[0]


def _plan(x: Tensor, g: Tensor, geometry: ConvGeometry, functional: bool, override: str | None, scratch_bytes: int) -> tuple[str, int]:
    shapes = tuple(x.shape), tuple(g.shape)
    if not all(type(size) is int for shape in shapes for size in shape):
        # Sizes unknown to a trace must not be compared: take all samples at once.
        return override or ("unfold" if x.is_complex() else "fold"), x.shape[0]
    if 0 in shapes[0] or 0 in shapes[1]:
        # An empty sum, which only the plain product computes.
        return "unfold", x.shape[0]
    # Dynamo warns of caches, and has no need of them.
    plan = plan_conv.__wrapped__ if torch.compiler.is_compiling() else plan_conv
    return plan(*shapes, geometry, x.dtype, x.device, functional, scratch_bytes, override)


def _complete(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """The output gradient with zeros for the locations that a transposed convolution left out."""
    locations = geometry.locations(x.shape[3:])
    missing = [there - given for there, given in zip(locations, g.shape[3:], strict=True)]
    if x.shape[:2] != g.shape[:2] or any(count < 0 for count in missing):
        raise ValueError(
            f"The output gradient {tuple(g.shape)} does not fit the input {tuple(x.shape)}: expected "
            f"{(*x.shape[:2], g.shape[2], *locations)} or less along the last {len(locations)} axes."
        )
    if not any(missing):
        return g
    return F.pad(g, [p for count in reversed(missing) for p in (0, count)])
