"""oneDNN's matrix product, on some machines twice as fast as torch's own.

The operator is private to torch, so it is used only where it exists and agrees with a plain product.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from per_sample._kernels.functional import must_be_functional


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """`left (o, t)` times the transpose of `right (i, t)`, both float32 on CPU; see `available`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(_packed(left), _packed(right), None, "none", [], "")
    return product


def _packed(matrix: Tensor) -> Tensor:
    """The matrix in row-major strides; `contiguous` leaves the stride of an axis of size 1 arbitrary."""
    return matrix.reshape(-1).view(matrix.shape)


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this torch has the operator, and it agrees with a matrix product."""
    with torch.no_grad(), _disable_current_modes():
        left, right = _operands(5, 7, 3)
        try:
            return bool(torch.allclose(inner_product(left, right), left @ right.T))
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False


def fast_mm() -> bool:
    """Whether torch's own matrix product is nearly as fast as oneDNN's here."""
    return _relative_time() < 1.4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`x (b, i)` times the transpose of `weight (o, i)` plus `bias`, where oneDNN is the faster way; None where it is not."""
    if x.dtype != torch.float32 or not x.is_cpu or not weight.is_contiguous() or x.numel() * weight.shape[0] < 2**24:
        return None
    if must_be_functional(x, weight, *(() if bias is None else (bias,))) or _relative_time() < 1.25:
        return None
    product: Tensor = torch.ops.mkldnn._linear_pointwise(_packed(x), weight, bias, "none", [], "")
    return product


@lru_cache(maxsize=1)
def _relative_time() -> float:
    """The time of torch's own matrix product, where oneDNN's takes 1; measured once in a process, 0 where there is no oneDNN."""
    if not available():
        return 0.0
    with torch.no_grad(), _disable_current_modes():
        left, right = _operands(128, 512, 256)
        _times(left, right)
        # Other work on the machine must not decide: the fastest of many, taken in turns, and of several bursts the least favourable one.
        return min(_burst(left, right) for _ in range(6))


def _burst(left: Tensor, right: Tensor) -> float:
    time.sleep(0.001)
    deadline, times = time.perf_counter() + 0.003, [_times(left, right)]
    while time.perf_counter() < deadline:
        times.append(_times(left, right))
    return min(own for own, _ in times) / min(other for _, other in times)


def _times(left: Tensor, right: Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    torch.mm(left, right.T)
    middle = time.perf_counter()
    inner_product(left, right)
    return middle - start, time.perf_counter() - middle


def _operands(o: int, i: int, t: int) -> tuple[Tensor, Tensor]:
    # Not random numbers: the caller's generator must not move.
    left = torch.arange(o * t, dtype=torch.float32, device="cpu").view(o, t).cos()
    return left, torch.arange(i * t, dtype=torch.float32, device="cpu").view(i, t).sin()
