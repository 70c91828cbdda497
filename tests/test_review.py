"""What a review of the newest parts found: isolation of grouped products, layouts, outer derivatives, restarts together, side effects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import while_loop
from torch.utils.checkpoint import checkpoint

from case import score
from per_sample import UnsupportedError, call_for_per_sample_grads, options, per_sample_grad
from tree_oracle import assert_close, loop

D = torch.float64
N = 6
W = torch.randn(4, 4, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 4, 4, dtype=D, generator=torch.Generator().manual_seed(2))
B = torch.randn(4, 3, dtype=D, generator=torch.Generator().manual_seed(3))


def test_rows_of_no_expert_reach_no_other_sample():
    experts = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    ends = torch.tensor([[4, 12], [3, 16], [8, 10], [1, 2]], dtype=torch.int32)

    def fn(w: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        y = torch._grouped_mm(x, w, offs=ends)
        return torch.where((torch.arange(16) < ends[-1])[:, None], y, 0.0).float().sin().sum()

    clean = per_sample_grad(fn)(experts, rows, ends)
    rows[0, 14] = float("nan")
    assert torch.equal(per_sample_grad(fn)(experts, rows, ends)[1:], clean[1:])


MATRICES = {
    "det": lambda a: torch.linalg.det(a),
    "slogdet": lambda a: torch.linalg.slogdet(a)[1],
    "solve": lambda a: torch.linalg.solve(a, B),
    "solve on the right": lambda a: torch.linalg.solve(a, B.t(), left=False),
    "inverse": torch.linalg.inv,
    "factors": lambda a: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), B),
}
LAYOUTS = {
    "in one piece": lambda w, x: w + x,
    "transposed": lambda w, x: (w + x).t(),
    "shared": lambda w, x: w * x[0, 0].exp(),
    "product": lambda w, x: x.t() @ w,
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "samples", [X, X.mT.contiguous().mT, X.permute(1, 2, 0).contiguous().permute(2, 0, 1)], ids=["rows", "columns", "last"]
)
def test_matrices_of_any_layout_and_their_outer_derivatives(name, layout, samples):
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return score(MATRICES[name](LAYOUTS[layout](w, x)))

    w = W.clone().requires_grad_()
    grads = per_sample_grad(fn)(w, samples)
    expected = torch.stack([torch.autograd.grad(fn(w, x), w, create_graph=True)[0] for x in samples])
    assert_close(grads, expected)
    weights = torch.arange(grads.numel(), dtype=D).cos().view_as(grads)
    found, wanted = (torch.autograd.grad((g * g * weights).sum(), w)[0] for g in (grads, expected))
    assert_close(found / wanted.abs().max(), wanted / wanted.abs().max())


def write_all(w: Tensor, x: Tensor, s: Tensor) -> Tensor:
    x.mul_(2)
    s.add_(1)
    y = torch.zeros(4, 4, dtype=D)
    y[0] = x[0]
    z = torch.arange(4.0, dtype=D)
    z[1] = x[1, 1]
    return score(w * x * y * z * s)


@pytest.mark.parametrize("closed", [False, True])
def test_writes_into_arguments_and_into_tensors_of_its_own(closed):
    factor = (B[0, 0] * torch.ones(4, 4, dtype=D)).requires_grad_(closed)

    def fn(w: Tensor, x: Tensor, s: Tensor) -> Tensor:
        return write_all(w * factor, x, s)

    s = B[:, 0].clone()
    expected = loop(lambda w, x: fn(w, x.clone(), s.clone()), (0,), (None, 0))(W, X)[0]
    samples, shared = X.clone(), s.clone()
    assert_close(per_sample_grad(fn, in_dims=(None, 0, None))(W, samples, shared), expected)
    assert torch.equal(samples, X)
    assert torch.equal(shared, s)


def test_a_number_of_eight_bits_without_a_sign_is_a_mask():
    numbers = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.uint8)
    with options(split_batch=True):
        grads = per_sample_grad(lambda w, x, i: score((w * x)[i]))(W, X, numbers)
    assert_close(grads, loop(lambda w, x, i: score((w * x)[i]), (0,), (None, 0, 0))(W, X, numbers)[0])


def turn(w: Tensor, x: Tensor, count: Tensor, loop_op: Any, cond: Any) -> Tensor:
    def body(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, cond(h.sum() > 0, lambda a: a.sin() * w[i], lambda a: a * 1.5 + w[0], (h,))

    return score(loop_op(lambda i, h: i < count, body, (torch.zeros((), dtype=torch.int64), w[0] * x[0]))[1])


def test_control_flow_inside_control_flow_on_values_that_need_a_gradient():
    def plain_loop(going: Any, body: Any, carried: Any) -> Any:
        while going(*carried):
            carried = body(*carried)
        return carried

    def plain_cond(condition: Any, yes: Any, no: Any, operands: Any) -> Any:
        return (yes if condition else no)(*operands)

    counts = torch.tensor([0, 1, 2, 3, 4, 2])
    grads = per_sample_grad(lambda w, x, k: turn(w, x, k, while_loop, torch.cond))(W, X, counts)
    assert_close(grads, loop(lambda w, x, k: turn(w, x, k, plain_loop, plain_cond), (0,), (None, 0, 0))(W, X, counts)[0])


def test_an_empty_batch_whose_loop_depends_on_values():
    def fn(w: Tensor, x: Tensor) -> Tensor:
        h = w * x
        while h.abs().sum() < 5:
            h = h * 2
        return h.sum()

    assert per_sample_grad(fn)(W, X[:0]).shape == (0, 4, 4)


def test_a_reentrant_checkpoint_leaves_no_gradient_behind():
    outside = W.clone().requires_grad_()

    def fn(w: Tensor, x: Tensor) -> Tensor:
        return score(checkpoint(lambda a: (a * outside) @ x, w, use_reentrant=True))

    with torch.no_grad(), pytest.raises(UnsupportedError, match="reentrant checkpoint"):
        per_sample_grad(fn)(W, X)
    assert outside.grad is None


class Saved(torch.autograd.Function):
    """Its gradient is the very tensor that it got."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (w * x).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0], None


def test_a_gradient_is_never_the_memory_of_an_argument():
    samples = X.clone()
    per_sample_grad(Saved.apply)(W, samples).zero_()
    assert torch.equal(samples, X)


def test_a_submodule_at_two_places_keeps_its_parameters():
    layer = torch.nn.Linear(4, 4, dtype=D)
    weight = layer.weight
    call_for_per_sample_grads(torch.nn.Sequential(layer, torch.nn.Tanh(), layer))(X[:, 0]).sin().sum().backward()
    assert layer.weight is weight
    params = {"weight": weight.detach(), "bias": layer.bias.detach()}

    def fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        once = torch.nn.functional.linear(x, p["weight"], p["bias"]).tanh()
        return torch.nn.functional.linear(once, p["weight"], p["bias"]).sin().sum()

    expected = loop(fn, (0,), (None, 0))(params, X[:, 0])[0]
    assert_close({"weight": weight.grad_sample, "bias": layer.bias.grad_sample}, expected)


def test_autocast_in_the_forward_pass_only():
    layer = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call_for_per_sample_grads(layer)(X[:, 0].float())
    out.float().sum().backward()
    torch.testing.assert_close(layer.weight.grad_sample.double(), X[:, :1].expand(N, 4, 4), rtol=2e-2, atol=2e-2)
