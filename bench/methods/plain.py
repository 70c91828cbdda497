"""The baselines, and plain autograd one sample at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.methods.method import Prepare, Runner
from bench.methods.streaming import streamed
from bench.workloads import Task


def batched(task: Task) -> Runner:
    """The batched gradient, the sum over samples: what training without per-sample gradients pays."""
    model = task.copy_model()
    params = list(model.parameters())

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(task.workload.loss(model(task.x), task.y), params))

    return run


def write(task: Task) -> Runner:
    """One write of the gradients, fresh memory and all: no method that returns them can be without."""
    shapes = [(task.workload.n, *p.shape) for p in task.params.values()]
    return lambda: [torch.empty(shape).fill_(1.0) for shape in shapes]


def loop(quantity: str) -> Prepare:
    """Plain autograd, one sample at a time."""

    def prepare(task: Task) -> Runner:
        model = task.copy_model()
        params = list(model.parameters())

        def one(x: Tensor, y: Tensor) -> list[Tensor]:
            return [g.unsqueeze(0) for g in torch.autograd.grad(task.workload.loss(model(x), y), params)]

        return streamed(one, task, quantity, size=1)

    return prepare
