"""Several reasons to begin again in one function, and what a run must not leave behind."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops import while_loop
from torch.utils.checkpoint import checkpoint

from case import score
from per_sample import UnsupportedError, explain, options, per_sample_grad
from tree_oracle import assert_close, loop

D = torch.float64
N = 6
W = torch.randn(4, 4, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 4, 4, dtype=D, generator=torch.Generator().manual_seed(2))
B = torch.randn(4, 3, dtype=D, generator=torch.Generator().manual_seed(3))


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


def test_what_all_samples_share_stays_shared_when_fresh_tensors_are_written():
    def fn(w: Tensor, x: Tensor) -> Tensor:
        y = torch.zeros(4, 4, dtype=D)
        y[0] = x[0]
        return score((w * w).tanh() @ y)

    assert_close(per_sample_grad(fn)(W, X), loop(fn, (0,), (None, 0))(W, X)[0])
    routes = {row.op: row.route for row in explain(fn)(W, X).rows if row.op in ("aten.tanh.default", "aten.mm.default")}
    assert routes == {"aten.tanh.default": "shared", "aten.mm.default": "rule"}


def test_one_tensor_as_two_arguments_shows_what_is_written_into_either():
    def fn(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return score(w * y)

    samples = X.clone()
    expected = loop(lambda w, x: score(w * (2 * x)), (0,), (None, 0))(W, X)[0]
    assert_close(per_sample_grad(fn)(W, samples, samples), expected)
    assert torch.equal(samples, X)


def test_one_tensor_differentiated_and_held_fixed():
    def fn(w: Tensor, fixed: Tensor, x: Tensor) -> Tensor:
        return score(w * fixed * x)

    expected = loop(lambda w, x: fn(w, W.clone(), x), (0,), (None, 0))(W, X)[0]
    assert_close(per_sample_grad(fn, 0, (None, None, 0))(W, W, X), expected)
    assert_close(per_sample_grad(fn, 0, (0, 0, 0))(X, X, X), loop(fn, (0,), (0, 0, 0))(X, X.clone(), X.clone())[0])


def test_a_split_batch_is_differentiated_again():
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return score(w * x) if x.sum() > 0 else score(w @ x).sin()

    w = W.clone().requires_grad_()
    with options(split_batch=True):
        assert explain(fn)(W, X).runs == 2
        grads = per_sample_grad(fn)(w, X)
    expected = torch.stack([torch.autograd.grad(fn(w, x), w, create_graph=True)[0] for x in X])
    found, wanted = (torch.autograd.grad(score(g), w)[0] for g in (grads, expected))
    assert_close(found, wanted)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_a_loop_until_random_numbers_are_large_enough(randomness):
    def fn(w: Tensor, x: Tensor) -> Any:
        def body(h: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            return h * 1.5, total + torch.rand(3, dtype=D)

        h, total = while_loop(lambda h, total: total.sum() < 4, body, (w * x, torch.zeros(3, dtype=D)))
        return h.sum(), total

    _, totals = per_sample_grad(fn, has_aux=True, randomness=randomness)(W, X)
    assert (totals.sum(1) >= 4).all()
    assert (totals.sum(1) < 7).all()


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


def test_a_run_that_began_again_leaves_nothing_behind():
    """What the first attempt had made hangs together in a cycle that the garbage collector does not see."""
    scale = torch.randn(30, requires_grad=True)
    transformed = per_sample_grad(lambda w, x: (F.linear(x, w) * scale).square().sum())
    made: list[Any] = []

    def bytes_alive() -> int:
        gc.collect()
        return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)

    for _ in range(4):
        transformed(torch.randn(30, 40), torch.randn(6, 50, 40))
        made.append(bytes_alive())
    assert made[-1] == made[1]
