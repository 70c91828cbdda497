"""Rules for whole families of ops, built from the op and the names of its schema's arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample._batched import Batched, context_of, physical, samples
from per_sample._pointwise import pointwise
from per_sample._registry import register

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch._ops import OpOverload

    Run = Callable[..., Any]

# The names under which schemas hold an axis, or a list of axes.
_AXIS_NAMES = {"dim", "dims", "dim0", "dim1", "dim2", "dimension"}


def axis(dim: int, ndim: int) -> int:
    """The physical axis of a program's axis; one that is out of range must not reach the sample axis."""
    if 0 <= dim < ndim:
        return dim + 1
    if -ndim <= dim < 0:
        return dim + ndim + 1
    raise IndexError(f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], but got {dim})")


def axes(dims: int | Sequence[int] | None, ndim: int) -> Any:
    """The physical axes of one axis or of several; None stays."""
    if dims is None:
        return None
    if isinstance(dims, int):
        return axis(dims, ndim)
    return [axis(d, ndim) for d in dims]


def at_rank(x: Any, ndim: int) -> Any:
    """The physical tensor, with axes of size one put in until one sample has ``ndim``; others unchanged."""
    if type(x) is not Batched:
        return x
    value = x.physical
    missing = ndim + 1 - value.dim()
    if missing <= 0:
        return value
    return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:])


def is_inexact(x: Tensor) -> bool:
    """Whether the numbers are floating-point or complex, as those of a gradient are."""
    return x.is_floating_point() or x.is_complex()


def table(combinator: Callable[[OpOverload], Run], *ops: OpOverload, route: str = "rule") -> None:
    """Register one combinator for several ops."""
    for op in ops:
        register(op, combinator(op), route)


def pointwise_table(*ops: OpOverload) -> None:
    """Register ops that act on each element alone though torch does not tag them so."""
    table(pointwise, *ops, route="pointwise")


def _tensor_places(op: OpOverload) -> list[int]:
    return [i for i, a in enumerate(op._schema.arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]


def _named(run: Run, name: str, op: OpOverload) -> Run:
    run.__qualname__ = f"{name}({op})"
    return run


def as_is(op: OpOverload) -> Run:
    """The op acts on trailing axes only, so the sample axis is one more leading axis; all tensors have one rank."""
    places = _tensor_places(op)

    def run(*args: Any, **kwargs: Any) -> Any:
        n = samples(*args)
        filled = list(args)
        for i in places:
            if i < len(filled) and filled[i] is not None:
                filled[i] = physical(filled[i], n)
        return op(*filled, **kwargs)

    return _named(run, "as_is", op)


def dims(op: OpOverload) -> Run:
    """The op names its axes: they move by one. All tensors have one rank; a 0-dim sample is left to the fallback."""
    arguments = op._schema.arguments
    places = _tensor_places(op)
    named = [(i, a) for i, a in enumerate(arguments) if a.name in _AXIS_NAMES]
    positional = [i for i, a in named if not a.kwarg_only]
    # Where the dispatcher drops a default such as 0, the shifted one must be put in; -1 means the same axis anyway.
    defaults = {a.name: a.default_value for _, a in named if a.has_default_value()}
    filled_in = {a.name: i for i, a in named if defaults.get(a.name) not in (None, -1)}
    keywords = [a.name for _, a in named if a.kwarg_only]

    def run(*args: Any, **kwargs: Any) -> Any:
        ndim = args[0].dim()
        if ndim == 0:
            return NotImplemented
        n = samples(*args)
        count = len(args)
        shifted = list(args)
        for i in places:
            if i < count and shifted[i] is not None:
                shifted[i] = physical(shifted[i], n)
        for i in positional:
            if i < count:
                shifted[i] = axes(shifted[i], ndim)
        for name in keywords:
            if name in kwargs:
                kwargs[name] = axes(kwargs[name], ndim)
        for name, i in filled_in.items():
            if i >= count and name not in kwargs:
                kwargs[name] = axes(defaults[name], ndim)
        return op(*shifted, **kwargs)

    return _named(run, "dims", op)


def reduce(op: OpOverload) -> Run:
    """A reduction over a list of axes, none or an empty one meaning all; a 0-dim sample is reduced as one element."""
    names = [a.name for a in op._schema.arguments]
    at = names.index("dim")

    def run(*args: Any, **kwargs: Any) -> Any:
        x = args[0]
        value = x.physical
        ndim = x.dim()
        given = args[at] if len(args) > at else kwargs.pop("dim", None)
        rest = list(args[at + 1 :])
        if ndim == 0:
            axes(given, 1)
            value = value.unsqueeze(1)
            kwargs.pop("keepdim", None)
            # What follows `dim` by position is `keepdim`, which a 0-dim result does not show.
            rest = []
        where = axes(given, ndim or 1)
        if where == [] or where is None:
            where = list(range(1, (ndim or 1) + 1))
        if at > 1 and len(args) <= at:
            return op(value, *args[1:], dim=where, **kwargs)
        return op(value, *args[1:at], where, *rest, **kwargs)

    return _named(run, "reduce", op)


def reduce_all(op: OpOverload, over: Callable[..., Tensor]) -> Run:
    """A reduction of the whole sample to a 0-dim tensor, by ``over(value [n, -1], dim=1, ...)``."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = self.physical
        return over(value.reshape(value.shape[0], math.prod(value.shape[1:])), *args, dim=1, **kwargs)

    return _named(run, "reduce_all", op)


def fold(op: OpOverload, core: int, *, channels_last: bool = False) -> Run:
    """The op has a batch axis of its own, into which the samples go.

    ``core`` is the rank without the batch axis; a sample of just that rank makes the sample axis the batch axis. A list
    argument ``input_size`` counts the batch, too. ``channels_last``: on the CPU torch vectorises the op over channels
    only in that layout, which more than pays for two copies.
    """
    names = [a.name for a in op._schema.arguments]
    places = _tensor_places(op)
    size_at = names.index("input_size") if "input_size" in names else None

    def run(*args: Any, **kwargs: Any) -> Any:
        ctx = context_of(*args)
        n = ctx.n
        folded = list(args)
        relaid = False
        b = None
        for i in places:
            if i < len(folded) and folded[i] is not None:
                value = physical(folded[i], n)
                extra = value.dim() - 1 - core
                if extra < 0 or extra > 1:
                    return NotImplemented
                if extra:
                    b = value.shape[1]
                    value = value.flatten(0, 1)
                if channels_last and not ctx.functional and value.is_cpu and value.shape[1] > 1:
                    value = value.contiguous(memory_format=torch.channels_last)
                    relaid = True
                folded[i] = value
        if size_at is not None:
            size = list(folded[size_at])
            folded[size_at] = [n * size[0], *size[1:]]
        out = op(*folded, **kwargs)
        if relaid:
            out = out.contiguous() if isinstance(out, Tensor) else tuple(o.contiguous() for o in out)
        return out if b is None else _unfolded(out, n, b)

    return _named(run, "fold", op)


def _unfolded(out: Any, n: int, b: int) -> Any:
    if isinstance(out, Tensor):
        return out.unflatten(0, (n, b))
    return tuple(o.unflatten(0, (n, b)) if isinstance(o, Tensor) else o for o in out)
