"""Squared norms of sums of outer products from the Gram matrices of their sides.

The sum over positions ``t`` of ``l_t`` times ``r_t`` has the squared norm ``sum over t, s of <l_t, l_s> <r_t, r_s>``. Where the terms
cancel, that keeps only half of the digits, so every norm comes with a bound below which it is not to be believed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from per_sample._kernels.onednn import fast_mm, inner_product
from per_sample._kernels.threads import samples_at_once, threads
from per_sample._options import current_options

# What is formed and reduced at once should not leave the cache.
CACHE_BYTES = 2 * 2**20
HALF = (torch.float16, torch.bfloat16)

# How far below the bound on its terms a squared norm may lie. Rounding is about one eps of the bound where the terms are copies of one
# another, else far less; so the norm keeps four digits of float32 at the very worst.
CANCELLATION = {torch.float32: 2.0**-10, torch.float64: 2.0**-20}


def finest(device: torch.device) -> torch.dtype:
    """The dtype of a norm: float64, whose range holds the square of every float32 number, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def product_dtype(dtype: torch.dtype, device: torch.device, functional: bool) -> torch.dtype:
    """The dtype in which to take Gram matrices; the finest where nobody can look at their result, or where products are rounded."""
    if functional or not _full_precision(device):
        return finest(device)
    return torch.float32 if dtype in HALF else dtype


def _full_precision(device: torch.device) -> bool:
    """Whether products of float32 matrices keep all their digits (no TF32, no bfloat16)."""
    backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    general = getattr(torch.backends, "fp32_precision", "none")
    return {general, backend.matmul.fp32_precision} <= {"none", "ieee"}


def gram_piece(n: int, t: int, itemsize: int, device: torch.device, besides: int = 0) -> int:
    """How many of ``n`` samples' pairs of Gram matrices of ``t`` positions to hold at once, with so many elements ``besides``."""
    limit, one = current_options().scratch_bytes, (3 * t * t + besides) * itemsize
    on_cpu = device.type == "cpu"
    return samples_at_once(n, one, CACHE_BYTES if on_cpu else limit, limit, threads() if on_cpu else 1)


def gram(x: Tensor, *, functional: bool) -> Tensor:
    """The inner products of a sample's rows, ``x [m, t, d]`` to ``[m, t, t]``."""
    t, d = x.shape[1:]
    plain = functional or x.dtype != torch.float32 or x.device.type != "cpu"
    if plain or t < 32 or t * t * d < 2**20 or fast_mm():
        return torch.bmm(x, x.transpose(1, 2))
    return torch.stack([inner_product(rows, rows) for rows in x])


def norm_of_grams(left: Tensor, right: Tensor, *, functional: bool) -> tuple[Tensor, Tensor | None]:
    """The squared norms and their bounds, ``[m]`` each, from two Gram matrices ``[m, t, t]``; no bounds where ``functional``.

    A norm at or above its bound is right; below it, cancellation or the end of the dtype's range may have falsified it.
    """
    value = (left * right).sum((1, 2)).to(finest(left.device))
    if functional:
        return value.clamp_min(0), None
    diagonals = [x.diagonal(dim1=1, dim2=2).to(value.dtype) for x in (left, right)]
    sizes = [torch.linalg.vector_norm(x, dim=(1, 2)).to(value.dtype) for x in (left, right)]
    sums = [x.sum(1) for x in diagonals]
    # What rounding is relative to: all terms at their largest, or less where the positions of one side have little to do with each other.
    terms = (diagonals[0] * diagonals[1]).sqrt().sum(1).square()
    bound = torch.minimum(terms, sums[0] * sizes[1] + sums[1] * sizes[0])
    range_end = 1e10 * torch.finfo(left.dtype).tiny
    return value, CANCELLATION[left.dtype] * bound + range_end * (sums[0] + sums[1])


def joined(found: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Norms and bounds of some samples after those of others."""
    values, floors = zip(*found, strict=True)
    if len(found) == 1:
        return found[0]
    return torch.cat(values), None if floors[0] is None else torch.cat(floors)
