"""The table of methods. To add one: a row in `_methods`."""

from __future__ import annotations

from functools import partial

from bench.methods import bookkeeping, functorch, ghost, hooks, jax_twins, plain
from bench.methods.method import Method, Runner, Unavailable
from bench.methods.ours import ours
from bench.methods.reductions import REDUCTIONS

__all__ = ["BASELINES", "METHODS", "Method", "Runner", "Unavailable"]

# What the ratios are taken of, so they are always run.
BASELINES = ("plain", "write")

_GHOSTS = {
    "norms": (
        Method("opacus-ghost", "norms", ghost.opacus_norms),
        Method("backpack", "norms", ghost.backpack_norms),
        Method("book-keeping", "norms", bookkeeping.norms),
    ),
    "clipped": (
        Method("opacus-ghost", "clipped", ghost.opacus_clipped),
        Method("backpack", "clipped", ghost.backpack_clipped),
        Method("book-keeping", "clipped", bookkeeping.clipped),
    ),
}


def _methods(quantity: str) -> list[Method]:
    """Those that compute one quantity, the baselines first."""
    method = partial(Method, quantity=quantity)
    compiled = partial(method, optional=True, compiled=True)
    found = [Method("plain", "sum", plain.batched)]
    if quantity == "gradients":
        found += [Method("write", None, plain.write)]
    if quantity != "gram":  # which needs all samples at once
        found += [
            method("loop", prepare=plain.loop(quantity), optional=True),
            method("vmap-chunked", prepare=functorch.chunked(quantity), optional=True),
        ]
    found += [
        method("vmap", prepare=functorch.vmap(quantity)),
        compiled("vmap-compiled", prepare=functorch.vmap(quantity, compiled=True)),
        method("expanded-weights", prepare=hooks.expanded_weights(quantity)),
        method("opacus-hooks", prepare=hooks.opacus(quantity)),
        method("opacus-functorch", prepare=hooks.opacus(quantity, force_functorch=True)),
    ]
    found += _GHOSTS.get(quantity) or (method("backpack", prepare=hooks.backpack(quantity)),)
    if quantity != "gram":
        found += [compiled("jax", prepare=jax_twins.twin(quantity))]
    found += [method("ours", prepare=ours(quantity))]
    if quantity == "clipped":
        found += [method("ours-low", prepare=ours(quantity, memory="low"))]
    found += [compiled("ours-compiled", prepare=ours(quantity, compiled=True))]
    return found


# For each quantity, by their names.
METHODS: dict[str, dict[str, Method]] = {q: {m.name: m for m in _methods(q)} for q in REDUCTIONS}
