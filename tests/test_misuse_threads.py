"""Threads, tasks and autograd inside and around the transform."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from per_sample import PerSampleError, per_sample_grad, reference
from tree_oracle import assert_close, loop

D = torch.float64
N = 4
W = torch.randn(2, 3, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 3, dtype=D, generator=torch.Generator().manual_seed(2))


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x[:, None]).tanh().square().sum()


def check(fn: Any) -> None:
    assert_close(per_sample_grad(fn)(W, X), loop(fn, (0,), (None, 0))(W, X)[0])


def test_threads_at_once() -> None:
    def one(k: int) -> Tensor:
        w = (W * k).requires_grad_(k % 2 == 0)
        grads = per_sample_grad(loss, chunk_size=3 if k % 3 == 0 else None)(w, X)
        return torch.autograd.grad(grads.square().sum(), w)[0] if k % 2 == 0 else grads

    def expected(k: int) -> Tensor:
        w = (W * k).requires_grad_(k % 2 == 0)
        grads = reference.per_sample_grad(loss)(w, X)
        return torch.autograd.grad(grads.square().sum(), w)[0] if k % 2 == 0 else grads

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(1, 40)))
    torch.testing.assert_close(found, [expected(k) for k in range(1, 40)])


def _in_thread(work: Any) -> Any:
    out: list[Any] = []
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    thread.join()
    return out[0]


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: _in_thread(lambda: loss(w, x)),
        lambda w, x: loss(w, x) * _in_thread(lambda: torch.ones(3, dtype=D) * x).sum(),
        lambda w, x: loss(w, x) * _in_thread(lambda: per_sample_grad(loss)(W, X).sum()),
        lambda w, x: asyncio.run(asyncio.wait_for(_coroutine(w, x), 20)),
        lambda w, x: sum(loss(w, x * i) for i in range(3)),
    ],
    ids=["thread", "factory in a thread", "transform in a thread", "coroutine", "generator"],
)
def test_concurrency_inside(fn: Any) -> None:
    check(fn)


async def _coroutine(w: Tensor, x: Tensor) -> Tensor:
    await asyncio.sleep(0)
    return loss(w, x)


def test_tasks_that_take_turns() -> None:
    async def one(k: int) -> Tensor:
        await asyncio.sleep(0)
        return per_sample_grad(loss)(W * k, X)

    async def many() -> list[Tensor]:
        return await asyncio.gather(*[one(k) for k in range(5)])

    for k, grads in enumerate(asyncio.run(many())):
        assert_close(grads, loop(loss, (0,), (None, 0))(W * k, X)[0])


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: (lambda value: (value.backward(), value)[1])(loss(w, x)),
        lambda w, x: (lambda value: (torch.autograd.grad(value, w), value)[1])(loss(w, x)),
    ],
)
def test_a_loss_that_fn_has_differentiated_already(fn: Any) -> None:
    with pytest.raises((PerSampleError, RuntimeError), match=r"second time|differentiated"):
        per_sample_grad(fn)(W, X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: (loss(w, x).backward(), loss(w, x) * w.grad.sum())[1],
        lambda w, x: (torch.autograd.grad(loss(w, x), w, create_graph=True)[0] ** 2).sum(),
        lambda w, x: (torch.autograd.grad(loss(w, x.requires_grad_()), x, create_graph=True)[0] ** 2).sum(),
        lambda w, x: (lambda h: (h.retain_grad(), h.tanh().square().sum())[1])(w @ x),
        lambda w, x: (lambda h: (h.detach_(), h.sum() * loss(w, x))[1])(w @ x),
        lambda w, x: loss(w, x) * (1.0 if w.grad is None else 2.0),
    ],
)
def test_autograd_inside(fn: Any) -> None:
    check(fn)
    assert W.grad is None
