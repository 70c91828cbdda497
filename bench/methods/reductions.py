"""From every sample's gradient `[n, *shape]` of each parameter to a quantity: what a method without a shorter way does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (gradients, max_norm) -> answer
Reduction = Callable[[list[Tensor], float], list[Tensor]]


def _gradients(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    return gradients


def _norms(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    return [torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)]


def clipping_weights(norms: Tensor, max_norm: float) -> Tensor:
    """What each sample's gradient is multiplied by."""
    return (max_norm / norms).clamp(max=1.0)


def _clipped(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    weights = clipping_weights(_norms(gradients, max_norm)[0], max_norm)
    return [torch.einsum("n,n...->...", weights, g) for g in gradients]


def _gram(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    rows = [g.flatten(1) for g in gradients]
    return [sum((r @ r.T for r in rows[1:]), rows[0] @ rows[0].T)]


REDUCTIONS: dict[str, Reduction] = {"gradients": _gradients, "norms": _norms, "clipped": _clipped, "gram": _gram}
