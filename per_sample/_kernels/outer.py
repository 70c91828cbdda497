"""Products of matrices, one for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from per_sample._kernels.functional import must_be_functional
from per_sample._kernels.memory import empty
from per_sample._kernels.onednn import fast_mm, inner_product


def outer_product(left: Tensor, right: Tensor, *, functional: bool = False) -> Tensor:
    """The product of two matrices for each sample, the sum over positions of outer products.

    Args:
        left: `(n, *e, o, t)`, of any strides.
        right: `(n, *e, t, i)`, of any strides.
        functional: use out-of-place differentiable operators only; implied where a derivative, a functorch
            transform or a trace is under way.

    Returns:
        `(n, *e, o, i)`.
    """
    algorithm = outer_algorithm(left, right, functional=functional)
    if functional or must_be_functional(left, right) or left.dtype != right.dtype:
        return left * right if algorithm == "broadcast" else torch.matmul(left, right)
    out = empty((*left.shape[:-1], right.shape[-1]), like=left)
    if algorithm == "broadcast":
        return torch.mul(left, right, out=out)
    if algorithm == "onednn":
        return _by_onednn(left, right, out)
    return torch.matmul(left, right, out=out)


def outer_algorithm(left: Tensor, right: Tensor, *, functional: bool = False) -> str:
    """The name of the algorithm that `outer_product` takes for the same arguments."""
    if left.shape[-1] == 1:
        return "broadcast"
    pays = _onednn_pays(left, right) and not functional and not must_be_functional(left, right)
    return "onednn" if pays else "matmul"


def _onednn_pays(left: Tensor, right: Tensor) -> bool:
    if left.dtype != torch.float32 or left.device.type != "cpu":
        return False
    o, t = left.shape[-2:]
    return bool(t >= 32 and o * t * right.shape[-1] >= 2**20) and not fast_mm()


def _by_onednn(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    triples = zip(left.flatten(0, -3), right.transpose(-2, -1).flatten(0, -3), out.flatten(0, -3), strict=True)
    for one, other, target in triples:
        target.copy_(inner_product(one, other))
    return out
