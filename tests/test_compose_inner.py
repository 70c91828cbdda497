"""Functions with a `torch.func` of their own, whose wrappers outlive it, and gradients that all samples share, below other transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from per_sample import per_sample_grad, per_sample_grad_and_value, per_sample_grad_norm, reference

N, D = 4, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


W, X, ONES, SIGNS = real(3), real(N, 3), torch.ones(3, dtype=D), torch.tensor([1.0, -1.0, 1.0], dtype=D)
STACKED = torch.stack([W, 1.5 * W])


def pulled(w: Tensor, x: Tensor) -> Tensor:
    return vjp(lambda z: (z * w).sin(), x)[1](ONES)[0].square().sum()


def pulled_back_to_what_is_shared(w: Tensor, x: Tensor) -> Tensor:
    return vjp(lambda z: z * w, x)[1](ONES)[0].square().sum()


def pulled_to_the_parameter(w: Tensor, x: Tensor) -> Tensor:
    y, pull = vjp(lambda v: v * x, w)
    return pull(ONES)[0].square().sum() + (y**3).sum()


def divergence(w: Tensor, x: Tensor) -> Tensor:
    y, pull = vjp(lambda z: torch.tanh(z * w), x)
    return (pull(SIGNS)[0] * SIGNS).sum() + y.sum()


def pulled_twice(w: Tensor, x: Tensor) -> Tensor:
    y, pull = vjp(lambda z: (z * w).sin(), x)
    return (pull(y)[0] ** 2).sum() + (vmap(pull)(torch.eye(3, dtype=D))[0] ** 2).sum()


def by_rows(w: Tensor, x: Tensor) -> Tensor:
    return jacrev(lambda z: (z * w).sin(), chunk_size=1)(x).square().sum()


def shared(w: Tensor, x: Tensor) -> Tensor:
    return w.pow(3).sum() + 0 * x.sum()


def only_shared(w: Tensor, x: Tensor) -> Tensor:
    return w.pow(3).sum()


FUNCTIONS = [pulled, pulled_back_to_what_is_shared, pulled_to_the_parameter, divergence, pulled_twice, by_rows, shared, only_shared]
Transform = Callable[..., Any]
AROUND: dict[str, Callable[[Any, Transform], Any]] = {
    "nothing": lambda fn, t: t(fn)(W, X),
    "vmap over parameters": lambda fn, t: vmap(t(fn), (0, None))(STACKED, X),
    "vmap over data": lambda fn, t: vmap(t(fn), (None, 0))(W, torch.stack([X, 2 * X])),
    "grad": lambda fn, t: grad(lambda w: t(fn)(w, X).pow(2).sum())(W),
    "jvp": lambda fn, t: jvp(lambda w: t(fn)(w, X), (W,), (real(3) + 1,)),
    "itself": lambda fn, t: t(lambda w, s: (t(fn)(w * s, X) ** 2).sum())(W, real(2)),
}


def into_a_slice(w: Tensor, x: Tensor) -> Tensor:
    def inner(q: Tensor) -> Tensor:
        z = q * w
        z[1:3] = w[:2]
        return (z**3).sum()

    return (grad(inner)(x) ** 2).sum()


@pytest.mark.parametrize("n", [1, 2])
def test_a_write_into_a_slice_below_a_grad(n: int) -> None:
    """Of one sample, whose slices are contiguous, too."""
    torch.testing.assert_close(per_sample_grad(into_a_slice)(W, X[:n]), reference.per_sample_grad(into_a_slice)(W, X[:n]))
    chunked = per_sample_grad(into_a_slice, chunk_size=3)(W, X)
    torch.testing.assert_close(chunked, reference.per_sample_grad(into_a_slice)(W, X))


def norms(fn: Any) -> Any:
    return lambda w, x: reference.per_sample_grad(fn)(w, x).norm(dim=1)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_gradients_equal_the_reference(fn: Any, around: str) -> None:
    surrounded = AROUND[around]
    torch.testing.assert_close(surrounded(fn, per_sample_grad), surrounded(fn, reference.per_sample_grad))


@pytest.mark.parametrize("around", [name for name in AROUND if name.startswith("vmap")])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_norms_equal_those_of_the_reference(fn: Any, around: str) -> None:
    surrounded = AROUND[around]
    torch.testing.assert_close(surrounded(fn, per_sample_grad_norm), surrounded(fn, norms))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_values_and_what_is_pulled_back_come_out(fn: Any) -> None:
    def with_aux(w: Tensor, x: Tensor) -> Any:
        y, pull = vjp(lambda z: z * w, x)
        return fn(w, x), (y, pull(ONES)[0])

    for package_transform in (per_sample_grad_and_value, reference.per_sample_grad_and_value):
        _, (values, (y, pulled_back)) = vmap(package_transform(with_aux, has_aux=True), (0, None))(STACKED, X)
        torch.testing.assert_close(values, torch.stack([torch.stack([fn(w, x) for x in X]) for w in STACKED]))
        torch.testing.assert_close(y, STACKED[:, None] * X)
        torch.testing.assert_close(pulled_back, STACKED[:, None].expand(2, N, 3))
