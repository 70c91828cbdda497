"""The fallback: one op for the whole batch without a rule.

By functorch's vmap, or sample by sample where vmap has no rule either. Its callers see to it that all dispatch keys are active.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch import vmap as functorch_vmap
from torch._ops import OpOverload

from per_sample._batched import context_of, is_batched, wrap
from per_sample._errors import RandomnessError
from per_sample._keys import all_keys
from per_sample._values import agreed

if TYPE_CHECKING:
    from per_sample._batched import Context


def is_data_dependent(op: OpOverload) -> bool:
    """Whether the op's result is a Python value, or its size depends on values."""
    return torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags


@functools.cache
def has_vmap_rule(op: OpOverload) -> bool:
    """Whether functorch runs the op on the whole batch, rather than in a loop of its own or not at all."""
    if is_data_dependent(op):
        return False
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

    found: list[list[Any]] = []
    out_spec: Any = None

    def one(*values: Tensor) -> tuple[Tensor, ...]:
        nonlocal out_spec
        filled = list(leaves)
        for i, value in zip(where, values, strict=True):
            filled[i] = value
        a, k = pytree.tree_unflatten(filled, spec)
        out, out_spec = pytree.tree_flatten(op(*a, **k))
        found.append(out)
        # Results such as the None of a masked-out gradient are no tensors, which vmap refuses to return.
        return tuple(x for x in out if isinstance(x, Tensor))

    if has_vmap_rule(op):
        try:
            columns = torch.vmap(one, randomness=randomness)(*tensors)
        except RuntimeError as err:
            if randomness != "same" or "same randomness" not in str(err):
                raise
            raise RandomnessError(f"`{op}` cannot draw the same numbers for samples that differ: pass randomness='different'.") from err
    else:
        columns = _stacked(op, context_of(*args, *kwargs.values()), [one(*(t[i] for t in tensors)) for i in range(n)], found)
    rest = iter(columns)
    return pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in found[0]], out_spec)


def _stacked(op: OpOverload, ctx: Context, rows: list[tuple[Tensor, ...]], found: list[list[Any]]) -> tuple[Tensor, ...]:
    """One result a sample, stacked; sizes and Python values that depend on the samples' values must agree."""
    columns = list(zip(*rows, strict=True))
    facts = [[x.shape if isinstance(x, Tensor) else x for x in out] for out in found]
    if any(fact != facts[0] for fact in facts):
        agreed(ctx, torch.tensor([facts.index(fact) for fact in facts]), f"`{op}`")
    return tuple(torch.stack(column) for column in columns)


def shared_draw(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], ctx: Context) -> Any:
    """A random op none of whose arguments differs between samples, drawn for each sample as vmap draws it."""
    with ExitStack() as context:
        if ctx.caller is not None:
            context.enter_context(ctx.caller())
        else:
            context.enter_context(all_keys())
            context.enter_context(torch.no_grad())
        out = torch.vmap(lambda _: op(*args, **kwargs), randomness=ctx.randomness)(torch.empty(ctx.n))
    return pytree.tree_map(lambda x: wrap(ctx, x), out)
