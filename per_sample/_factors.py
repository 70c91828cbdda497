"""Factors: the few forms in which every sample's gradient of one leaf is held until someone asks for it.

Axis legend, here and in every einsum of the package:
``n`` sample, ``b`` the program's own batch, ``t`` position, ``o`` out, ``i`` in, ``k`` kernel offset, ``l`` output location.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from per_sample._kernels.conv import ConvGeometry, conv_algorithm, conv_weight_grad
from per_sample._kernels.outer import outer_algorithm, outer_product
from per_sample._kernels.rows import scatter_rows

Scalar = Any  # a Python number


class Factor(ABC):
    """Every sample's gradient of one leaf; ``shape`` is one sample's shape, without the sample axis."""

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the gradients' dtype and device."""

    @abstractmethod
    def materialize(self, *, functional: bool = False) -> Tensor:
        """The gradients, ``[n, *shape]``; ``functional``: by differentiable, out-of-place ops alone."""

    def algorithm(self, *, functional: bool = False) -> str:
        """The name of the algorithm that ``materialize`` would use, for ``explain``."""
        return "materialize"

    @abstractmethod
    def scale(self, c: Scalar) -> Factor:
        """The factor times a number, or times a 0-dim tensor that the samples share."""

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

    def scale(self, c: Scalar) -> Factor:
        return Dense(self.value * c)

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

    def scale(self, c: Scalar) -> Factor:
        if self.left.numel() <= self.right.numel():
            return Outer(self.left * c, self.right)
        return Outer(self.left, self.right * c)

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

    def scale(self, c: Scalar) -> Factor:
        return ConvOuter(self.x, self.g * c, self.geometry)


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

    def scale(self, c: Scalar) -> Factor:
        return Rows(self.index, self.g * c, self.num_rows)


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
        first, *rest = self._merged()
        total = first.materialize(functional=functional)
        for term in rest:
            total = total + term.materialize(functional=functional)
        return total

    def _merged(self) -> list[Factor]:
        """Outer products as one, with their positions side by side: a recurrent weight has one for each step."""
        outer = [term for term in self.terms if isinstance(term, Outer)]
        if len(outer) < 2:
            return list(self.terms)
        left, right = torch.cat([o.left for o in outer], -1), torch.cat([o.right for o in outer], -2)
        return [Outer(left, right), *(term for term in self.terms if not isinstance(term, Outer))]

    def scale(self, c: Scalar) -> Factor:
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

    def scale(self, c: Scalar) -> Factor:
        return View(self.base.scale(c), self.shape)

    def reshape(self, shape: tuple[int, ...]) -> Factor:
        return self.base if shape == self.base.shape else View(self.base, shape)


def add(a: Factor, b: Factor) -> Factor:
    """The sum of two factors of one shape."""
    terms = (a.terms if isinstance(a, Sum) else (a,)) + (b.terms if isinstance(b, Sum) else (b,))
    return Sum(terms)
