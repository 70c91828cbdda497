"""Methods that leave every sample's gradient on the parameters: torch's ExpandedWeights, Opacus' and BackPACK's hooks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.methods.method import Prepare, Runner
from bench.methods.reductions import REDUCTIONS
from bench.workloads import Task


def taken(model: nn.Module, attribute: str) -> list[Tensor]:
    """What a backward pass has left on the parameters, which are as before it again."""
    answer = []
    for name, p in model.named_parameters():
        found = getattr(p, attribute, None)
        if found is None:
            raise RuntimeError(f"nothing for `{name}`")
        answer.append(found)
        setattr(p, attribute, None)
        p.grad = None
    return answer


def _reduced(model: nn.Module, attribute: str, backward: Callable[[], None], quantity: str, task: Task) -> Runner:
    reduce = REDUCTIONS[quantity]

    def run() -> list[Tensor]:
        backward()
        return reduce(taken(model, attribute), task.max_norm)

    return run


def expanded_weights(quantity: str) -> Prepare:
    """`torch.nn.utils._per_sample_grad`."""

    def prepare(task: Task) -> Runner:
        from torch.nn.utils import _per_sample_grad

        of_module: Any = _per_sample_grad.call_for_per_sample_grads
        model = task.copy_model()
        # It has no rule for oneDNN's LSTM, only for the ops that stand in for it.
        recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())

        def backward() -> None:
            with torch.backends.mkldnn.flags(enabled=not recurrent):
                output = of_module(model, batch_size=task.workload.n, loss_reduction="sum")(task.x)
                torch.autograd.backward(task.workload.loss(output, task.y))

        return _reduced(model, "grad_sample", backward, quantity, task)

    return prepare


def opacus(quantity: str, **options: Any) -> Prepare:
    """`opacus.GradSampleModule`."""

    def prepare(task: Task) -> Runner:
        model = importlib.import_module("opacus").GradSampleModule(task.copy_model(), loss_reduction="sum", **options)

        def backward() -> None:
            torch.autograd.backward(task.workload.loss(model(task.x), task.y))

        return _reduced(model, "grad_sample", backward, quantity, task)

    return prepare


def backpack(quantity: str) -> Prepare:
    """`backpack.extensions.BatchGrad`."""

    def prepare(task: Task) -> Runner:
        package: Any = importlib.import_module("backpack")
        extension = importlib.import_module("backpack.extensions").BatchGrad
        model = package.extend(task.copy_model())

        def backward() -> None:
            with package.backpack(extension()):
                torch.autograd.backward(task.workload.loss(model(task.x), task.y))

        return _reduced(model, "grad_batch", backward, quantity, task)

    return prepare
