"""Misuse of options, results and per-sample tensors: right, or refused by a typed error; never a wrong number, never a crash."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from per_sample import (
    ArgumentError,
    BatchSizeError,
    DataDependentError,
    NotScalarError,
    PerSampleError,
    UnsupportedError,
    per_sample_grad,
    per_sample_grad_and_value,
)
from tree_oracle import assert_close, loop

D = torch.float64
N = 4
W = torch.randn(2, 3, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 3, dtype=D, generator=torch.Generator().manual_seed(2))


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).tanh().square().sum()


def check(fn: Any) -> None:
    assert_close(per_sample_grad(fn)(W, X), loop(fn, (0,), (None, 0))(W, X)[0])


def bystander(use: Any) -> Any:
    """A loss that does something with its sample on the side."""

    def fn(w: Tensor, x: Tensor) -> Tensor:
        use(x)
        return loss(w, x)

    return fn


@pytest.mark.parametrize(
    "result",
    [
        lambda w, x: None,
        lambda w, x: [loss(w, x)],
        lambda w, x: (loss(w, x),),
        lambda w, x: {"loss": loss(w, x)},
        lambda w, x: 1,
        lambda w, x: "loss",
        lambda w, x: np.float64(1.0),
        lambda w, x: NotImplemented,
        lambda w, x: ValueError("returned"),
        lambda w, x: (loss(w, x) for _ in range(1)),
        lambda w, x: torch.tensor(1),
        lambda w, x: x[:0],
        lambda w, x: loss(w, x)[None],
        lambda w, x: torch.nn.Identity(),
    ],
)
def test_results_that_are_no_scalar_loss(result: Any) -> None:
    with pytest.raises(NotScalarError):
        per_sample_grad(result)(W, X)


def test_a_sparse_loss() -> None:
    with pytest.raises(UnsupportedError, match="dense form"):
        per_sample_grad(lambda w, x: loss(w, x).to_sparse())(W, X)


def test_generator_and_coroutine_functions() -> None:
    def generator(w: Tensor, x: Tensor) -> Any:
        yield loss(w, x)

    async def coroutine(w: Tensor, x: Tensor) -> Tensor:
        return loss(w, x)

    with pytest.raises(NotScalarError, match="generator"):
        per_sample_grad(generator)(W, X)
    with pytest.warns(RuntimeWarning, match="never awaited"):  # noqa: PT031
        with pytest.raises(NotScalarError, match="coroutine"):
            per_sample_grad(coroutine)(W, X)
        gc.collect()


@pytest.mark.parametrize("fn", [lambda w, x: x, lambda w, x: w, lambda w, x: w.clone(), lambda w, x: x * 1])
def test_a_loss_that_is_an_argument(fn: Any) -> None:
    w, x = W[0, 0].clone(), X[:, 0]
    grads, values = per_sample_grad_and_value(fn)(w, x)
    values.clone().mul_(0)
    q = w.clone().requires_grad_()
    expected = [torch.autograd.grad(fn(q, s) + 0 * q, q)[0] for s in x]
    torch.testing.assert_close(grads, torch.stack(expected))
    torch.testing.assert_close(values, torch.stack([fn(w, s) for s in x]))


@pytest.mark.parametrize("constant", [lambda: torch.tensor(2.0, dtype=D), lambda: W.sum()])
def test_a_loss_that_is_a_constant(constant: Any) -> None:
    grads, values = per_sample_grad_and_value(lambda w, x: constant())(W, X)
    torch.testing.assert_close(grads, torch.zeros(N, 2, 3, dtype=D))
    torch.testing.assert_close(values, constant().expand(N))


def test_aux_of_every_kind() -> None:
    def fn(w: Tensor, x: Tensor) -> Any:
        return loss(w, x), {"none": None, "text": "s", "number": 1, "argument": x, "shared": w, "set": {1, 2}, "made": torch.ones(2)}

    for chunk_size in (None, 3):
        _, aux = per_sample_grad(fn, has_aux=True, chunk_size=chunk_size)(W, X)
        assert (aux["none"], aux["text"], aux["number"], aux["set"]) == (None, "s", 1, {1, 2})
        torch.testing.assert_close((aux["argument"], aux["shared"], aux["made"]), (X, W.expand(N, 2, 3), torch.ones(N, 2)))


def test_aux_whose_structure_differs_between_chunks() -> None:
    calls: list[int] = []

    def fn(w: Tensor, x: Tensor) -> Any:
        calls.append(1)
        return loss(w, x), [x] * len(calls)

    with pytest.raises(ArgumentError, match="chunk"):
        per_sample_grad(fn, has_aux=True, chunk_size=2)(W, X)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"in_dims": (None, 0, 0)}, "in_dims"),
        ({"in_dims": (0,)}, "in_dims"),
        ({"in_dims": ()}, "in_dims"),
        ({"in_dims": {"w": None}}, "in_dims"),
        ({"in_dims": (None, [0])}, "in_dims"),
        ({"in_dims": (None, True)}, "in_dims"),
        ({"in_dims": True}, "in_dims"),
        ({"in_dims": 0.0}, "in_dims"),
        ({"in_dims": (None, torch.tensor(0))}, "in_dims"),
        ({"in_dims": (None, -3)}, "no axis -3"),
        ({"argnums": None}, "argnums"),
        ({"argnums": [0]}, "argnums"),
        ({"argnums": 0.0}, "argnums"),
        ({"argnums": (0, 0)}, "argnums"),
        ({"argnums": (0, "x")}, "argnums"),
        ({"argnums": torch.tensor(0)}, "argnums"),
        ({"chunk_size": -1}, "chunk_size"),
        ({"chunk_size": True}, "chunk_size"),
        ({"chunk_size": "2"}, "chunk_size"),
        ({"chunk_size": torch.tensor(2)}, "chunk_size"),
        ({"randomness": "Same"}, "randomness"),
        ({"randomness": None}, "randomness"),
        ({"randomness": True}, "randomness"),
        ({"has_aux": 1}, "pair"),
    ],
)
def test_options(options: Any, name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        per_sample_grad(loss, **options)(W, X)


@pytest.mark.parametrize("options", [{"in_dims": [None, 0]}, {"chunk_size": 10**18}, {"argnums": -2}, {"has_aux": None}, {"chunk_size": N}])
def test_unusual_options_that_are_right(options: Any) -> None:
    assert_close(per_sample_grad(loss, **options)(W, X), loop(loss, (0,), (None, 0))(W, X)[0])


def test_calls_without_the_arguments() -> None:
    with pytest.raises(ArgumentError, match="0 positional"):
        per_sample_grad(loss)()
    with pytest.raises(ArgumentError, match="0 positional"):
        per_sample_grad(loss)(w=W, x=X)
    with pytest.raises(BatchSizeError, match="No argument is batched"):
        per_sample_grad(loss)(W, x=X)
    with pytest.raises(TypeError, match="positional argument"):
        per_sample_grad(lambda w: w.sum())(W, X)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: f"{x} {x!r} {x!s}",
        lambda x: f"{x}, {x:}",
        print,
        lambda x: len(x),
        lambda x: x in [x],
        lambda x: {x: 1, x[0]: 2},
        lambda x: (x.shape, x.dtype, x.device, x.numel(), x.nbytes, x.stride(), x.is_contiguous(), x.type(), x.ndim),
        lambda x: x is None or x == None,  # noqa: E711
        lambda x: setattr(x, "tag", 1),
        lambda x: isinstance(x, torch.DoubleTensor),
        lambda x: torch.allclose(x, x),
        lambda x: torch.testing.assert_close(x, x),
        lambda x: x.to("meta"),
    ],
)
def test_python_on_a_per_sample_tensor(use: Any, capsys: pytest.CaptureFixture[str]) -> None:
    check(bystander(use))
    capsys.readouterr()


@pytest.mark.parametrize(
    "use",
    [
        lambda x: torch.stack(list(x)),
        lambda x: torch.stack([*reversed(x)]),
        lambda x: torch.stack(x.unbind()),
        lambda x: sum(x).expand(3),
        copy.copy,
        copy.deepcopy,
        lambda x: copy.deepcopy({"a": [x, {"b": x.detach()}]})["a"][0],
        torch.as_tensor,
        torch.asarray,
        torch.autograd.Variable,
        lambda x: torch.nn.Parameter(x.detach()) * 2,
        lambda x: torch.Tensor(x.float()),
        lambda x: x.as_subclass(Tensor) * 2,
        lambda x: torch.utils.data.default_collate([x, x])[1],
        lambda x: x[x.argmax()].expand(3),
        lambda x: torch.full_like(x, 2.0),
        lambda x: x.to(x),
        lambda x: x.cpu(),
        lambda x: x.data,
    ],
)
def test_values_of_python_on_a_per_sample_tensor(use: Any) -> None:
    check(lambda w, x: (w @ (x + use(x).to(D))).sin().sum())


@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
@pytest.mark.parametrize(
    "use",
    [
        lambda x: f"{x.sum():.2f}",
        lambda x: f"{x.sum().long():d}",
        lambda x: "%f" % x.sum(),  # noqa: UP031
        lambda x: complex(x[0]),
        lambda x: [1, 2, 3][x.argmax()],
        lambda x: x[: x[0].long()],
        lambda x: range(x[0].long()),
        sorted,
        max,
        lambda x: any(x > 0),
        lambda x: torch.full((2,), x[0]),
        lambda x: torch.arange(x[0]),
        lambda x: torch.bincount(x.abs().mul(9).long()),
        lambda x: torch.is_nonzero(x[0]),
        lambda x: np.asarray(x.detach()),
        lambda x: np.stack([x.detach(), x.detach()]),
        lambda x: x.numpy(force=True),
        lambda x: torch.tensor([x[0], x[1]]),
        lambda x: torch.tensor([[x[0], 1.0], [2.0, 3.0]]),
        lambda x: x.new_tensor([x[0], 1.0]),
        lambda x: torch.as_tensor([x[0], x[1]]),
        lambda x: pickle.dumps(x),
        lambda x: torch.save(x, io.BytesIO()),
        lambda x: torch.save({"state": [x]}, io.BytesIO()),
        lambda x: x.clone().apply_(lambda v: v + 1),
        lambda x: torch.from_dlpack(x.detach()).sum(),
        lambda x: torch.utils.dlpack.to_dlpack(x.detach()),
        lambda x: x.__dlpack__(),
        lambda x: x.data_ptr(),
        lambda x: x.untyped_storage().data_ptr(),
        lambda x: x.untyped_storage().tolist(),
    ],
)
def test_python_values_are_refused(use: Any) -> None:
    with pytest.raises((DataDependentError, PerSampleError), match=r"per-sample|differs between samples"):
        per_sample_grad(bystander(use))(W, X)
