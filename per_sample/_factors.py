"""Factors: the few forms in which every sample's gradient of one leaf is held until someone asks for it.

Axis legend, here and in every einsum of the package:
``n`` sample, ``b`` the program's own batch, ``t`` position, ``o`` out, ``i`` in, ``k`` kernel offset, ``l`` output location.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, final

import torch
from torch import Tensor

from per_sample._kernels.conv import ConvGeometry, conv_algorithm, conv_weight_grad
from per_sample._kernels.outer import outer_algorithm, outer_product
from per_sample._kernels.rows import scatter_rows

Scale = Any  # a number, a 0-dim tensor that the samples share, or a tensor `[n]` with a number for each sample


# No abstract base class of Python's: `isinstance` is asked often, and slow on those.
class Factor:
    """Every sample's gradient of one leaf; ``shape`` is one sample's shape, without the sample axis."""

    shape: tuple[int, ...]

    @property
    def like(self) -> Tensor:
        """A tensor of the gradients' dtype and device."""
        raise NotImplementedError

    def materialize(self, *, functional: bool = False) -> Tensor:
        """The gradients, ``[n, *shape]``; ``functional``: by differentiable, out-of-place ops alone."""
        raise NotImplementedError

    def algorithm(self, *, functional: bool = False) -> str:
        """The name of the algorithm that ``materialize`` would use, for ``explain``."""
        return "materialize"

    def scale(self, c: Scale) -> Factor:
        """The factor times one number, or times a number for each sample."""
        raise NotImplementedError

    def reshape(self, shape: tuple[int, ...]) -> Factor:
        """The same numbers in the same order under another shape."""
        return self if shape == self.shape else View(self, shape)

    def transpose(self) -> Factor | None:
        """The factor with its last two axes swapped, or None where the form cannot express it."""
        return None


@final
@dataclass(frozen=True, eq=False)
class Dense(Factor):
    """The gradients themselves, ``value [n, *shape]``."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.value.shape[1:])

    @property
    def like(self) -> Tensor:
        return self.value

    def materialize(self, *, functional: bool = False) -> Tensor:
        return self.value

    def scale(self, c: Scale) -> Factor:
        return Dense(scaled(self.value, c))

    def reshape(self, shape: tuple[int, ...]) -> Factor:
        return Dense(self.value.reshape(self.value.shape[0], *shape))

    def transpose(self) -> Factor | None:
        return Dense(self.value.transpose(-1, -2))


@final
@dataclass(frozen=True, eq=False)
class Outer(Factor):
    """A matrix product per sample, ``left [n, *e, o, t] @ right [n, *e, t, i]``: sums of outer products over ``t``."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.left.shape[1:-1], self.right.shape[-1])

    @property
    def like(self) -> Tensor:
        return self.left

    def materialize(self, *, functional: bool = False) -> Tensor:
        return outer_product(self.left, self.right, functional=functional)

    def algorithm(self, *, functional: bool = False) -> str:
        return outer_algorithm(self.left, self.right, functional=functional)

    def scale(self, c: Scale) -> Factor:
        if self.left.numel() <= self.right.numel():
            return Outer(scaled(self.left, c), self.right)
        return Outer(self.left, scaled(self.right, c))

    def transpose(self) -> Factor | None:
        return Outer(self.right.transpose(-1, -2), self.left.transpose(-1, -2))


@final
@dataclass(frozen=True, eq=False)
class ConvOuter(Factor):
    """A convolution's weight gradient, from its input ``x [n, b, C, *S]`` and its output's gradient ``g [n, b, O, *L]``."""

    x: Tensor
    g: Tensor
    geometry: ConvGeometry

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.g.shape[2], self.x.shape[2] // self.geometry.groups, *self.geometry.kernel)

    @property
    def like(self) -> Tensor:
        return self.g

    def materialize(self, *, functional: bool = False) -> Tensor:
        return conv_weight_grad(self.x, self.g, self.geometry, functional=functional)

    def algorithm(self, *, functional: bool = False) -> str:
        return conv_algorithm(self.x, self.g, self.geometry, functional=functional)

    def scale(self, c: Scale) -> Factor:
        return ConvOuter(self.x, scaled(self.g, c), self.geometry)


@final
@dataclass(frozen=True, eq=False)
class Rows(Factor):
    """An embedding's gradient: row ``index [n, t]`` of ``num_rows`` receives ``g [n, t, i]``; an index < 0 receives nothing."""

    index: Tensor
    g: Tensor
    num_rows: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.num_rows, self.g.shape[-1])

    @property
    def like(self) -> Tensor:
        return self.g

    def materialize(self, *, functional: bool = False) -> Tensor:
        dropped = self.index < 0
        g = self.g.masked_fill(dropped.unsqueeze(2), 0)
        return scatter_rows(self.index.masked_fill(dropped, 0), g, self.num_rows, functional=functional)

    def scale(self, c: Scale) -> Factor:
        return Rows(self.index, scaled(self.g, c), self.num_rows)


