"""The oracle for whole transforms: plain autograd, one sample after the other, for arguments that are pytrees."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor


def loop(fn: Any, argnums: tuple[int, ...], in_dims: Any) -> Any:
    """A function that returns, for each argnum, every sample's gradients ``[n, *shape]``."""

    def run(*args: Any) -> Any:
        dims = optree.broadcast_prefix(in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args), args, none_is_leaf=True)
        leaves, spec = optree.tree_flatten(args, none_is_leaf=True)
        n = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)
        rows = []
        for i in range(n):
            one = [x if d is None else x.select(d, i) for x, d in zip(leaves, dims, strict=True)]
            sample = list(optree.tree_unflatten(spec, one))
            for a in argnums:
                sample[a] = optree.tree_map(lambda t: t.detach().clone().requires_grad_(), sample[a])
            wanted = [sample[a] for a in argnums]
            flat, structure = optree.tree_flatten(wanted)
            found = torch.autograd.grad(fn(*sample), flat, allow_unused=True)
            filled = [torch.zeros_like(x) if g is None else g for x, g in zip(flat, found, strict=True)]
            rows.append(optree.tree_unflatten(structure, filled))
        return optree.tree_map(lambda *t: torch.stack(t), *rows)

    return run


def assert_close(actual: Any, expected: Any) -> None:
    """Leaf for leaf; containers may differ where a loop returns lists."""
    got, want = optree.tree_leaves(actual), optree.tree_leaves(expected)
    assert len(got) == len(want)
    for a, e in zip(got, want, strict=True):
        if isinstance(e, Tensor):
            torch.testing.assert_close(a, e)
        else:
            assert a == e
