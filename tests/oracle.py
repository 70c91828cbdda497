"""The oracle: plain autograd, one sample after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def loop_grads(
    fn: Callable[..., Tensor], params: Sequence[Tensor], samples: Sequence[Tensor], *, keep_batch_dim: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Every sample's gradients ``[n, *shape]`` for each parameter, and losses ``[n]``, by a loop."""
    n = samples[0].shape[0]
    leaves = [p.detach().clone().requires_grad_() for p in params]
    grads: list[list[Tensor]] = [[] for _ in leaves]
    values = []
    for i in range(n):
        one: list[Any] = [x[i : i + 1] if keep_batch_dim else x[i] for x in samples]
        loss = fn(leaves, *one)
        values.append(loss.detach())
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        for column, leaf, g in zip(grads, leaves, found, strict=True):
            column.append(torch.zeros_like(leaf) if g is None else g.to_dense())
    stacked = [torch.stack(c) if c else p.new_zeros((0, *p.shape)) for c, p in zip(grads, params, strict=True)]
    return stacked, torch.stack(values) if values else torch.zeros(0)
