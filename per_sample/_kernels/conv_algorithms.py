"""Ways to compute the weight gradients of some samples of a convolution.

Each takes `x (n, b, c, *s)` and `g (n, b, o, *l)` and returns `(n, o, c / groups, *k)`, out of place. All but
`onednn` are made of differentiable torch operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from per_sample._kernels.conv_geometry import ConvGeometry, windows
from per_sample._kernels.onednn import inner_product

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def fold(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """One `convolution_backward`, the samples folded into the groups."""
    n = x.shape[0]
    o, *rest = geometry.weight_shape(x.shape, g.shape)
    # The operator reads only the shape of the weight.
    weight = g.new_empty(1).expand(n * o, *rest)
    grad = torch.ops.aten.convolution_backward(
        g.movedim(0, 1).flatten(1, 2),
        x.movedim(0, 1).flatten(1, 2),
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * len(geometry.kernel),
        n * geometry.groups,
        (False, True, False),
    )[1]
    return torch.unflatten(grad, 0, (n, o))


def merged_groups(channels: int, geometry: ConvGeometry) -> int:
    """How many groups to treat as one for blocks of about 16 channels."""
    merged = 1
    while geometry.groups % (2 * merged) == 0 and merged * channels < 16 * geometry.groups:
        merged *= 2
    return merged


def fold_merged(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """`fold` with narrow groups merged, of whose gradient only the diagonal blocks are kept."""
    merged = merged_groups(x.shape[2], geometry)
    wide = replace(geometry, groups=geometry.groups // merged)
    grad = torch.unflatten(fold(x, g, wide), 1, (wide.groups, merged, -1))
    grad = torch.unflatten(grad, 4, (merged, -1))  # (n, wide, merged, o, merged, i, *k)
    return grad.diagonal(dim1=2, dim2=4).movedim(-1, 2).flatten(1, 3)


def group(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """One forward convolution of the input, its filters the output gradients.

    Samples are its groups and the channels of a group its batch; stride and dilation change places.
    """
    n, groups = x.shape[0], geometry.groups
    image = torch.unflatten(x, 2, (groups, -1))
    image = image.permute(3, 0, 2, 1, *range(4, image.dim()))  # (i, n, group, b, *s)
    filters = torch.unflatten(g, 2, (groups, -1)).movedim(1, 3).flatten(0, 2)  # (n group o, b, *l)
    convolution = _CONV[len(geometry.kernel)]
    grad = convolution(image.flatten(1, 3), filters, None, geometry.dilation, geometry.padding, geometry.stride, n * groups)
    for axis, kernel in enumerate(geometry.kernel, start=2):
        # Trailing input that no window touches shows as offsets beyond the kernel.
        grad = grad.narrow(axis, 0, kernel)
    return torch.unflatten(grad, 1, (n, -1)).movedim(0, 2).contiguous()


def unfold(x: Tensor, g: Tensor, geometry: ConvGeometry, out: Tensor | None = None) -> Tensor:
    """The output gradient times the unfolded input."""
    columns, rows = _columns(x.conj(), geometry), _rows(g, geometry)
    left, right = rows.flatten(0, 1), columns.flatten(0, 1).transpose(1, 2)
    if out is not None:
        target = out.view(left.shape[0], left.shape[1], right.shape[2])
        if better_transposed(left.shape[1], left.shape[2], right.shape[2]):
            target.copy_(torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2))
        else:
            torch.bmm(left, right, out=target)
        return out
    return torch.bmm(left, right).reshape(x.shape[0], *geometry.weight_shape(x.shape, g.shape))


def better_transposed(o: int, t: int, i: int) -> bool:
    """Whether `(i, t)` times `(t, o)` is the faster way to a small `(o, i)`: rows that fill whole vectors."""
    return o % 16 == 0 and i % 16 != 0 and i <= 160 and t >= 4 * i


def onednn(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """The output gradient times the unfolded input by oneDNN, for one group."""
    columns, rows = _columns(x, geometry), _rows(g, geometry)
    grads = [inner_product(left[0], right[0]) for left, right in zip(rows, columns, strict=True)]
    return torch.stack(grads).view(x.shape[0], *geometry.weight_shape(x.shape, g.shape))


def _columns(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """`(n, group, i k, b l)`: the locations are innermost, which makes the product's result contiguous."""
    d = len(geometry.kernel)
    columns = torch.unflatten(windows(x, geometry), 2, (geometry.groups, -1))  # (n, b, group, i, *l, *k)
    locations, offsets = range(4, 4 + d), range(4 + d, 4 + 2 * d)
    return columns.permute(0, 2, 3, *offsets, 1, *locations).flatten(3 + d).flatten(2, 2 + d)


def _rows(g: Tensor, geometry: ConvGeometry) -> Tensor:
    """`(n, group, o, b l)`."""
    return torch.unflatten(g, 2, (geometry.groups, -1)).movedim(1, 3).flatten(3)


Algorithm = Callable[..., Tensor]
ALGORITHMS: dict[str, Algorithm] = {
    "fold": fold,
    "fold_merged": fold_merged,
    "group": group,
    "unfold": unfold,
    "onednn": onednn,
}
