"""This library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import per_sample
from bench.methods.method import Prepare, Runner
from bench.workloads import Task


def _gradients(task: Task) -> Callable[..., Any]:
    return per_sample.per_sample_grad(task.fn, keep_batch_dim=task.workload.keep_batch_dim)


def _norms(task: Task) -> Callable[..., Any]:
    return per_sample.per_sample_grad_norm(task.fn, keep_batch_dim=task.workload.keep_batch_dim)


def _clipped(task: Task, memory: str = "fast") -> Callable[..., Any]:
    return per_sample.clipped_grad(task.fn, task.max_norm, keep_batch_dim=task.workload.keep_batch_dim, memory=memory)


def _gram(task: Task) -> Callable[..., Any]:
    return per_sample.grad_gram(task.fn, keep_batch_dim=task.workload.keep_batch_dim)


_TRANSFORMS = {"gradients": _gradients, "norms": _norms, "clipped": _clipped, "gram": _gram}


def ours(quantity: str, *, compiled: bool = False, **options: Any) -> Prepare:
    """The public transform of that quantity."""

    def prepare(task: Task) -> Runner:
        transformed = _TRANSFORMS[quantity](task, **options)

        def step(*args: Any) -> list[Tensor]:
            answer = transformed(*args)
            return [answer] if isinstance(answer, Tensor) else list(answer.values())

        run = torch.compile(step, fullgraph=True) if compiled else step
        return lambda: run(task.params, task.x, task.y)

    return prepare
