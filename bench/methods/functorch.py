"""`torch.func`: `vmap(grad(fn))`, reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.methods.method import Prepare, Runner
from bench.methods.reductions import REDUCTIONS
from bench.methods.streaming import streamed
from bench.workloads import Params, Task


def vmap(quantity: str, *, compiled: bool = False) -> Prepare:
    """All samples at once."""
    reduce = REDUCTIONS[quantity]

    def prepare(task: Task) -> Runner:
        max_norm = task.max_norm

        def step(params: Params, x: Tensor, y: Tensor) -> list[Tensor]:
            return reduce(_gradients(task, params, x, y), max_norm)

        run = torch.compile(step, fullgraph=True) if compiled else step
        return lambda: run(task.params, task.x, task.y)

    return prepare


def chunked(quantity: str) -> Prepare:
    """In four chunks, whose intermediate results stay in the caches better."""

    def prepare(task: Task) -> Runner:
        size = -(-task.workload.n // 4)
        return streamed(lambda x, y: _gradients(task, task.params, x, y), task, quantity, size)

    return prepare


def _gradients(task: Task, params: Params, x: Tensor, y: Tensor) -> list[Tensor]:
    keep = task.workload.keep_batch_dim

    def one(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return task.fn(params, x.unsqueeze(0), y.unsqueeze(0)) if keep else task.fn(params, x, y)

    grads: Params = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(params, x, y)
    return list(grads.values())
