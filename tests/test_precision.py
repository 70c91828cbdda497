"""Half precision: parameters of it, and autocast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checked import call, score, state_of
from per_sample import per_sample_grad, per_sample_grad_and_value

if TYPE_CHECKING:
    from collections.abc import Callable

N = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


class Mixed(nn.Module):
    """Layers of every kind that autocast treats in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(7, 8), nn.Conv1d(8, 6, 3)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, i: Tensor) -> Tensor:
        x = self.conv(self.embedding(i).transpose(-1, -2)).transpose(-1, -2)
        return F.log_softmax(self.head(F.gelu(self.norm(x))), -1)


def _by_loop(loss: Callable[..., Tensor], params: dict[str, Tensor], *samples: Tensor) -> dict[str, Tensor]:
    rows = []
    for one in zip(*samples, strict=True):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        rows.append(torch.autograd.grad(loss(leaves, *one), list(leaves.values())))
    return {name: torch.stack(column) for name, column in zip(params, zip(*rows, strict=True), strict=True)}


def _assert_near(got: dict[str, Tensor], want: dict[str, Tensor], unit: float) -> None:
    """Within a few roundings of the largest entry.

    Each value is rounded once by every op on its way, forward and backward: some twenty here, whose errors add up like a random walk,
    and a rounding of an operand changes a sum by up to a unit of its largest term, not of the result.
    """
    for name, g in want.items():
        assert got[name].shape == g.shape
        error = (got[name].double() - g.double()).abs().max() / g.double().abs().max()
        assert error < 8 * unit, (name, float(error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The dtypes of everything, and numbers as near to those of full precision as the loop's."""
    model = Mixed()
    index = torch.randint(0, 7, (N, 9))
    seen: list[list[torch.dtype]] = []

    def loss(p: Any, i: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            x = model.embedding(i)
            hidden = torch.func.functional_call(model.head, {"weight": p["head.weight"], "bias": p["head.bias"]}, x[..., :6])
            out = call(model, p, i)
        seen.append([x.dtype, hidden.dtype, out.dtype])
        return score(out) + score(hidden)

    grads, values = per_sample_grad_and_value(loss)(state_of(model), index)
    expected = _by_loop(loss, state_of(model), index)
    assert seen[0] == seen[-1]
    assert dtype in seen[0]
    assert {name: g.dtype for name, g in grads.items()} == {name: p.dtype for name, p in model.named_parameters()}
    assert values.shape == (N,)
    _assert_near(grads, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    model = Mixed().to(dtype)
    index = torch.randint(0, 7, (N, 9))
    grads = per_sample_grad(lambda p, i: score(call(model, p, i)))(state_of(model), index)
    assert {g.dtype for g in grads.values()} == {dtype}
    exact = Mixed()
    exact.load_state_dict({name: p.float() for name, p in model.state_dict().items()})
    _assert_near(grads, _by_loop(lambda p, i: score(call(exact, p, i)), state_of(exact), index), torch.finfo(dtype).eps)
