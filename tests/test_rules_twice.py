"""Rules with a hand-written backward, differentiated once more by the caller, against a loop of plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from case import Case
from cases import BAGS, EMBEDDING, LINEAR
from cases_conv import CONVOLUTIONS
from cases_layers import ATTENTION, LOSSES, NORMS
from per_sample import per_sample_grad

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

# Torch's own second derivative of these leaves the frequencies out, or gives sparse tensors, or has an implementation for
# neither.
LEFT_OUT = ("embedding-frequencies", "embedding-both", "embedding-sparse")


def _wanted(case: Case) -> bool:
    if case.name in LEFT_OUT or case.name.startswith(("conv3d", "conv_transpose3d", "embedding_bag")):
        return False
    return not case.name.endswith(("-none", "-sum"))


CASES = [c for c in (*LINEAR, *EMBEDDING, *BAGS, *CONVOLUTIONS, *NORMS, *ATTENTION, *LOSSES) if _wanted(c)]


def loop(case: Case, params: list[Tensor], samples: list[Tensor]) -> list[Tensor]:
    rows = []
    for i in range(samples[0].shape[0]):
        one = [x[i : i + 1] if case.keep_batch_dim else x[i] for x in samples]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = case.loss(params, *one)
        found = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def weighed(grads: Any) -> Tensor:
    flat = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads]
    return sum(((g * torch.arange(g.numel()).double().cos().view(g.shape)).sum() for g in flat), torch.zeros(()).double())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_double_backward(case: Case) -> None:
    params, samples = case.draw(2)
    params = [p.requires_grad_() for p in params]
    inexact = [s.requires_grad_() for s in samples if s.is_floating_point() or s.is_complex()]
    if case.name.startswith("soft_margin"):
        inexact = [samples[0]]
        samples[1].requires_grad_(False)

    def second(grads: Any) -> list[Tensor | None]:
        total = weighed(grads)
        leaves = [*params, *inexact]
        if not total.requires_grad:
            return [None] * len(leaves)
        return list(torch.autograd.grad(total, leaves, allow_unused=True))

    got = second(per_sample_grad(case.loss, keep_batch_dim=case.keep_batch_dim)(params, *samples))
    want = second(loop(case, params, samples))
    for g, w, leaf in zip(got, want, (*params, *inexact), strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(zero if g is None else g, zero if w is None else w)
