"""Tensors from outside the function: they do not change; a write into one is refused, however it is spelt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from per_sample import SharedWriteError, UnsupportedError, per_sample_grad
from tree_oracle import assert_close, loop

D = torch.float64
N = 4
W = torch.randn(2, 3, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 3, dtype=D, generator=torch.Generator().manual_seed(2))


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x[:, None]).tanh().square().sum()


PARAMETER = nn.Linear(3, 2).double().weight
PLAIN = torch.zeros(2, 3, dtype=D)


def _spectral() -> nn.Module:
    torch.manual_seed(0)
    return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2).double())


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("target", [PARAMETER, PLAIN], ids=["parameter", "tensor"])
@pytest.mark.parametrize(
    "write",
    [
        lambda t, w, x: t.add_(1.0),
        lambda t, w, x: t.__setitem__(0, 5.0),
        lambda t, w, x: nn.init.zeros_(t),
        lambda t, w, x: t.detach().mul_(2),
        lambda t, w, x: t.data.mul_(2),
        lambda t, w, x: t.copy_(w),
        lambda t, w, x: t.copy_(w * x),
        lambda t, w, x: t[0].copy_(x),
        lambda t, w, x: torch._foreach_add_([t], 1.0),
        lambda t, w, x: torch.mul(torch.ones(2, 3, dtype=D), 2.0, out=t),
        lambda t, w, x: torch.mul(w, 2.0, out=t),
        lambda t, w, x: torch.mul(w, x, out=t),
    ],
)
def test_tensors_from_outside_do_not_change(write: Any, target: Tensor, recorded: bool) -> None:
    before = target.detach().clone()

    def fn(w: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            write(target, w, x)
        return loss(w, x)

    with pytest.raises((SharedWriteError, UnsupportedError)):
        per_sample_grad(fn)(W.clone().requires_grad_(recorded), X)
    torch.testing.assert_close(target.detach(), before, rtol=0, atol=0)


def test_a_module_that_updates_its_own_buffers_is_refused_or_left_alone() -> None:
    net = _spectral()
    before = {k: v.clone() for k, v in net.named_buffers()}
    params = {k: v.detach() for k, v in net.named_parameters()}

    def fn(p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(net, p, (x,)).square().sum()

    with pytest.raises(SharedWriteError):
        per_sample_grad(fn)(params, X)
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)
    net.eval()
    assert_close(per_sample_grad(fn)(params, X), loop(fn, (0,), (None, 0))(params, X)[0])
