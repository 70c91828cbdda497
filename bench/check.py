"""Is the answer right? To add a quantity: a row in `QUANTITIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.workloads import Task

# The distance to the reference over the reference's norm, for each leaf of each sample: float32 sums of some thousand
# products, in another order than the reference's, come to about 1e-6.
TOLERANCE = 1e-3
# A sample with a unit within rounding of the kink of a ReLU or of a maximum has two right gradients, some percent
# apart; among the half a million units of a ResNet, one sample in ten has one. So where float32 is off by no more
# than this, and most samples are within `TOLERANCE`, float64 decides, where such units are a billion times rarer.
KINK_TOLERANCE = 0.2
FLOAT64_TOLERANCE = 1e-8
# A leaf that is nearly zero by cancellation is measured against this part of the sample's whole gradient.
FLOOR = 1e-5


def reference(task: Task) -> list[Tensor]:
    """Every sample's gradient by a loop of plain autograd in float64, kept in the task's dtype."""
    exact = task.double()
    params = list(exact.model.parameters())
    answer = [torch.empty(task.workload.n, *p.shape, dtype=p.dtype) for p in task.params.values()]
    for i in range(task.workload.n):
        loss = task.workload.loss(exact.model(exact.x[i : i + 1]), exact.y[i : i + 1])
        grads = torch.autograd.grad(loss, params, materialize_grads=True)
        for rows, grad in zip(answer, grads, strict=True):
            rows[i] = grad
    return answer


def with_max_norm(task: Task, gradients: list[Tensor]) -> Task:
    """The task, clipping at the median norm: half of the samples are clipped."""
    return replace(task, max_norm=float(_norms(gradients)[0].median()))


def _each(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    return gradients


def _sum(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    return _weighted(gradients, torch.ones(len(gradients[0]), dtype=torch.float64))


def _weighted(gradients: list[Tensor], weights: Tensor) -> list[Tensor]:
    """In float64, without a copy of all gradients."""
    answer = []
    for leaf in gradients:
        total = torch.zeros(leaf.shape[1:], dtype=torch.float64)
        for weight, row in zip(weights.tolist(), leaf, strict=True):
            total.add_(row, alpha=weight)
        answer.append(total)
    return answer


def _norms(gradients: list[Tensor], max_norm: float = 0.0) -> list[Tensor]:
    squares = [torch.stack([row.double().square().sum() for row in leaf]) for leaf in gradients]
    return [torch.stack(squares).sum(0).sqrt()]


def _clipped(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    norms = _norms(gradients)[0]
    return _weighted(gradients, torch.where(norms > max_norm, max_norm / norms, 1.0))


def _gram(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    rows = [leaf.flatten(1).double() for leaf in gradients]
    return [torch.stack([r @ r.T for r in rows]).sum(0)]


# From every sample's gradient to the quantity; a method's answer has the same shapes.
QUANTITIES: dict[str, Callable[[list[Tensor], float], list[Tensor]]] = {
    "gradients": _each,
    "sum": _sum,
    "norms": _norms,
    "clipped": _clipped,
    "gram": _gram,
}
# Those whose axis 0 is the sample.
PER_SAMPLE = {"gradients", "norms", "gram"}


def errors(got: list[Tensor], want: list[Tensor], quantity: str) -> Tensor:
    """Each sample's distance to the reference, relative to the norm, at its worst leaf: `[n]`; `[1]` for a sum.

    Raises:
        ValueError: the answer does not have the reference's shapes.
    """
    shapes = [list(g.shape) for g in got], [list(w.shape) for w in want]
    if shapes[0] != shapes[1]:
        raise ValueError(f"shapes {shapes[0]} instead of {shapes[1]}")

    def rows(t: Tensor) -> Tensor:
        return t.reshape(len(t), -1) if quantity in PER_SAMPLE else t.reshape(1, -1)

    norms = torch.stack([rows(w).norm(dim=1) for w in want])
    floor = FLOOR * norms.norm(dim=0)
    distances = torch.stack([rows(g.detach() - w).norm(dim=1) for g, w in zip(got, want, strict=True)])
    return (distances / torch.maximum(norms, floor)).nan_to_num(nan=float("inf")).amax(0)


def is_right(found: Tensor, quantity: str, in_float64: Callable[[], Tensor]) -> bool:
    """Whether errors in float32 are rounding, or a kink; `in_float64` gives the errors of the same method there."""
    worst = float(found.max())
    if worst <= TOLERANCE:
        return True
    mostly = quantity not in PER_SAMPLE or float(found.median()) <= TOLERANCE
    return worst <= KINK_TOLERANCE and mostly and float(in_float64().max()) <= FLOAT64_TOLERANCE
