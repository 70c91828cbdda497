"""Squared norms of every sample's convolution weight gradient, without the gradients."""

from __future__ import annotations

from dataclasses import replace
from math import inf, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from per_sample._kernels.conv import missing_locations
from per_sample._kernels.conv_geometry import ConvGeometry, windows
from per_sample._kernels.gram_norm import gram, gram_piece, joined, norm_of_grams, product_dtype
from per_sample._kernels.outer_norm import direct_cost, gram_cost

# Costs in multiply-adds: of an element of the unfolded input, and of an addition of strided windows.
_UNFOLDED, _ADDITION = 8, 8
# Elements of scratch memory that are always granted.
_SMALL = 2**20


def conv_norm_algorithm(x: Tensor, g: Tensor, geometry: ConvGeometry, *, functional: bool = False) -> str:
    """The way to the squared norms of the weight gradients of ``x (n, b, c, *s)`` and ``g (n, b, o, *l)``.

    Returns:
        "gram": by the Gram matrices of the unfolded input and of the output gradient; "pixel_gram": by the Gram matrix of the input's
        pixels, of which the former is a sum over kernel offsets; "pieces": the gradients themselves, of a few samples at a time.
    """
    costs = conv_norm_costs(x, g, geometry, functional=functional)
    return min(costs, key=costs.__getitem__)


