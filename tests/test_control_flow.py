"""Control flow and indexing that only the function's own calls show: ``x[i]``, ``torch.cond``, ``torch.while_loop``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from case import score
from per_sample import UnsupportedError, explain, options, per_sample_grad
from tree_oracle import assert_close, loop

D = torch.float64
N = 6
W = torch.randn(5, 4, 3, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 5, 4, 3, dtype=D, generator=torch.Generator().manual_seed(2))
I = torch.tensor([0, 1, -1, 2, 3, -2])  # noqa: E741
K = torch.tensor([0, 1, 2, 1, -1, -3])
MASK, LIST = torch.tensor([True, False, True, True]), torch.tensor([0, 2, 1])

READS = {
    "row": lambda w, x, i, k: w[i],
    "two": lambda w, x, i, k: (w * x)[i, :, k],
    "ellipsis": lambda w, x, i, k: (w * x)[..., k],
    "new axis and mask": lambda w, x, i, k: (w * x)[i, None, MASK],
    "with a list of indices": lambda w, x, i, k: (w * x)[i, LIST, k],
    "before a list of indices": lambda w, x, i, k: (w * x)[i, :, LIST],
    "slice": lambda w, x, i, k: (w * x)[1:, i.clamp(0, 3), k],
    "small integers": lambda w, x, i, k: (w * x)[i.to(torch.int8)],
    "shared table": lambda w, x, i, k: w[i] * w[:, i.clamp(-4, 3)].sum(0),
}


@pytest.mark.parametrize("name", READS)
def test_reading_at_a_number_of_the_samples_own(name):
    def fn(w: Tensor, x: Tensor, i: Tensor, k: Tensor) -> Tensor:
        return score(READS[name](w, x, i, k))

    assert_close(per_sample_grad(fn)(W, X, I, K), loop(fn, (0,), (None, 0, 0, 0))(W, X, I, K)[0])
    report = explain(fn)(W, X, I, K)
    assert report.runs == 1
    assert not {"fallback", "loop"} & set(report.routes())


def write_row(y: Tensor, w: Tensor, i: Tensor, k: Tensor) -> None:
    y[i] = w[0]


def write_column(y: Tensor, w: Tensor, i: Tensor, k: Tensor) -> None:
    y[:, 1, k] = w[:, 0, 0] * 3


def add_to_place(y: Tensor, w: Tensor, i: Tensor, k: Tensor) -> None:
    y[i, 2] += 1.5 * w[1, 1]


def write_number(y: Tensor, w: Tensor, i: Tensor, k: Tensor) -> None:
    y[0, 0, k] = 7.0


def write_masked(y: Tensor, w: Tensor, i: Tensor, k: Tensor) -> None:
    y[i, MASK] = w[2, :3]


@pytest.mark.parametrize("write", [write_row, write_column, add_to_place, write_number, write_masked])
@pytest.mark.parametrize("fresh", [False, True])
def test_writing_at_a_number_of_the_samples_own(write, fresh):
    def fn(w: Tensor, x: Tensor, i: Tensor, k: Tensor) -> Tensor:
        y = torch.zeros(5, 4, 3, dtype=D) if fresh else (w * x).clone()
        write(y, w, i, k)
        return score(y * x) + (w * x).prod(0).sum()

    assert_close(per_sample_grad(fn)(W, X, I, K), loop(fn, (0,), (None, 0, 0, 0))(W, X, I, K)[0])


def test_a_number_out_of_range_raises():
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        per_sample_grad(lambda w, x, i: w[i].sum())(W, X, I + 4)


def test_an_outer_derivative_goes_through_a_number():
    w = W.clone().requires_grad_()
    grads = per_sample_grad(lambda w, i: w[i].sin().sum())(w, I)
    (found,) = torch.autograd.grad(grads.square().sum(), w)
    (expected,) = torch.autograd.grad(sum((w[i].cos() ** 2).sum() for i in I), w)
    torch.testing.assert_close(found, expected)


V = W[:, :, 0]
Y = X[:, 0, :, 0]

# What the loop runs in place of torch's operators, which eager torch cannot differentiate.
CONTROL: dict[str, tuple[Any, Any]] = {
    "cond on a per-sample value": (
        lambda w, x: torch.cond(x.sum() > 0, lambda a: (w @ a).square().sum(), lambda a: (w @ a).sin().sum(), (x,)),
        lambda w, x: (w @ x).square().sum() if x.sum() > 0 else (w @ x).sin().sum(),
    ),
    "cond with parameters as operands": (
        lambda w, x: torch.cond(x.sum() > 0, lambda a, b: (a @ b).square().sum(), lambda a, b: (a @ b).sin().sum(), (w, x)),
        lambda w, x: (w @ x).square().sum() if x.sum() > 0 else (w @ x).sin().sum(),
    ),
    "cond on a shared value": (
        lambda w, x: torch.cond(w.sum() > 0, lambda a: (w @ a).square().sum(), lambda a: (w @ a).sin().sum(), (x,)),
        lambda w, x: (w @ x).square().sum() if w.sum() > 0 else (w @ x).sin().sum(),
    ),
    "the branch not taken is not differentiated": (
        lambda w, x: torch.cond(x[0] > 0, lambda a: (w[0] * a).sum() * a[0].log(), lambda a: (w[0] * a).sum(), (x,)),
        lambda w, x: (w[0] * x).sum() * x[0].log() if x[0] > 0 else (w[0] * x).sum(),
    ),
}


@pytest.mark.parametrize("name", CONTROL)
def test_cond(name):
    fn, plain = CONTROL[name]
    grads = per_sample_grad(fn)(V, Y)
    assert grads.isfinite().all()
    assert_close(grads, loop(plain, (0,), (None, 0))(V, Y)[0])
    assert explain(fn)(V, Y).runs == (1 if "shared" in name else 2)


def grow(w: Tensor, x: Tensor) -> Tensor:
    def going(i: Tensor, h: Tensor) -> Tensor:
        return h.abs().sum() < 5

    def turn(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, h * 1.5 + w[0] * 0.1

    i, h = while_loop(going, turn, (torch.zeros((), dtype=torch.int64), x))
    return (h * w.sum()).square().sum() + i * w.prod()


def grow_plainly(w: Tensor, x: Tensor) -> Tensor:
    i, h = 0, x
    while h.abs().sum() < 5:
        i, h = i + 1, h * 1.5 + w[0] * 0.1
    return (h * w.sum()).square().sum() + i * w.prod()


def test_while_loops_turn_as_often_as_each_sample_wants():
    assert_close(per_sample_grad(grow)(V, Y), loop(grow_plainly, (0,), (None, 0))(V, Y)[0])
    turns = {_turns(V, x) for x in Y}
    assert explain(grow)(V, Y).runs == len(turns) > 1


def _turns(w: Tensor, x: Tensor) -> int:
    turns = 0
    while x.abs().sum() < 5:
        turns, x = turns + 1, x * 1.5 + w[0] * 0.1
    return turns


def test_a_while_loop_that_is_shared():
    def fn(w: Tensor, x: Tensor) -> Tensor:
        _, h = while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, (h * w[0]).sin()), (torch.zeros((), dtype=torch.int64), x))
        return h.sum()

    def plain(w: Tensor, x: Tensor) -> Tensor:
        for _ in range(3):
            x = (x * w[0]).sin()
        return x.sum()

    assert_close(per_sample_grad(fn)(V, Y), loop(plain, (0,), (None, 0))(V, Y)[0])


def test_other_operators_that_take_functions_are_refused():
    with pytest.raises(UnsupportedError, match="higher-order op"):
        per_sample_grad(lambda w, x: torch.ops.higher_order.map_impl(lambda a: (a.sin(),), (w * x,), ())[0].sum())(V, Y)


def test_cond_needs_no_option_and_leaves_it_alone():
    with options(split_batch=False):
        assert explain(CONTROL["cond on a per-sample value"][0])(V, Y).runs == 2
