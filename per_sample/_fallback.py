"""The fallback: one op for the whole batch without a rule.

By functorch's vmap, or sample by sample where vmap has no rule either. Its callers see to it that all dispatch keys are active.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch import vmap as functorch_vmap
from torch._ops import OpOverload

from per_sample._batched import context_of, is_batched, wrap


@functools.cache
def has_vmap_rule(op: OpOverload) -> bool:
    """Whether functorch runs the op on the whole batch, rather than in a loop of its own."""
    functorch_vmap.lazy_load_decompositions()  # type: ignore[attr-defined]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = op.name()
    keys = ("FuncTorchBatched", "FuncTorchBatchedDecomposition", "FuncTorchVmapMode", "CompositeImplicitAutograd")
    return any(has(name, key) for key in keys)


_COPY_THEN_WRITE = ("index_", "scatter", "masked_", "put", "fill", "select_scatter", "slice_scatter", "diagonal_scatter")


@functools.cache
def _writes_into_copy(op: OpOverload) -> bool:
    """Whether the op is its in-place form on a copy of the first argument.

    Where that argument is shared and the rest is not, some of vmap's rules write every sample into the one copy: ``index_fill`` with a
    per-sample value returns the last sample's numbers for all (torch 2.13). An argument with a sample axis is safe.
    """
    return op._schema.name.removeprefix("aten::").startswith(_COPY_THEN_WRITE)


def run(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], n: int, randomness: str) -> Any:
    """The op on the physical tensors of its arguments; results carry the sample axis in front."""
    if _writes_into_copy(op) and isinstance(args[0], Tensor) and not is_batched(args[0]):
        args = (wrap(context_of(*args, *kwargs.values()), args[0].expand(n, *args[0].shape)), *args[1:])
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if is_batched(leaf)]
    tensors = [leaves[i].physical for i in where]

    structure: list[Any] = []

    def one(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, value in zip(where, values, strict=True):
            filled[i] = value
        a, k = pytree.tree_unflatten(filled, spec)
        out, out_spec = pytree.tree_flatten(op(*a, **k))
        # Results such as the None of a masked-out gradient are no tensors, which vmap refuses to return.
        structure[:] = [out_spec, out]
        return tuple(x for x in out if isinstance(x, Tensor))

    columns = torch.vmap(one, randomness=randomness)(*tensors) if has_vmap_rule(op) else _loop(one, tensors, n)
    found = iter(columns)
    out_spec, out = structure
    return pytree.tree_unflatten([next(found) if isinstance(x, Tensor) else x for x in out], out_spec)


def _loop(one: Any, tensors: list[Tensor], n: int) -> tuple[Tensor, ...]:
    """One call a sample, stacked. The empty batch takes its shapes from a sample of zeros."""
    rows = [one(*(t[i] for t in tensors)) for i in range(n)] or [one(*(t.new_zeros(t.shape[1:]) for t in tensors))]
    return tuple(torch.stack(column)[:n] for column in zip(*rows, strict=True))


def shared_draw(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor, randomness: str) -> Tensor:
    """A random op none of whose arguments differs between samples, drawn for each sample as vmap draws it: ``[n, ...]``."""
    out: Tensor = torch.vmap(lambda _: op(*args, **kwargs), randomness=randomness)(like)
    return out