def conv_norm_costs(x: Tensor, g: Tensor, geometry: ConvGeometry, *, functional: bool = False) -> dict[str, float]:
    """What each way that there is costs for one sample, in multiply-adds; infinite where it will not do."""
    sizes = (*x.shape[1:], *g.shape[1:])
    if x.dtype.is_complex or geometry.groups > 1 or not all(type(size) is int for size in sizes) or 0 in sizes:
        return {"pieces": direct_cost(x.shape[1] * prod(g.shape[3:]), g.shape[2], x.shape[2] // geometry.groups * prod(geometry.kernel))}
    b, c, o, dtype = x.shape[1], x.shape[2], g.shape[2], torch.promote_types(x.dtype, g.dtype)
    taps, locations, pixels = prod(geometry.kernel), b * prod(geometry.locations(x.shape[3:])), b * prod(x.shape[3:])
    side = gram_cost(locations, o, dtype, x.device, functional)
    unfolded = 0 if _picks_pixels(geometry) else _UNFOLDED * locations * c * taps
    costs = {
        "gram": side + gram_cost(locations, c * taps, dtype, x.device, functional) + unfolded,
        "pixel_gram": side + gram_cost(pixels, c, dtype, x.device, functional) + _ADDITION * _window_additions(x, locations, geometry),
    }
    if taps == 1:
        del costs["pixel_gram"]
    # No way may need much more memory than one gradient, whatever it would save.
    allowed = max(2 * o * c * taps, _SMALL)
    costs = {name: cost if _scratch(x, locations, geometry, name) <= allowed else inf for name, cost in costs.items()}
    return costs | {"pieces": direct_cost(locations, o, c * taps)}


def _picks_pixels(geometry: ConvGeometry) -> bool:
    """Whether each window is one pixel, so that the unfolded input is a view of the input."""
    return prod(geometry.kernel) == 1 and not any(geometry.padding)


def _padded(x: Tensor, geometry: ConvGeometry) -> int:
    """How many pixels a sample has with the padding."""
    return int(x.shape[1] * prod(s + 2 * p for s, p in zip(x.shape[3:], geometry.padding, strict=True)))


def _window_additions(x: Tensor, locations: int, geometry: ConvGeometry) -> int:
    padded = _padded(x, geometry)
    return padded * (padded + sum(geometry.kernel) * locations)


def _scratch(x: Tensor, locations: int, geometry: ConvGeometry, algorithm: str) -> int:
    """How many elements a sample needs besides two Gram matrices and their product: the unfolded input, or the pixels' Gram matrices."""
    if algorithm == "gram":
        return int(locations * x.shape[2] * prod(geometry.kernel))
    return 3 * _padded(x, geometry) ** 2


def conv_sq_norm(x: Tensor, g: Tensor, geometry: ConvGeometry, algorithm: str, *, functional: bool = False) -> tuple[Tensor, Tensor | None]:
    """The squared norms and below which they are doubtful, ``(n)`` each.

    Args:
        x: the input, ``(n, b, c, *s)``.
        g: the gradient of the output, ``(n, b, o, *l)``.
        geometry: of the convolution, with one group.
        algorithm: "gram" or "pixel_gram".
        functional: use out-of-place differentiable operators only.
    """
    missing = missing_locations(x.shape, g.shape, geometry)
    if missing:
        g = F.pad(g, missing)
    n, dtype = x.shape[0], product_dtype(torch.promote_types(x.dtype, g.dtype), x.device, functional)
    input_gram = _unfolded_gram if algorithm == "gram" else _pixel_gram
    step = n
    if type(n) is int:
        locations = x.shape[1] * prod(g.shape[3:])
        step = gram_piece(n, locations, dtype.itemsize, x.device, _scratch(x, locations, geometry, algorithm))
    pieces = zip(torch.split(x, step), torch.split(g, step), strict=True) if type(n) is int and step < n else [(x, g)]
    found = []
    for x_piece, g_piece in pieces:
        rows = g_piece.to(dtype).movedim(2, -1).flatten(1, -2)  # (n, b l, o)
        grams = input_gram(x_piece.to(dtype), geometry, functional), gram(rows, functional=functional)
        found.append(norm_of_grams(*grams, functional=functional))
    return joined(found)


def conv_norm_scratch(x: Tensor, g: Tensor, geometry: ConvGeometry, algorithm: str, functional: bool) -> int:
    """The bytes that `conv_sq_norm` holds besides operands and result."""
    dtype = product_dtype(torch.promote_types(x.dtype, g.dtype), x.device, functional)
    locations = x.shape[1] * prod(geometry.locations(x.shape[3:]))
    besides = _scratch(x, locations, geometry, algorithm)
    held = 3 * locations**2 + besides
    return gram_piece(x.shape[0], locations, dtype.itemsize, x.device, besides) * held * dtype.itemsize


def _unfolded_gram(x: Tensor, geometry: ConvGeometry, functional: bool) -> Tensor:
    d = len(geometry.kernel)
    if _picks_pixels(geometry):
        return gram(windows(x, geometry).flatten(3).movedim(2, -1).flatten(1, -2), functional=functional)
    # Channels last, so that unfolding copies them in runs.
    pixels = F.pad(x.movedim(2, -1), [0, 0, *(p for padding in reversed(geometry.padding) for p in (padding, padding))]).contiguous()
    columns = windows(pixels.movedim(-1, 2), replace(geometry, padding=(0,) * d))  # (n, b, c, *l, *k)
    return gram(columns.movedim(2, -1).flatten(2 + d).flatten(1, 1 + d), functional=functional)


def _pixel_gram(x: Tensor, geometry: ConvGeometry, functional: bool) -> Tensor:
    """The Gram matrix of the unfolded input, from that of the pixels: for each axis in turn the windows at its kernel offsets are added."""
    n, b, _, *sizes = x.shape
    d = len(sizes)
    pixels = gram(x.movedim(2, -1).flatten(1, -2), functional=functional).reshape(n, b, *sizes, b, *sizes)
    if any(geometry.padding):
        both = [p for padding in reversed(geometry.padding) for p in (padding, padding)]
        pixels = F.pad(pixels, [*both, 0, 0, *both])
    locations = geometry.locations(sizes)
    axes = zip(geometry.kernel, geometry.stride, geometry.dilation, locations, strict=True)
    for axis, (kernel, stride, dilation, there) in enumerate(axes, start=2):
        shifted = []
        for start in range(0, kernel * dilation, dilation):
            window = [slice(None)] * pixels.dim()
            window[axis] = window[axis + d + 1] = slice(start, start + (there - 1) * stride + 1, stride)
            shifted.append(pixels[tuple(window)])
        pixels = _added(shifted, functional)
    return pixels.flatten(1 + d + 1).flatten(1, 1 + d)


def _added(terms: list[Tensor], functional: bool) -> Tensor:
    total = terms[0] + terms[1] if len(terms) > 1 else terms[0]
    for term in terms[2:]:
        total = total + term if functional else total.add_(term)
    return total
