"""Modes and context managers of torch's around the transform and inside the function."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from per_sample import PerSampleError, per_sample_grad
from tree_oracle import assert_close, loop

if TYPE_CHECKING:
    from collections.abc import Iterator

D = torch.float64
N = 4
W = torch.randn(2, 3, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 3, dtype=D, generator=torch.Generator().manual_seed(2))


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x[:, None]).tanh().square().sum()


class Logging(TorchDispatchMode):
    """Lists the ops it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.shapes += [tuple(a.shape) for a in args if isinstance(a, Tensor)]
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Counts the torch functions it sees."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def anomaly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            yield


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "dispatch mode": Logging,
    "function mode": Calls,
    "flop counter": lambda: FlopCounterMode(display=False),
    "device": lambda: torch.device("cpu"),
    "enable grad": torch.enable_grad,
    "saved tensors hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t),
    "save on cpu": torch.autograd.graph.save_on_cpu,
    "anomaly": anomaly,
    "one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "deterministic": deterministic,
    "default dtype": default_dtype,
    "record function": lambda: torch.profiler.record_function("x"),
    "two modes": lambda: _both(Logging(), Calls()),
}


@contextmanager
def _both(first: Any, second: Any) -> Iterator[None]:
    with first, second:
        yield


def busy_loss(w: Tensor, x: Tensor) -> Tensor:
    rows = F.embedding(torch.tensor([0, 1, 1]), w) * torch.ones((), dtype=D)
    spread = torch.zeros(5, dtype=D).index_add(0, torch.tensor([1, 1, 4]), (rows * x).sum(1))
    return loss(w, x[torch.tensor([0, 0, 2])]) + spread.sin().sum()


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings(name: str, where: str) -> None:
    make = SURROUNDINGS[name]
    expected = loop(busy_loss, (0,), (None, 0))(W, X)[0]

    def fn(w: Tensor, x: Tensor) -> Tensor:
        with nullcontext() if where == "around" else make():
            return busy_loss(w, x)

    with make() if where == "around" else nullcontext():
        actual = per_sample_grad(fn)(W, X)
    assert_close(actual, expected)


def test_modes_inside_see_samples_and_modes_around_see_batches() -> None:
    inside, around = Logging(), Logging()

    def fn(w: Tensor, x: Tensor) -> Tensor:
        with inside:
            return loss(w, x)

    with around:
        per_sample_grad(fn)(W, X)
    assert (3, 1) in inside.shapes
    assert all(s[:1] != (N,) for s in inside.shapes)
    assert any(s[:1] == (N,) for s in around.shapes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loss_computed_without_grad_has_gradients_of_zero_as_in_torch_func(mode: Any) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        with mode():
            return loss(w, x)

    assert not per_sample_grad(fn)(W, X).any()


def test_a_mode_that_fn_leaves_open_does_not_keep_the_transform_open() -> None:
    mode = Logging()

    def fn(w: Tensor, x: Tensor) -> Tensor:
        mode.__enter__()
        return loss(w, x)

    try:
        per_sample_grad(fn)(W, X)
        left = _get_current_dispatch_mode_stack()
    finally:
        while _get_current_dispatch_mode_stack():
            torch.utils._python_dispatch._pop_mode()
    assert left in ([], [mode])


def test_mutation_on_saved_tensors_is_right_or_refused() -> None:
    """This mode of torch's tells tensors apart by their data pointers, which per-sample tensors do not have."""
    try:
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            actual = per_sample_grad(loss)(W, X)
    except PerSampleError:
        return
    assert_close(actual, loop(loss, (0,), (None, 0))(W, X)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_frozen_teacher_inside(mode: Any, recorded: bool) -> None:
    teacher = torch.nn.Linear(3, 2).to(D)

    def fn(w: Tensor, x: Tensor) -> Tensor:
        with mode():
            target = teacher(x.view(1, 3)).t().squeeze() + w.t()[0]
        return (w @ x - target.clone()).square().sum()

    actual = per_sample_grad(fn)(W.clone().requires_grad_(recorded), X)
    assert_close(actual.detach(), loop(fn, (0,), (None, 0))(W, X)[0])