@final
@dataclass(frozen=True, eq=False)
class Sum(Factor):
    """A sum of factors of one shape: a parameter used more than once."""

    terms: tuple[Factor, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.terms[0].shape

    @property
    def like(self) -> Tensor:
        return self.terms[0].like

    def materialize(self, *, functional: bool = False) -> Tensor:
        first, *rest = self.merged()
        total = first.materialize(functional=functional)
        for term in rest:
            total = total + term.materialize(functional=functional)
        return total

    def merged(self) -> list[Factor]:
        """The terms, those of one kind as one: a recurrent weight has an outer product for each step."""
        kinds: dict[Any, list[Factor]] = {}
        for term in self.terms:
            kinds.setdefault(self._kind(term), []).append(term)
        return [self._joined(same) if len(same) > 1 else same[0] for same in kinds.values()]

    @staticmethod
    def _kind(term: Factor) -> Any:
        """What two terms that can be merged have in common."""
        if isinstance(term, Outer | Rows):
            return type(term)
        sizes: tuple[int, ...] = ()
        if isinstance(term, ConvOuter):
            sizes = (*term.x.shape[2:], *term.g.shape[2:])
        elif isinstance(term, View):
            sizes = term.base.shape
        # Sizes unknown to a trace must not be compared.
        if not sizes or not all(type(size) is int for size in sizes):
            return id(term)
        return (sizes, term.geometry) if isinstance(term, ConvOuter) else sizes

    @staticmethod
    def _joined(terms: list[Factor]) -> Factor:
        """One factor for several of a kind: positions, or batches of the program's own, side by side."""
        if outer := [term for term in terms if isinstance(term, Outer)]:
            return Outer(torch.cat([term.left for term in outer], -1), torch.cat([term.right for term in outer], -2))
        if rows := [term for term in terms if isinstance(term, Rows)]:
            return Rows(torch.cat([term.index for term in rows], 1), torch.cat([term.g for term in rows], 1), rows[0].num_rows)
        if conv := [term for term in terms if isinstance(term, ConvOuter)]:
            return ConvOuter(torch.cat([term.x for term in conv], 1), torch.cat([term.g for term in conv], 1), conv[0].geometry)
        views = [term for term in terms if isinstance(term, View)]
        return View(reduce(add, [term.base for term in views]), views[0].shape)

    def scale(self, c: Scale) -> Factor:
        return Sum(tuple(term.scale(c) for term in self.terms))

    def transpose(self) -> Factor | None:
        swapped = [term.transpose() for term in self.terms]
        return None if None in swapped else Sum(tuple(t for t in swapped if t is not None))


@final
@dataclass(frozen=True, eq=False)
class View(Factor):
    """Another factor's numbers, in the same order, under another shape."""

    base: Factor
    shape: tuple[int, ...]

    @property
    def like(self) -> Tensor:
        return self.base.like

    def materialize(self, *, functional: bool = False) -> Tensor:
        value = self.base.materialize(functional=functional)
        return value.reshape(value.shape[0], *self.shape)

    def scale(self, c: Scale) -> Factor:
        return View(self.base.scale(c), self.shape)

    def reshape(self, shape: tuple[int, ...]) -> Factor:
        return self.base if shape == self.base.shape else View(self.base, shape)


@final
@dataclass(frozen=True, eq=False)
class Hadamard(Factor):
    """Another factor times a tensor ``by [*shape]`` that the samples share; a boolean one selects, and leaves zeros elsewhere."""

    base: Factor
    by: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    @property
    def like(self) -> Tensor:
        return self.base.like

    def materialize(self, *, functional: bool = False) -> Tensor:
        return self.applied(self.base.materialize(functional=functional))

    def applied(self, x: Tensor) -> Tensor:
        """``x [..., *shape]``, such as a sum of the base's gradients, times ``by``."""
        if self.by.dtype == torch.bool:
            return torch.where(self.by, x, torch.zeros((), dtype=x.dtype, device=x.device))
        return x * self.by

    def scale(self, c: Scale) -> Factor:
        return Hadamard(self.base.scale(c), self.by)

    def transpose(self) -> Factor | None:
        swapped = self.base.transpose()
        return None if swapped is None else Hadamard(swapped, self.by.transpose(-1, -2))


def scaled(x: Tensor, c: Scale) -> Tensor:
    """``x [n, ...]`` times one number, or times a number for each sample."""
    return x * (c.reshape(-1, *(1,) * (x.dim() - 1)) if isinstance(c, Tensor) and c.dim() else c)


def multiplied(factor: Factor, by: Tensor) -> Factor | None:
    """The factor times ``by [n | 1, ...]``, of the gradients' rank with sizes of 1 or theirs; None where no form can express that."""
    own = (by.shape[0], *factor.shape)
    if all(size == 1 for size in by.shape[1:]):
        return factor.scale(by.flatten()) if by.shape[0] > 1 else factor.scale(by.reshape(()))
    if isinstance(factor, Outer) and by.shape[-1] == 1:
        return Outer(factor.left * by, factor.right)
    if isinstance(factor, Outer) and by.shape[-2] == 1:
        return Outer(factor.left, factor.right * by)
    if isinstance(factor, Sum):
        terms = [multiplied(term, by) for term in factor.terms]
        return None if None in terms else Sum(tuple(term for term in terms if term is not None))
    return Hadamard(factor, by[0].expand(own[1:])) if by.shape[0] == 1 else None


def add(a: Factor, b: Factor) -> Factor:
    """The sum of two factors of one shape."""
    terms = (a.terms if isinstance(a, Sum) else (a,)) + (b.terms if isinstance(b, Sum) else (b,))
    return Sum(terms)
