"""What is known of an op before its arguments are: resolved once, from the rule table, the op's tags and its schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from per_sample import _fallback, _registry
from per_sample._out import is_out_form
from per_sample._pointwise import pointwise

aten = torch.ops.aten

# Below autograd nobody resolves a lazily conjugated or negated tensor, so shared ones, too, are resolved at once.
EAGER = {aten._conj.default: torch.conj_physical, aten._neg_view.default: torch.neg}


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    norms = torch.linalg.vector_norm(v, 2, [i for i in range(v.dim()) if i != dim], keepdim=True)
    return v * (g / norms), norms


def _view_as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


# Where the caller records: an op with a result that torch does not differentiate although a derivative of its own uses it, written out;
# and one that would not know of the lazy conjugation which the caller's tensors may have.
RECORDED = {aten._weight_norm_interface.default: _weight_norm, aten.view_as_real.default: _view_as_real}


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """All that is known of an op before its arguments are, resolved once."""

    run: Any  # None: the fallback
    route: str
    tensors: tuple[int, ...]  # positions of the arguments that are or hold tensors
    writes: tuple[int, ...]  # positions of the arguments written in place
    views: bool  # a result may be a view of an argument
    random: bool
    foreign: bool
    simple: bool  # nothing but a rule to call


ENTRIES: dict[Any, Entry] = {}


def _forget(op: OpOverload) -> None:
    ENTRIES.pop(op, None)


_registry.on_change(_forget)


def resolve(op: OpOverload) -> Entry:
    """Look an op up, and remember what was found until its rule changes."""
    arguments = op._schema.arguments
    writes = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    rule = _registry.TABLE.get(op)
    run, route, foreign = (rule.run, rule.route, rule.foreign) if rule else (None, "fallback", False)
    random = _registry.is_random(op)
    if rule is None and not random:
        # `equal` is tagged pointwise too, although it returns one Python bool.
        if torch.Tag.pointwise in op.tags and not _fallback.is_data_dependent(op) and "out" not in op._overloadname:
            run, route = pointwise(op), "pointwise"
        elif not _fallback.has_vmap_rule(op):
            route = "loop"
    tensors = tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type) or str(a.type) == "Any")
    views = any(r.alias_info is not None for r in op._schema.returns) or "view" in op._schema.name
    simple = run is not None and not writes and not foreign and op not in EAGER
    entry = Entry(run, route, tensors, writes, views, random, foreign, simple)
    # Ops with `out=` take a way of their own as soon as an argument is per-sample.
    if not is_out_form(op):
        ENTRIES[op] = entry
    return entry
