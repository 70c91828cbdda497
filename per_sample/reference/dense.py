"""Every sample's gradients as plain tensors, and the norms of them: what the other files reduce."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample import _trees as trees
from per_sample._arguments import as_arguments, read
from per_sample._containers import close_tree, open_tree
from per_sample.reference.gradients import per_sample_grad_and_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from per_sample._arguments import Argnums, Arguments


@dataclass(frozen=True, eq=False, slots=True)
class Gradients:
    """The gradients of one call."""

    leaves: list[Tensor]  # [N, *shape] each, in the order of the positional arguments
    values: Tensor  # [N]
    aux: Any
    arguments: Arguments
    args: tuple[Any, ...]
    is_tuple: bool  # whether ``argnums`` was a tuple

    def as_arguments(self, leaves: list[Any]) -> Any:
        """One result for each leaf in the structure of the differentiated argument."""
        return close_tree(self.arranged(leaves))

    def arranged(self, leaves: list[Any]) -> Any:
        """The same, with containers that optree does not know opened."""
        return as_arguments(leaves, self.arguments, self.is_tuple, self.args)

    def beside(self, results: list[Any], *, values: bool, aux: bool) -> Any:
        """What a transform returns: its results, and behind them the losses and the auxiliary values where they are asked for."""
        found = [*results, *([self.values] if values else []), *([self.aux] if aux else [])]
        return tuple(found) if len(found) > 1 else found[0]

    def matrix(self, numbers: Iterable[int] | None = None) -> Tensor:
        """The leaves of these numbers, by default all, side by side: ``[N, numbers]``."""
        chosen = self.leaves if numbers is None else [self.leaves[i] for i in numbers]
        return torch.cat([rows(g) for g in chosen], 1) if chosen else torch.zeros(self.arguments.n, 0)


def dense_gradients(fn: Callable[..., Any], argnums: Argnums, in_dims: Any, *, has_aux: bool, **options: Any) -> Callable[..., Gradients]:
    """A function of the arguments, positional and by name, that returns their ``Gradients``."""
    both = per_sample_grad_and_value(fn, argnums, in_dims, has_aux=has_aux, **options)

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Gradients:
        grads, rest = both(*args, **kwargs)
        args = open_tree(args)
        arguments = read(args, argnums, in_dims)
        parts = dict(zip(arguments.argnums, grads if isinstance(argnums, tuple) else (grads,), strict=True))
        leaves = [g for i in sorted(parts) for g in trees.flatten(open_tree(parts[i]))[0] if isinstance(g, Tensor)]
        values, aux = rest if has_aux else (rest, None)
        return Gradients(leaves, values, aux, arguments, args, isinstance(argnums, tuple))

    return call


def rows(leaf: Tensor) -> Tensor:
    """One leaf's gradients as ``[N, numbers]``, half precision as float32."""
    return wide(leaf).reshape(len(leaf), math.prod(leaf.shape[1:]))


def wide(x: Tensor) -> Tensor:
    """Half precision as float32: sums and norms are taken there."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def norms_of(matrix: Tensor, ord: float = 2) -> Tensor:
    """The norm of every row, taken in double precision, where the squares of single precision do not overflow."""
    if matrix.shape[1] == 0:
        return matrix.real.sum(1)
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float64))
    return torch.linalg.vector_norm(exact, ord, 1).to(matrix.dtype.to_real())


def weighted_sums(leaves: list[Tensor], weights: Tensor) -> list[Tensor]:
    """``sum_n weights[n] * leaf[n]`` of every leaf."""
    return [torch.einsum("n,n...->...", weights.to(g.dtype), g) for g in map(wide, leaves)]


def squares(x: Tensor) -> Tensor:
    """The squared absolute values."""
    x = wide(x)
    return (x * x.conj()).real


def deviations(x: Tensor) -> Tensor:
    """The sum over the samples of the squared distances from their mean."""
    return squares(wide(x) - wide(x).mean(0)).sum(0)
