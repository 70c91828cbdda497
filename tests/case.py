"""What a case of the table is, and how its inputs are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Input:
    """A tensor to be drawn: its shape (for a sample without the sample axis) and kind of numbers."""

    shape: tuple[int, ...]
    kind: str = "real"  # or "unit": in (0, 1), "complex", "int": below `high`, "order": distinct below `high`
    high: int = 0

    def draw(self, *lead: int) -> Tensor:
        """A tensor of shape ``[*lead, *shape]``."""
        shape = (*lead, *self.shape)
        if self.kind == "int":
            return torch.randint(0, self.high, shape)
        if self.kind == "order":
            # Distinct along the last axis, so that writes do not collide.
            return torch.rand(*shape[:-1], self.high).argsort(-1)[..., : shape[-1]]
        if self.kind == "unit":
            return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1
        return torch.randn(shape, dtype=torch.complex128 if self.kind == "complex" else torch.float64)


def real(*shape: int) -> Input:
    return Input(shape)


def unit(*shape: int) -> Input:
    return Input(shape, "unit")


def cplx(*shape: int) -> Input:
    return Input(shape, "complex")


def ints(high: int, *shape: int) -> Input:
    return Input(shape, "int", high)


def order(high: int, *shape: int) -> Input:
    return Input(shape, "order", high)


def score(x: Tensor) -> Tensor:
    """A scalar that depends on every element, each in its own way, without saturating."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    x = x.double()
    weights = torch.arange(1, x.numel() + 1, dtype=torch.float64).reshape(x.shape)
    return (x.sin() * (1 + weights.cos() / 2)).sum()


@dataclass(frozen=True)
class Case:
    """One row: ``score(fn(params, *samples))`` is the loss of one sample."""

    name: str
    fn: Callable[..., Tensor]
    params: tuple[Input, ...]
    samples: tuple[Input, ...]
    # The type of factor that each parameter's gradient arrives in.
    factors: tuple[str, ...] = ()
    # Ops that must be met, with the route that each must take.
    routes: dict[str, str] = field(default_factory=dict)
    # Ops that may run on the fallback or its loop; every other op has a rule.
    loose: frozenset[str] = frozenset()
    keep_batch_dim: bool = False
    # False where vmap(grad) cannot run the case.
    reference: bool = True

    def loss(self, params: Any, *samples: Tensor) -> Tensor:
        return score(self.fn(params, *samples))

    def draw(self, n: int) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and a batch of samples."""
        torch.manual_seed(sum(map(ord, self.name)))
        return [p.draw() for p in self.params], [s.draw(n) for s in self.samples]
