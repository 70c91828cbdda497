"""Peers that take norms from a layer's input and output gradient, and clip by a second backward pass of weighted losses."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from bench.methods.hooks import taken
from bench.methods.method import Runner
from bench.methods.reductions import clipping_weights
from bench.workloads import Task


def _opacus_model(task: Task) -> Any:
    module = importlib.import_module("opacus.grad_sample").GradSampleModuleFastGradientClipping
    return module(task.copy_model(), loss_reduction="sum", max_grad_norm=task.max_norm)


def opacus_norms(task: Task) -> Runner:
    """`GradSampleModuleFastGradientClipping`, one backward pass."""
    model = _opacus_model(task)

    def run() -> list[Tensor]:
        task.workload.loss(model(task.x), task.y).backward()
        model.zero_grad()
        return [model.get_norm_sample()]

    return run


def opacus_clipped(task: Task) -> Runner:
    """What `DPLossFastGradientClipping` does, with weights that have no 1e-6 in them."""
    model = _opacus_model(task)

    def run() -> list[Tensor]:
        losses = task.workload.loss(model(task.x), task.y, reduction="none")
        losses.sum().backward(retain_graph=True)
        model.zero_grad()
        weights = clipping_weights(model.get_norm_sample(), task.max_norm)
        model.disable_hooks()
        try:
            (weights * losses).sum().backward()
        finally:
            model.enable_hooks()
        return taken(model, "grad")

    return run


def _backpack_norms(model: nn.Module, loss: Tensor, *, retain_graph: bool = False) -> Tensor:
    package: Any = importlib.import_module("backpack")
    extension = importlib.import_module("backpack.extensions").BatchL2Grad
    with package.backpack(extension(), retain_graph=retain_graph):
        loss.backward(retain_graph=retain_graph)
    return torch.stack(taken(model, "batch_l2")).sum(0).sqrt()


def backpack_norms(task: Task) -> Runner:
    """`BatchL2Grad`, one backward pass."""
    model = importlib.import_module("backpack").extend(task.copy_model())
    return lambda: [_backpack_norms(model, task.workload.loss(model(task.x), task.y))]


def backpack_clipped(task: Task) -> Runner:
    """`BatchL2Grad`, then a plain backward pass through the same graph."""
    model = importlib.import_module("backpack").extend(task.copy_model())

    def run() -> list[Tensor]:
        losses = task.workload.loss(model(task.x), task.y, reduction="none")
        weights = clipping_weights(_backpack_norms(model, losses.sum(), retain_graph=True), task.max_norm)
        (weights * losses).sum().backward()
        return taken(model, "grad")

    return run
