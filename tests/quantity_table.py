"""The public transforms for quantities of gradients: how each is called on a program, and what it must give."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

import per_sample
from programs import D

if TYPE_CHECKING:
    from collections.abc import Callable

    from programs import Program

PROJECTORS = {
    "gaussian": per_sample.GaussianProjector(4, seed=3),
    "rademacher": per_sample.RademacherProjector(4, seed=3),
    "sparse": per_sample.SparseProjector(6, seed=3, nonzeros=2),
    "factored": per_sample.FactoredProjector(2, 3, seed=3),
}


@dataclass(frozen=True, eq=False)
class Quantity:
    """``make(package, program, **options)`` makes the transform, of ``per_sample`` or of ``per_sample.reference``."""

    name: str
    make: Callable[..., Any]
    # From a program, whose gradients are by a loop, to what is right.
    expected: Callable[[Program], Any]


def flat(program: Program) -> Tensor:
    """Every sample's gradients as one row of real numbers."""
    return real_rows(program.leaves)


def real_rows(leaves: list[Tensor]) -> Tensor:
    parts = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in leaves]
    return torch.stack([torch.cat([p[i].flatten() for p in parts]) for i in range(len(leaves[0]))])


def norms(program: Program) -> Tensor:
    return flat(program).square().sum(1).sqrt()


def middle(program: Program) -> float:
    """A bound that some gradients exceed, and some do not."""
    return float(norms(program).median()) * 0.9 + 0.01 if program.n else 1.0


def only(n: int, *numbers: int) -> Tensor:
    """True for these samples."""
    return torch.isin(torch.arange(n), torch.tensor(numbers))


def weights(program: Program) -> Tensor:
    """One number for each sample, of either sign, and a zero."""
    return torch.tensor([0.5, -1.25, 0.0, 2.0, 0.75], dtype=D)[: program.n]


def summed(program: Program, by: Tensor) -> Any:
    return optree.tree_map(lambda g: sum((w * row for w, row in zip(by, g, strict=True)), torch.zeros_like(g[0])), program.grads)


def clip(norm: Tensor, bound: float) -> Tensor:
    return torch.stack([torch.ones_like(one) if one <= bound else bound / one for one in norm])


def direction(program: Program) -> Any:
    """Something with the structure of one sample's gradients."""

    def towards(x: Tensor) -> Tensor:
        angles = torch.arange(math.prod(x.shape[1:]), dtype=D)
        values = torch.polar(torch.ones_like(angles), angles) if x.is_complex() else angles.cos()
        return values.reshape(x.shape[1:])

    return optree.tree_map(towards, program.grads)


def _dot(program: Program) -> Tensor:
    towards = optree.tree_leaves(direction(program))
    return flat(program) @ real_rows([v[None] for v in towards])[0]


def _numbered(program: Program) -> Any:
    """Another number for every leaf."""
    leaves, spec = optree.tree_flatten(direction(program))
    return optree.tree_unflatten(spec, [float(i + 2) for i in range(len(leaves))])


def _scaled_dot(g: Tensor, towards: Tensor, scale: float) -> Tensor:
    return torch.stack([(row * towards.conj()).real.sum() for row in g]) * scale if len(g) else g.new_zeros(0)


def _each(leaf: Callable[[Tensor], Tensor]) -> Callable[[Program], Any]:
    return lambda program: optree.tree_map(leaf, program.grads)


def _leafwise(g: Tensor) -> Tensor:
    """One leaf's norms."""
    return torch.stack([row.abs().square().sum() for row in g]).sqrt()


def bounds(program: Program) -> Any:
    """A bound for every leaf."""
    return optree.tree_map(lambda g: float(_leafwise(g).median()) * 0.9 + 0.01 if program.n else 1.0, program.grads)


def _clipped_leaf(g: Tensor) -> Tensor:
    weights = clip(_leafwise(g), float(_leafwise(g).median()) * 0.9 + 0.01)
    return sum((w * row for w, row in zip(weights, g, strict=True)), torch.zeros_like(g[0]))


def _variance(g: Tensor, correction: int) -> Tensor:
    return torch.stack([(row - g.mean(0)).abs().square() for row in g]).sum(0) / (len(g) - correction)


def _noise_parts(program: Program) -> tuple[Tensor, Tensor]:
    rows = flat(program)
    trace = rows.var(0, correction=1).sum()
    return trace, rows.mean(0).square().sum() - trace / len(rows)


def _others(program: Program) -> tuple[Any, ...]:
    return tuple(x for i, x in enumerate(program.others) if i not in program.numbers)


def _gram_of_others(program: Program) -> Tensor:
    found = program.by_loop(program.others)
    return flat(program) @ real_rows(optree.tree_leaves(found)).T


def in_position(program: Program) -> list[Tensor]:
    """The leaves in the order of the positional arguments, whatever the order in ``argnums``."""
    if not isinstance(program.argnums, tuple):
        return program.leaves
    return [g for _, part in sorted(zip(program.numbers, program.grads, strict=True)) for g in optree.tree_leaves(part)]


def _projected(program: Program, projector: Any) -> Tensor:
    total = torch.zeros(program.n, projector.k, dtype=D)
    for number, g in enumerate(in_position(program)):
        parts = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
        matrix = projector.matrix(tuple(parts.shape[1:]), number, dtype=D)
        total += torch.stack([matrix @ row.flatten() for row in parts])
    return total


