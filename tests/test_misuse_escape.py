"""Per-sample tensors of another transform, one that has ended or runs in another thread: refused everywhere."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from per_sample import EscapedError, PerSampleError, per_sample_grad

D = torch.float64
N = 4
W = torch.randn(2, 3, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 3, dtype=D, generator=torch.Generator().manual_seed(2))


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).tanh().square().sum()


DEAD = {
    "second operand": lambda x, dead: x + dead,
    "first operand": lambda x, dead: dead + x,
    "alone": lambda x, dead: dead.sin(),
    "keyword": lambda x, dead: torch.add(x, other=dead),
    "list": lambda x, dead: torch.stack([x, dead]).sum(0),
    "where": lambda x, dead: torch.where(x > 0, x, dead),
    "condition": lambda x, dead: torch.where(dead > 0, x, 2 * x),
    "index": lambda x, dead: x[dead.argsort()],
    "written": lambda x, dead: x.clone().copy_(dead),
    "set": lambda x, dead: x.clone().index_put_((torch.tensor([0]),), dead[0]),
    "target": lambda x, dead: dead.add_(x),
    "lerp": lambda x, dead: torch.lerp(x, dead, 0.5),
    "product": lambda x, dead: torch.outer(x, dead).sum(0),
    "attention": lambda x, dead: F.scaled_dot_product_attention(x[None], dead[None], dead[None])[0],
}


def stolen(batch: Tensor) -> Tensor:
    """A per-sample tensor of a transform that has ended."""
    kept: list[Tensor] = []
    per_sample_grad(lambda w, x: (kept.append(x), loss(w, x))[1])(W, batch)
    return kept[0]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", DEAD)
def test_a_tensor_of_another_transform_that_has_ended(name: str, recorded: bool) -> None:
    dead = stolen(2 * X)
    with pytest.raises(EscapedError):
        per_sample_grad(lambda w, x: loss(w, DEAD[name](x, dead)))(W.clone().requires_grad_(recorded), X)


@pytest.mark.parametrize("name", DEAD)
def test_a_tensor_of_a_transform_that_runs_in_another_thread(name: str) -> None:
    met, leave = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def held(w: Tensor, x: Tensor) -> Tensor:
        found.append(x)
        met.set()
        leave.wait(20)
        return loss(w, x)

    thread = threading.Thread(target=lambda: per_sample_grad(held)(W, 2 * X))
    thread.start()
    try:
        assert met.wait(20)
        with pytest.raises(PerSampleError):
            per_sample_grad(lambda w, x: loss(w, DEAD[name](x, found[0])))(W, X)
    finally:
        leave.set()
        thread.join()


@pytest.mark.parametrize("how", ["samples", "parameter", "shared", "keyword", "aux", "loss"])
def test_a_tensor_that_escaped_as_an_argument_or_result(how: str) -> None:
    dead = stolen(2 * X)

    def fn(w: Tensor, x: Tensor, c: Any = None) -> Tensor:
        return (w * x).sum() if c is None else (w * x * c).sum()

    calls: dict[str, Any] = {
        "samples": lambda: per_sample_grad(fn)(W, dead),
        "parameter": lambda: per_sample_grad(fn)(dead, X),
        "shared": lambda: per_sample_grad(fn, 0, (None, 0, None))(W, X, dead),
        "keyword": lambda: per_sample_grad(fn)(W, X, c=dead),
        "aux": lambda: per_sample_grad(lambda w, x: (fn(w, x), dead), has_aux=True)(W, X)[1],
        "loss": lambda: per_sample_grad(lambda w, x: dead[0])(W, X),
    }
    with pytest.raises(EscapedError):
        calls[how]()


def test_what_may_be_done_with_a_tensor_that_escaped() -> None:
    dead = stolen(X)
    assert "Batched" in repr(dead)
    assert "Batched" in f"{dead}"
    assert dead.shape == (3,)
    for use in (torch.sum, lambda t: t.sum().item(), lambda t: torch.cat([t, X[0]]), lambda t: t.requires_grad_().sum().backward()):
        with pytest.raises(EscapedError, match="has_aux"):
            use(dead)
    with pytest.raises(PerSampleError):
        dead.tolist()
