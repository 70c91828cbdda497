"""Exceptions and settings: what a transform leaves behind when the function raises, or changes torch's global state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from per_sample import RandomnessError, UnsupportedError, per_sample_grad
from tree_oracle import assert_close, loop

if TYPE_CHECKING:
    from collections.abc import Iterator

D = torch.float64
N = 4
W = torch.randn(2, 3, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 3, dtype=D, generator=torch.Generator().manual_seed(2))


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x[:, None]).tanh().square().sum()


def check(fn: Any) -> None:
    assert_close(per_sample_grad(fn)(W, X), loop(fn, (0,), (None, 0))(W, X)[0])


def state() -> list[Any]:
    """All the global state of torch that a transform touches on its way."""
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        _get_current_dispatch_mode_stack(),
        _get_current_function_mode_stack(),
        torch._C._functorch.peek_interpreter_stack(),
        str(torch._C._dispatch_tls_local_include_set()),
        str(torch._C._dispatch_tls_local_exclude_set()),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_anomaly_enabled(),
    ]


@pytest.fixture(autouse=True)
def _global_state_is_left_as_it_was() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


class Own(Exception):
    """An exception that torch knows nothing of."""


EXCEPTIONS = [
    Own("own"),
    KeyboardInterrupt(),
    SystemExit(2),
    GeneratorExit(),
    RuntimeError("plain"),
    MemoryError(),
    RecursionError("deep"),
    NotImplementedError("none"),
    AssertionError(),
    torch.OutOfMemoryError("full"),
]


class Raising(torch.autograd.Function):
    """Raises in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise Own("backward")


def _raise_in_forward(x: Tensor, error: BaseException) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
        raise error


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda e: type(e).__name__)
def test_exceptions_come_out_unchanged(error: BaseException, chunk_size: int | None, recorded: bool) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return _raise_in_forward(loss(w, x), error)

    with pytest.raises(type(error)) as caught:
        per_sample_grad(fn, chunk_size=chunk_size)(W.clone().requires_grad_(recorded), X)
    assert caught.value is error
    check(loss)


def _raising_hook(x: Tensor) -> Tensor:
    def hook(g: Tensor) -> None:
        raise Own("hook")

    x.register_hook(hook)
    return x


@pytest.mark.parametrize("raising", [Raising.apply, _raising_hook])
def test_exceptions_in_the_backward_pass_come_out(raising: Any) -> None:
    with pytest.raises(Own):
        per_sample_grad(lambda w, x: raising(w @ x).sum())(W, X)
    check(loss)


def test_recursion_without_end() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return fn(w, x * 1)

    with pytest.raises(RecursionError):
        per_sample_grad(fn)(W, X)
    check(loss)


def test_a_refusal_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(RandomnessError):
        per_sample_grad(lambda w, x: loss(w, x + torch.randn(3)))(W, X)
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_that_fn_changes_for_itself_stay_where_it_put_them() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        torch.set_default_dtype(D)
        return loss(w, x) * torch.ones(())

    try:
        assert_close(per_sample_grad(fn)(W, X), loop(loss, (0,), (None, 0))(W, X)[0])
        assert torch.get_default_dtype() == D
    finally:
        torch.set_default_dtype(torch.float32)


def test_grad_mode_that_fn_leaves_off_ends_with_it() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        out = loss(w, x)
        torch.set_grad_enabled(False)
        return out

    assert_close(per_sample_grad(fn)(W, X), loop(loss, (0,), (None, 0))(W, X)[0])


@pytest.mark.parametrize("switch_off", [lambda w: w.requires_grad_(False), lambda w: w.detach_()])
@pytest.mark.parametrize("used_before", [False, True])
def test_switching_off_the_gradient_of_an_argument_is_refused(switch_off: Any, used_before: bool) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        before = loss(w, x) if used_before else 0.0
        switch_off(w)
        return before + loss(w, x)

    with pytest.raises(UnsupportedError, match="gradient"):
        per_sample_grad(fn)(W, X)
