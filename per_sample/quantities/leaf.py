"""Every sample's gradient of one leaf, and all that can be asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from per_sample._errors import ArgumentError
from per_sample.quantities.condition import sq_condition
from per_sample.quantities.dot import dot
from per_sample.quantities.gram import gram
from per_sample.quantities.moments import moments, square_sum
from per_sample.quantities.norm import norm
from per_sample.quantities.pieces import chosen, count, kept
from per_sample.quantities.precision import widened
from per_sample.quantities.project import project
from per_sample.quantities.settle import settled
from per_sample.quantities.sq_norm import sq_norm
from per_sample.quantities.weighted_sum import weighted_sum

if TYPE_CHECKING:
    import torch

    from per_sample._factors import Factor
    from per_sample.quantities.projectors import Projector

_AS_TENSOR = "`materialize()` gives the gradients as one, [n, *shape]"


@dataclass(frozen=True, eq=False, slots=True)
class LeafGrads:
    """Every sample's gradient of one leaf, held in the form in which the backward pass found it.

    What `per_sample_grad_map` hands to a quantity of your own. Each method takes the cheapest way for the form at hand; none but
    ``materialize`` makes a tensor ``[n, *shape]`` where the form can do without.
    """

    factor: Factor
    functional: bool = False

    @property
    def n(self) -> int:
        """The number of samples."""
        return count(self.factor)

    def __repr__(self) -> str:
        return f"LeafGrads(n={self.n}, shape={list(self.shape)}, held as {type(self.factor).__name__})"

    def __getattr__(self, name: str) -> Any:
        hint = f" It is no tensor: {_AS_TENSOR}." if hasattr(Tensor, name) else ""
        raise AttributeError(f"'LeafGrads' object has no attribute {name!r}.{hint}")

    def __getitem__(self, index: Any) -> NoReturn:
        raise ArgumentError(f"A `LeafGrads` is no tensor that has an index: {_AS_TENSOR}.")

    def __len__(self) -> int:
        return self.n

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample's shape, that of the leaf."""
        return self.factor.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the gradients."""
        return self.factor.like.dtype

    def materialize(self) -> Tensor:
        """The gradients themselves, ``[n, *shape]``."""
        return self.factor.materialize(functional=self.functional)

    def sq_norm(self) -> Tensor:
        """The squared L2 norms ``[n]``, in float32 or wider."""
        return sq_norm(self.factor, functional=self.functional)

    def norm(self, ord: float = 2) -> Tensor:
        """The norms ``[n]`` of any order, as those of vectors."""
        return norm(self.factor, ord, functional=self.functional)

    def weighted_sum(self, weights: Tensor | None = None) -> Tensor:
        """``sum_n weights[n] * grad[n]``, ``[*shape]``, in float32 or wider; without weights the plain sum."""
        if weights is not None and tuple(weights.shape) != (self.n,):
            raise ArgumentError(f"Weights must be one for each of the {self.n} samples; got shape {list(weights.shape)}.")
        return weighted_sum(self.factor, weights, functional=self.functional)

    def square_sum(self) -> Tensor:
        """The sums over samples of the squared absolute values, ``[*shape]``."""
        return square_sum(self.factor, functional=self.functional)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean over samples and the sum of squared deviations from it, both ``[*shape]``."""
        return moments(self.factor, functional=self.functional)

    def dot(self, direction: Tensor) -> Tensor:
        """The inner products ``[n]`` with ``direction [*shape]``."""
        if tuple(direction.shape) != tuple(self.shape):
            raise ArgumentError(
                f"A direction must have the shape of one sample's gradient, {list(self.shape)}; got {list(direction.shape)}."
            )
        return dot(self.factor, direction, functional=self.functional)

    def gram(self, other: LeafGrads) -> Tensor:
        """The inner products ``[n, m]`` with other samples' gradients of the same leaf."""
        return gram(self.factor, other.factor, functional=self.functional or other.functional)

    def project(self, projector: Projector, leaf: int) -> Tensor:
        """The projections ``[n, k]``; ``leaf``: the leaf's number, on which the projector's random entries depend."""
        return project(self.factor, projector, leaf, functional=self.functional)

    def sq_condition(self, square: Tensor) -> Tensor:
        """The square of a bound ``[n]`` on the sum of the norms of the parts of each gradient, to which the rounding of ``weighted_sum`` is
        relative; ``square``: what ``sq_norm`` gave."""
        return sq_condition(self.factor, square)

    def formed(self) -> Tensor:
        """The gradients themselves, in float32 or wider."""
        return widened(self.factor).materialize(functional=self.functional)

    def settled(self) -> tuple[Tensor, LeafGrads]:
        """The squared norms, and the same gradients in the form that is cheapest to hold for a weighted sum later."""
        norms, factor = settled(self.factor, functional=self.functional)
        return norms, LeafGrads(factor, self.functional)

    def of(self, samples: Tensor | slice) -> LeafGrads:
        """The gradients of some of the samples: a slice, or their numbers."""
        return LeafGrads(chosen(self.factor, samples), self.functional)

    def kept(self, keep: Tensor) -> LeafGrads:
        """The same, with zeros for the samples that ``keep [n]`` does not name, whatever they hold."""
        return LeafGrads(kept(self.factor, keep), self.functional)
