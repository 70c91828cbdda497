"""The table of methods. To add one: a row in `METHODS`.

A method is prepared once for a task, outside the timed region, and gives a function without arguments that computes
its answer: a list of tensors in the order of the parameters. A method that cannot run a workload raises; the report
gives the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads import Params, Task

Runner = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Method:
    """One way to compute one quantity."""

    name: str
    # a name in `check.QUANTITIES`: what the answer is checked against; None: nothing to check
    quantity: str | None
    prepare: Callable[[Task], Runner]
    # left out unless asked for by name or with `--all`
    optional: bool = False


def _plain(task: Task) -> Runner:
    """The batched gradient, the sum over samples: what training without per-sample gradients pays."""
    model = task.copy_model()
    params = list(model.parameters())

    def run() -> list[Tensor]:
        return list(torch.autograd.grad(task.workload.loss(model(task.x), task.y), params))

    return run


def _write(task: Task) -> Runner:
    """One write of the result, fresh memory and all: no method that returns it can be without."""
    shapes = [(task.workload.n, *p.shape) for p in task.params.values()]
    return lambda: [torch.empty(shape).fill_(1.0) for shape in shapes]


def _loop(task: Task) -> Runner:
    """Plain autograd, one sample at a time."""
    model = task.copy_model()
    params = list(model.parameters())

    def run() -> list[Tensor]:
        rows = [
            torch.autograd.grad(task.workload.loss(model(x), y), params)
            for x, y in zip(task.x.unsqueeze(1), task.y.unsqueeze(1), strict=True)
        ]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    return run


def _vmap_of_grad(task: Task, chunk_size: int | None = None) -> Callable[[Params, Tensor, Tensor], Params]:
    keep = task.workload.keep_batch_dim

    def one(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return task.fn(params, x.unsqueeze(0), y.unsqueeze(0)) if keep else task.fn(params, x, y)

    transformed: Callable[[Params, Tensor, Tensor], Params]
    transformed = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0), chunk_size=chunk_size)
    return transformed


def _calling(transformed: Callable[[Params, Tensor, Tensor], Params], task: Task) -> Runner:
    return lambda: list(transformed(task.params, task.x, task.y).values())


def _vmap(task: Task) -> Runner:
    return _calling(_vmap_of_grad(task), task)


def _vmap_chunked(task: Task) -> Runner:
    """In four chunks, whose intermediate results stay in the caches better."""
    return _calling(_vmap_of_grad(task, chunk_size=-(-task.workload.n // 4)), task)


def _vmap_compiled(task: Task) -> Runner:
    return _calling(torch.compile(_vmap_of_grad(task), fullgraph=True), task)


def _taking_grad_sample(model: nn.Module, backward: Callable[[], None]) -> Runner:
    """For methods that leave their answer on the parameters."""

    def run() -> list[Tensor]:
        backward()
        answer = []
        for name, p in model.named_parameters():
            grad = getattr(p, "grad_sample", None)
            if grad is None:
                raise RuntimeError(f"no per-sample gradient for `{name}`")
            answer.append(grad)
            p.grad_sample = p.grad = None  # type: ignore[attr-defined]
        return answer

    return run


def _expanded_weights(task: Task) -> Runner:
    from torch.nn.utils import _per_sample_grad

    of_module: Any = _per_sample_grad.call_for_per_sample_grads
    model = task.copy_model()

    def backward() -> None:
        output = of_module(model, batch_size=task.workload.n, loss_reduction="sum")(task.x)
        torch.autograd.backward(task.workload.loss(output, task.y))

    return _taking_grad_sample(model, backward)


def _opacus_hooks(task: Task) -> Runner:
    opacus = importlib.import_module("opacus")
    model = opacus.GradSampleModule(task.copy_model(), loss_reduction="sum")
    return _taking_grad_sample(model, lambda: torch.autograd.backward(task.workload.loss(model(task.x), task.y)))


def _transformed(task: Task) -> Callable[[Params, Tensor, Tensor], Params]:
    from per_sample import per_sample_grad

    transformed: Callable[[Params, Tensor, Tensor], Params]
    transformed = per_sample_grad(task.fn, keep_batch_dim=task.workload.keep_batch_dim)
    return transformed


def _ours(task: Task) -> Runner:
    return _calling(_transformed(task), task)


def _ours_compiled(task: Task) -> Runner:
    return _calling(torch.compile(_transformed(task), fullgraph=True), task)


_TABLE = (
    Method("plain", "sum", _plain),
    Method("write", None, _write),
    Method("loop", "gradients", _loop, optional=True),
    Method("vmap", "gradients", _vmap),
    Method("vmap-chunked", "gradients", _vmap_chunked, optional=True),
    Method("vmap-compiled", "gradients", _vmap_compiled, optional=True),
    Method("expanded-weights", "gradients", _expanded_weights),
    Method("opacus-hooks", "gradients", _opacus_hooks),
    Method("ours", "gradients", _ours),
    Method("ours-compiled", "gradients", _ours_compiled, optional=True),
)
METHODS: dict[str, Method] = {m.name: m for m in _TABLE}

# What the ratios are taken of, so they are always run.
BASELINES = ("plain", "write")
