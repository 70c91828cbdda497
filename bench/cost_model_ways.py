"""Every choice between algorithms that a shape presents: the ways there are, each forced, and the one that is picked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.cost_model_shapes import CONVS, OUTERS
from bench.micro import Conv
from per_sample._factors import ConvOuter, Factor, Outer
from per_sample._kernels.conv import ConvGeometry, conv_algorithm, conv_weight_grad
from per_sample._kernels.conv_norm import conv_norm_algorithm, conv_sq_norm
from per_sample._kernels.conv_sum import SUMS, conv_sum_algorithm, conv_weight_sum
from per_sample._kernels.onednn import available
from per_sample._kernels.outer_norm import outer_norm_algorithm, outer_sq_norm
from per_sample._kernels.squares import square_sums
from per_sample._options import CONV_ALGORITHMS, options
from per_sample.quantities.formed import formed_pieces


@dataclass(frozen=True)
class Choice:
    """One shape, and one quantity of it."""

    name: str
    picked: str
    ways: dict[str, Callable[[], Tensor]]
    plain: Callable[[], Tensor]  # the gradient summed over the samples, by torch


def operands(case: Conv) -> tuple[Tensor, Tensor, ConvGeometry]:
    """The input `(n, 1, c, *s)`, the output's gradient `(n, 1, o, *l)`, and the geometry."""
    x, d = torch.randn(case.input), len(case.input) - 2
    g = torch.randn_like(case.forward(torch.randn(case.weight), x))
    geometry = ConvGeometry(case.weight[2:], (case.stride,) * d, (case.padding,) * d, (case.dilation,) * d, case.groups)
    return x.unsqueeze(1), g.unsqueeze(1), geometry


def gradients() -> Iterator[Choice]:
    """The weight gradients of convolutions, formed."""
    for case in CONVS:
        x, g, geometry = operands(case)
        names = [name for name in CONV_ALGORITHMS if _serves(name, geometry)]
        ways = {name: partial(_forced, name, x, g, geometry) for name in names}
        yield Choice(case.name, conv_algorithm(x, g, geometry), ways, partial(_plain, x, g, geometry))


def sums() -> Iterator[Choice]:
    """Their sums over the samples."""
    for case in CONVS:
        x, g, geometry = operands(case)
        ways = {name: partial(conv_weight_sum, x, g, geometry, algorithm=name) for name in SUMS}
        yield Choice(case.name, conv_sum_algorithm(x, g, geometry), ways, partial(_plain, x, g, geometry))


def norms() -> Iterator[Choice]:
    """The norms of the weight gradients of convolutions."""
    for case in CONVS:
        x, g, geometry = operands(case)
        # Larger Gram matrices, all samples together, take seconds.
        pairs = {"gram": g[0, :, 0].numel() ** 2, "pixel_gram": x[0, :, 0].numel() ** 2}
        names = [name for name, count in pairs.items() if case.groups == 1 and len(x) * count <= 2**24]
        ways = {name: partial(_first, conv_sq_norm, x, g, geometry, name) for name in names}
        ways["pieces"] = partial(_pieces, ConvOuter(x, g, geometry))
        yield Choice(case.name, conv_norm_algorithm(x, g, geometry), ways, partial(_plain, x, g, geometry))


def outer_norms() -> Iterator[Choice]:
    """The norms of the weight gradients of linear layers."""
    for n, t, i, o in OUTERS:
        left, right = torch.randn(n, o, t), torch.randn(n, t, i)
        names = ("gram", "product") if t == 1 else ("gram",)
        ways = {name: partial(_first, outer_sq_norm, left, right, name) for name in names}
        ways["pieces"] = partial(_pieces, Outer(left, right))
        plain = partial(_product, left.transpose(0, 1).flatten(1), right.flatten(0, 1))
        yield Choice(f"linear n{n} t{t} {i}-{o}", outer_norm_algorithm(left, right), ways, plain)


QUANTITIES = {"gradients": gradients, "sums": sums, "norms": norms, "outer-norms": outer_norms}


def _serves(name: str, geometry: ConvGeometry) -> bool:
    return name != "onednn" or (geometry.groups == 1 and available())


def _forced(name: str, x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    with options(conv_algorithm=name):
        return conv_weight_grad(x, g, geometry)


def _plain(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    return conv_weight_sum(x, g, geometry, algorithm="plain")


def _product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def _pieces(factor: Factor) -> Tensor:
    return torch.cat([square_sums(piece.flatten(1)) for piece in formed_pieces(factor, functional=False)])


def _first(kernel: Callable[..., tuple[Tensor, Tensor | None]], *args: object) -> Tensor:
    """The kernel's norms, without what says where they are doubtful."""
    return kernel(*args)[0]
