"""Marker ops that say in a graph of ``torch.compile``'s where a sample axis is hidden, what is differentiated, and what is asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from per_sample._errors import UnsupportedError
from per_sample._factors import Dense
from per_sample.quantities import projectors
from per_sample.quantities.leaf import LeafGrads

_library = torch.library.Library("per_sample", "FRAGMENT")
# `dim` is the sample axis, -1 for a tensor that the samples share.
_library.define("sample(Tensor x, int dim) -> Tensor")
_library.define("leaf(Tensor x, int dim) -> Tensor")
_library.define("gradient(Tensor loss, Tensor[] leaves, SymInt n) -> Tensor[]")
_library.define("read_out(Tensor x, SymInt n) -> Tensor")
# A method of `LeafGrads`, asked of one leaf's gradients; what stands for a `LeafGrads` is a tensor of the size it would have.
_library.define("ask(Tensor grads, str question, Tensor[] tensors, float[] numbers, int[] integers) -> Tensor[]")
ops = torch.ops.per_sample


@torch.library.register_fake("per_sample::sample", lib=_library)
@torch.library.register_fake("per_sample::leaf", lib=_library)
def _one(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x if dim < 0 else x.select(dim, 0))


@torch.library.register_fake("per_sample::gradient", lib=_library)
def _gradient(loss: Tensor, leaves: list[Tensor], n: int) -> list[Tensor]:
    return [x.new_empty((n, *x.shape)) for x in leaves]


@torch.library.register_fake("per_sample::read_out", lib=_library)
def _read_out(x: Tensor, n: int) -> Tensor:
    return x.new_empty((n, *x.shape))


@torch.library.impl("per_sample::leaf", "Autograd", lib=_library)
def _leaf_recorded(x: Tensor, dim: int) -> Tensor:
    """Requires grad, as dynamo looks at a custom function's backward only where its arguments do."""
    with torch._C._AutoDispatchBelowAutograd():
        leaf = ops.leaf(x, dim).requires_grad_()
    _callers[leaf] = x.requires_grad
    return leaf


@torch.library.impl("per_sample::gradient", "Autograd", lib=_library)
def _gradient_recorded(loss: Tensor, leaves: list[Tensor], n: int) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        grads = ops.gradient(loss, leaves, n)
    return [_outside(grad, loss) for grad in grads]


@torch.library.impl("per_sample::read_out", "Autograd", lib=_library)
def _read_out_recorded(x: Tensor, n: int) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        values = ops.read_out(x, n)
    return _outside(values, x)


_callers = WeakTensorKeyDictionary()


def _outside(found: Tensor, of: Tensor) -> Tensor:
    """What the caller is given, which requires grad where something of the caller's does, as opposed to the leaves made here."""
    waiting, seen = [of.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and _callers.get(variable, True) and torch.is_grad_enabled():
            return found.requires_grad_().clone()
        waiting += [following for following, _ in node.next_functions]
    return found


@torch.library.register_fake("per_sample::ask", lib=_library)
def _ask(grads: Tensor, question: str, tensors: list[Tensor], numbers: list[float], integers: list[int]) -> list[Tensor]:
    """The sizes of the answers, by asking a tensor of gradients."""
    found = answered(LeafGrads(Dense(grads), functional=True), question, tensors, numbers, integers)
    return [torch.empty_like(x.materialize() if isinstance(x, LeafGrads) else x) for x in found]


def answered(grads: LeafGrads, question: str, tensors: list[Any], numbers: list[float], integers: list[int]) -> list[Any]:
    """What the gradients answer: a list of tensors, or of gradients in another form."""
    if question == "gram":
        other = tensors[0] if isinstance(tensors[0], LeafGrads) else LeafGrads(Dense(tensors[0]), functional=True)
        return [grads.gram(other)]
    if question in _PROJECTORS:
        *fields, leaf = map(int, integers)  # dynamo may have made symbols of them
        return [grads.project(_PROJECTORS[question](*fields), leaf)]
    if question == "of_nobody":
        return [LeafGrads(Dense(grads.materialize()[:0]), functional=True)]
    found = getattr(grads, question)(*tensors, *numbers)
    return list(found) if isinstance(found, tuple) else [found]


_PROJECTORS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        projectors.GaussianProjector,
        projectors.RademacherProjector,
        projectors.SparseProjector,
        projectors.FactoredProjector,
    )
}


class TracedGrads:
    """``LeafGrads`` as dynamo sees it: each question is a marker in the graph."""

    def __init__(self, grads: Tensor, n: int, shape: tuple[int, ...]) -> None:
        self.grads = grads
        # Not asked of `grads`, which is no tensor when the graph runs.
        self.n = n
        self.shape = shape
        self.dtype = grads.dtype

    def _ask(self, question: str, *tensors: Tensor, numbers: tuple[float, ...] = (), integers: tuple[int, ...] = ()) -> list[Tensor]:
        found: list[Tensor] = ops.ask(self.grads, question, list(tensors), [float(x) for x in numbers], list(integers))
        return found

    def materialize(self) -> Tensor:
        """As in ``LeafGrads``, and so are the other methods."""
        return self._ask("materialize")[0]

    def sq_norm(self) -> Tensor:
        """As in ``LeafGrads``."""
        return self._ask("sq_norm")[0]

    def norm(self, ord: float = 2) -> Tensor:
        """As in ``LeafGrads``."""
        return self._ask("norm", numbers=(ord,))[0]

    def weighted_sum(self, weights: Tensor | None = None) -> Tensor:
        """As in ``LeafGrads``."""
        return self._ask("weighted_sum", *(() if weights is None else (weights,)))[0]

    def square_sum(self) -> Tensor:
        """As in ``LeafGrads``."""
        return self._ask("square_sum")[0]

    def moments(self) -> tuple[Tensor, Tensor]:
        """As in ``LeafGrads``."""
        mean, spread = self._ask("moments")
        return mean, spread

    def dot(self, direction: Tensor) -> Tensor:
        """As in ``LeafGrads``."""
        return self._ask("dot", direction)[0]

    def gram(self, other: TracedGrads) -> Tensor:
        """As in ``LeafGrads``."""
        return self._ask("gram", other.grads)[0]

    def project(self, projector: Any, leaf: int) -> Tensor:
        """As in ``LeafGrads``."""
        name = type(projector).__name__
        if name not in _PROJECTORS:
            raise UnsupportedError(f"torch.compile knows the library's own projectors alone, not {name}.")
        fields = [getattr(projector, field.name) for field in dataclasses.fields(projector)]
        return self._ask(name, integers=(*fields, leaf))[0]

    def sq_condition(self, square: Tensor) -> Tensor:
        """As in ``LeafGrads``."""
        return self._ask("sq_condition", square)[0]

    def settled(self) -> tuple[Tensor, TracedGrads]:
        """As in ``LeafGrads``."""
        square, grads = self._ask("settled")
        return square, TracedGrads(grads, self.n, self.shape)

    def kept(self, keep: Tensor) -> TracedGrads:
        """As in ``LeafGrads``."""
        return TracedGrads(self._ask("kept", keep)[0], self.n, self.shape)

    def of(self, samples: Tensor) -> TracedGrads:
        """As in ``LeafGrads``."""
        return TracedGrads(self._ask("of", samples)[0], samples.shape[0], self.shape)

    def of_nobody(self) -> TracedGrads:
        """The gradients of no samples, of the same kind."""
        return TracedGrads(self._ask("of_nobody")[0], 0, self.shape)
