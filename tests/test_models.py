"""Whole networks: every op has a rule, and the gradients are those of a loop of plain autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from models import GPT, convnext, resnet18
from oracle import loop_grads
from per_sample import _arguments, _run, per_sample_grad
from per_sample._record import Recorder
from versions import FUSED_WITHOUT_BATCH_AXIS

if TYPE_CHECKING:
    from torch import Tensor, nn

N = 3


def _images(model: nn.Module) -> tuple[Any, list[Tensor]]:
    names = [name for name, _ in model.named_parameters()]

    def loss(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        scores = functional_call(model, dict(zip(names, params, strict=True)), (x,))
        return F.cross_entropy(scores, y)

    return loss, [torch.randn(N, 3, 32, 40, dtype=torch.float64), torch.randint(0, 7, (N,))]


def _text(model: nn.Module) -> tuple[Any, list[Tensor]]:
    names = [name for name, _ in model.named_parameters()]

    def loss(params: list[Tensor], x: Tensor) -> Tensor:
        scores = functional_call(model, dict(zip(names, params, strict=True)), (x[..., :-1],))
        return F.cross_entropy(scores.flatten(0, -2), x[..., 1:].flatten())

    return loss, [torch.randint(0, 11, (N, 9))]


# Group norm wants a batch axis, so the ResNet runs with one only.
@pytest.mark.parametrize(
    ("make", "task", "keep"),
    [(resnet18, _images, True), *((m, t, k) for m, t in ((GPT, _text), (convnext, _images)) for k in (False, True))],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_every_op_has_a_rule(make: Any, task: Any, keep: bool) -> None:
    torch.manual_seed(0)
    model = make().double()
    loss, samples = task(model)
    params = [p.detach() for p in model.parameters()]

    recorder = Recorder()
    arguments = _arguments.read((params, *samples), 0, None)
    program = _run.Program(loss, {}, False, keep, "error")
    _run.run(program, arguments, arguments.leaves, N, lambda number, factor, functional: factor, recorder)
    assert {row for row in recorder.rows if row[1] in ("fallback", "loop")} == set()
    flash = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert ((flash, "rule") in recorder.rows) == (make is GPT and (keep or FUSED_WITHOUT_BATCH_AXIS))

    grads = per_sample_grad(loss, keep_batch_dim=keep)(params, *samples)
    expected, _ = loop_grads(loss, params, samples, keep_batch_dim=keep)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)
