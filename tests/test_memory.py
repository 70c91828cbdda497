"""The pool of freed result memory: reused when nobody can see it any more, never before."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from per_sample import per_sample_grad
from per_sample._kernels import memory
from per_sample._kernels.memory import Pool, empty

LIKE = torch.zeros(1)
SHAPE = (3, 1024, 1024)


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    pool = Pool(limit=2 * 12 * 2**20)
    monkeypatch.setattr(memory, "POOL", pool)
    return pool


def test_freed_memory_is_used_again(pool):
    first = empty(SHAPE, LIKE)
    address = first.data_ptr()
    assert pool.held == 0
    del first
    assert pool.held == 12 * 2**20
    again = empty(SHAPE, LIKE)
    assert again.data_ptr() == address
    assert pool.held == 0


@pytest.mark.parametrize(
    "hold", [lambda t: t[1], lambda t: t.view(-1)[5:], lambda t: t.numpy(), lambda t: t.untyped_storage(), lambda t: t.T]
)
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_memory_that_anybody_still_sees_is_not_used_again(pool, hold):
    first = empty(SHAPE, LIKE).fill_(1)
    kept = hold(first)
    del first
    gc.collect()
    second = empty(SHAPE, LIKE).fill_(2)
    assert pool.held == 0
    assert second.min() == 2
    seen = torch.tensor(kept, dtype=torch.uint8) if isinstance(kept, torch.UntypedStorage) else torch.as_tensor(kept)
    assert (seen.view(torch.float32) if seen.dtype == torch.uint8 else seen).max() == 1


def test_the_pool_is_bounded(pool):
    tensors = [empty(SHAPE, LIKE) for _ in range(3)]
    tensors.clear()
    assert pool.held == 2 * 12 * 2**20
    del tensors


def test_what_nobody_asks_for_is_given_back(pool):
    empty(SHAPE, LIKE)
    for _ in range(300):
        empty((2, 1024, 1024), LIKE)
    assert pool.held == 8 * 2**20


def test_small_other_and_oversized_results_do_not_go_through_the_pool(pool):
    for shape, like in (((3, 5), LIKE), (SHAPE, torch.zeros(1, device="meta")), ((9, 1024, 1024), LIKE)):
        out = empty(shape, like)
        assert out.shape == shape
        assert out.device == like.device
        del out
    assert pool.held == 0


def test_gradients_of_two_steps_do_not_share_memory():
    w, x = torch.randn(600, 700), torch.randn(5, 700)

    def loss(w, x):
        return (w @ x).square().sum()

    first = per_sample_grad(loss)(w, x)
    copy = first.clone()
    second = per_sample_grad(loss)(w, 2 * x)
    torch.testing.assert_close(first, copy)
    torch.testing.assert_close(second, 4 * first, rtol=1e-4, atol=1e-3)


def test_embeddings_start_from_zeros_in_used_memory():
    weight, index = torch.randn(5000, 64), torch.tensor([[1, 2], [3, 3], [4999, 0], [7, 7]])

    def loss(w, i):
        return torch.nn.functional.embedding(i, w).square().sum()

    expected = per_sample_grad(loss)(weight, index).clone()
    torch.testing.assert_close(per_sample_grad(loss)(weight, index.flip(1)), expected)


def test_many_threads_take_and_free(pool):
    failures = []

    def work(value):
        for _ in range(20):
            t = empty((2, 1024, 1024), LIKE).fill_(value)
            if t.min() != value or t.max() != value:
                failures.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert pool.held <= pool.limit
