"""Random projections of gradients to few numbers, whose entries are never stored: each is a function of its place."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from per_sample._errors import ArgumentError
from per_sample._kernels.hashed import below, key, normal, signs

_KINDS = {"gaussian": 1, "rademacher": 2, "sparse": 3, "left": 4, "right": 5}


class Projector:
    """A random matrix ``[k, numel]`` for each leaf, of mean zero, with E[P^T P] the identity."""

    k: int
    seed: int

    def entries(self, leaf: int, places: Tensor, dtype: torch.dtype) -> Tensor:
        """The columns for these elements of a leaf, ``[k, *places.shape]``."""
        raise NotImplementedError

    def matrix(
        self,
        shape: tuple[int, ...],
        leaf: int,
        start: int = 0,
        size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The columns for a range of a flattened leaf.

        Args:
            shape: of the leaf; of a complex one ``(*shape, 2)``, the real and the imaginary part.
            leaf: its number among the differentiated tensors.
            start: the first column.
            size: how many columns; None: all the rest.
            dtype: of the result; for each the numbers are the same but for rounding.
            device: of the result.

        Returns:
            ``[k, size]``.
        """
        size = prod(shape) - start if size is None else size
        return self.entries(leaf, torch.arange(start, start + size, device=device), dtype)


def _check_numbers(projector: object, **numbers: int) -> None:
    for name, number in numbers.items():
        if type(number) is not int or not (-(2**63) if name == "seed" else 1) <= number < 2**63:
            wanted = "an integer of 64 bits" if name == "seed" else "a positive integer"
            raise ArgumentError(f"`{name}` of {type(projector).__name__} must be {wanted}; got {number!r}.")


@dataclass(frozen=True)
class GaussianProjector(Projector):
    """Independent normal entries of variance ``1 / k``."""

    k: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self, k=self.k, seed=self.seed)

    def entries(self, leaf: int, places: Tensor, dtype: torch.dtype) -> Tensor:
        return normal(key(_KINDS["gaussian"], self.seed, leaf), self.k, places, dtype) * self.k**-0.5


@dataclass(frozen=True)
class RademacherProjector(Projector):
    """Independent entries, ``1 / sqrt(k)`` with a random sign."""

    k: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self, k=self.k, seed=self.seed)

    def entries(self, leaf: int, places: Tensor, dtype: torch.dtype) -> Tensor:
        return signs(key(_KINDS["rademacher"], self.seed, leaf), self.k, places, dtype) * self.k**-0.5


@dataclass(frozen=True)
class SparseProjector(Projector):
    """Each element of the gradient goes to ``nonzeros`` of the k places, with random signs and divided by ``sqrt(nonzeros)``.

    The places are cut into ``nonzeros`` blocks of nearly one size, and one place of each block is drawn.
    """

    k: int
    seed: int = 0
    nonzeros: int = 4

    def __post_init__(self) -> None:
        _check_numbers(self, k=self.k, seed=self.seed, nonzeros=self.nonzeros)
        if not self.nonzeros <= self.k < 2**31:
            raise ArgumentError(f"SparseProjector needs nonzeros <= k < 2**31; got nonzeros={self.nonzeros} and k={self.k}.")

    def targets(self, leaf: int, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where each element goes and by what it is multiplied, both ``[nonzeros, *places.shape]``."""
        starts = torch.arange(self.nonzeros + 1, device=places.device) * self.k // self.nonzeros
        offsets, negative = below(key(_KINDS["sparse"], self.seed, leaf), starts.diff(), places)
        values = (1 - 2 * negative).to(dtype) * self.nonzeros**-0.5
        return starts[:-1].reshape(-1, *(1,) * places.dim()) + offsets, values

    def entries(self, leaf: int, places: Tensor, dtype: torch.dtype) -> Tensor:
        targets, values = self.targets(leaf, places, dtype)
        return torch.zeros(self.k, *places.shape, dtype=dtype, device=places.device).scatter(0, targets, values)


@dataclass(frozen=True)
class FactoredProjector(Projector):
    """The Kronecker product of a normal matrix with ``left`` rows for a leaf's first axis and one with ``right`` rows for its other axes.

    It projects a matrix product without forming it. A leaf of fewer than two axes is projected as by `GaussianProjector`.
    """

    left: int
    right: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self, left=self.left, right=self.right, seed=self.seed)

    @property
    def k(self) -> int:  # type: ignore[override]
        return self.left * self.right

    def entries(self, leaf: int, places: Tensor, dtype: torch.dtype) -> Tensor:
        return GaussianProjector(self.k, self.seed).entries(leaf, places, dtype)

    def sides(self, shape: tuple[int, ...], leaf: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The two matrices, ``[left, shape[0]]`` and ``[right, prod(shape[1:])]``."""
        a = normal(key(_KINDS["left"], self.seed, leaf), self.left, torch.arange(shape[0], device=device), dtype)
        b = normal(key(_KINDS["right"], self.seed, leaf), self.right, torch.arange(prod(shape[1:]), device=device), dtype)
        return a * self.left**-0.5, b * self.right**-0.5

    def matrix(
        self,
        shape: tuple[int, ...],
        leaf: int,
        start: int = 0,
        size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        if len(shape) < 2:
            return super().matrix(shape, leaf, start, size, dtype=dtype, device=device)
        size = prod(shape) - start if size is None else size
        a, b = self.sides(shape, leaf, dtype, device)
        places = torch.arange(start, start + size, device=device)
        width = max(1, b.shape[1])
        rows, columns = places // width, places % width
        return (a[:, None, rows] * b[None, :, columns]).flatten(0, 1)