def _norm(name: str, ord: float, expected: Callable[[Tensor], Tensor]) -> Quantity:
    def make(package: Any, program: Program, **options: Any) -> Any:
        return package.per_sample_grad_norm(program.loss, ord=ord, **options)

    def of(program: Program) -> Tensor:
        magnitudes = [[row.abs().flatten() for row in g] for g in program.leaves]
        return torch.stack([expected(torch.cat(rows)) for rows in zip(*magnitudes, strict=True)])

    return Quantity(name, make, of)


def _clipped(name: str, expected: Callable[[Program], Any], **own: Any) -> Quantity:
    def make(package: Any, program: Program, **options: Any) -> Any:
        return package.clipped_grad(program.loss, middle(program), **own, **options)

    return Quantity(name, make, expected)


def _clipped_sum(program: Program) -> Any:
    return summed(program, clip(norms(program), middle(program)))


QUANTITIES = [
    _norm("norm", 2, lambda g: g.square().sum().sqrt()),
    _norm("norm-1", 1, lambda g: g.sum()),
    _norm("norm-3.5", 3.5, lambda g: g.pow(3.5).sum().pow(1 / 3.5)),
    _norm("norm-inf", math.inf, lambda g: g.max()),
    Quantity("norm of leaves", lambda p, x, **o: p.per_sample_grad_norm(x.loss, per_leaf=True, **o), _each(_leafwise)),
    Quantity("weighted", lambda p, x, **o: p.weighted_grad(x.loss, weights(x), **o), lambda x: summed(x, weights(x))),
    Quantity("weighted by norm", lambda p, x, **o: p.weighted_grad(x.loss, torch.cos, **o), lambda x: summed(x, norms(x).cos())),
    Quantity(
        "weighted by norm, low",
        lambda p, x, **o: p.weighted_grad(x.loss, torch.cos, memory="low", **o),
        lambda x: summed(x, norms(x).cos()),
    ),
    _clipped("clipped", lambda x: (_clipped_sum(x), norms(x)), return_norms=True),
    _clipped("clipped, low", _clipped_sum, memory="low"),
    _clipped(
        "clipped, normalised",
        lambda x: optree.tree_map(lambda g: g / 2.5, (_clipped_sum(x), 2.5 * norms(x))),
        normalize_by=2.5,
        return_norms=True,
    ),
    _clipped("clipped automatically", lambda x: summed(x, middle(x) / (norms(x) + 0.25)), automatic=True, stability=0.25),
    Quantity(
        "clipped leaf by leaf",
        lambda p, x, **o: p.clipped_grad(x.loss, bounds(x), return_norms=True, **o),
        lambda x: (_each(_clipped_leaf)(x), _each(_leafwise)(x)),
    ),
    Quantity(
        "clipped leaf by leaf, low",
        lambda p, x, **o: p.clipped_grad(x.loss, bounds(x), memory="low", **o),
        lambda x: _each(_clipped_leaf)(x),
    ),
    Quantity(
        "second moment", lambda p, x, **o: p.grad_second_moment(x.loss, **o), _each(lambda g: sum(row.abs().square() for row in g) / len(g))
    ),
    Quantity("variance", lambda p, x, **o: p.grad_variance(x.loss, **o), _each(lambda g: _variance(g, 1))),
    Quantity("variance, uncorrected", lambda p, x, **o: p.grad_variance(x.loss, correction=0, **o), _each(lambda g: _variance(g, 0))),
    Quantity("noise scale", lambda p, x, **o: p.gradient_noise_scale(x.loss, **o), lambda x: operator.truediv(*_noise_parts(x))),
    Quantity("noise scale in parts", lambda p, x, **o: p.gradient_noise_scale(x.loss, return_parts=True, **o), _noise_parts),
    Quantity("dot", lambda p, x, **o: p.per_sample_grad_dot(x.loss, direction(x), **o), _dot),
    Quantity("gram", lambda p, x, **o: p.grad_gram(x.loss, **o), lambda x: flat(x) @ flat(x).T),
    Quantity("gram with others", lambda p, x, **o: p.grad_gram(x.loss, other=_others(x), **o), _gram_of_others),
    *(
        Quantity(
            f"projected, {name}",
            lambda p, x, projector=projector, **o: p.projected_grad(x.loss, projector, **o),
            lambda x, projector=projector: _projected(x, projector),
        )
        for name, projector in PROJECTORS.items()
    ),
    Quantity(
        "map of samples",
        lambda p, x, **o: p.per_sample_grad_map(x.loss, lambda g: torch.stack([g.sq_norm(), g.sq_norm() * 2], 1), **o),
        _each(lambda g: torch.stack([_leafwise(g).square(), 2 * _leafwise(g).square()], 1)),
    ),
    Quantity(
        "map to a sum",
        lambda p, x, **o: p.per_sample_grad_map(x.loss, lambda g: g.weighted_sum(g.sq_norm()), across="sum", **o),
        _each(lambda g: sum(row.abs().square().sum() * row for row in g)),
    ),
    Quantity(
        "map with trees",
        lambda p, x, **o: p.per_sample_grad_map(
            x.loss, lambda g, towards, scale: g.dot(towards) * scale, trees=(direction(x), _numbered(x)), **o
        ),
        lambda x: optree.tree_map(_scaled_dot, x.grads, direction(x), _numbered(x)),
    ),
]
BY_NAME = {quantity.name: quantity for quantity in QUANTITIES}
# For what takes long: without those that differ from another by a number.
FEWER = [
    quantity
    for quantity in QUANTITIES
    if quantity.name
    not in {
        *("norm-1", "weighted by norm, low", "clipped, normalised", "clipped leaf by leaf, low", "variance, uncorrected"),
        *("projected, gaussian", "projected, rademacher"),
    }
]
