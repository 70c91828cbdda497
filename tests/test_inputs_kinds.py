"""Arguments of every kind: subclasses give what plain tensors give; what cannot be right is refused by its argument's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from per_sample import ArgumentError, PerSampleError, per_sample_grad, per_sample_grad_and_value
from tree_oracle import assert_close, loop

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support",
    "ignore:Sparse invariant checks",
    "ignore:The PyTorch API of nested tensors",
    "ignore:The PyTorch API of MaskedTensors",
    "ignore:torch.quantize_per_tensor",
)

D = torch.float64
N = 4


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).tanh().square().sum()


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


W, X = real(2, 3), real(N, 3)


class Tagged(Tensor):
    """A subclass with nothing of its own but a tag."""

    tag: str


class Watched(Tensor):
    """A subclass that sees torch functions, written for one sample."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class TaggedParameter(nn.Parameter):
    """A subclass of a parameter."""


class Wrapped(Tensor):
    """A wrapper with another tensor inside."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        out = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        out.inner = inner
        return out

    def __init__(self, inner: Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapped, func(*args, **kwargs))


@pytest.mark.parametrize("where", ["parameter", "samples", "both"])
@pytest.mark.parametrize("kind", [Tagged, Watched, nn.Parameter, nn.Buffer, TaggedParameter])
def test_subclasses(kind: Any, where: str) -> None:
    def make(x: Tensor) -> Tensor:
        return x.as_subclass(kind) if kind in (Tagged, Watched) else kind(x)

    w = make(W.clone()) if where != "samples" else W
    x = make(X.clone()) if where != "parameter" else X
    grads, values = per_sample_grad_and_value(loss)(w, x)
    assert (type(grads), type(values)) == (Tensor, Tensor)
    assert_close(grads.detach(), loop(loss, (0,), (None, 0))(W, X)[0])


def test_wrapper_subclasses() -> None:
    expected = loop(loss, (0,), (None, 0))(W, X)[0]
    grads = per_sample_grad(loss)(Wrapped(W), Wrapped(X))
    assert isinstance(grads, Wrapped)
    assert_close(grads.inner, expected)
    for w, x in ((W, Wrapped(X)), (Wrapped(W), X)):
        assert_close(per_sample_grad(loss)(w, x).inner, expected)


QUANTIZED = {"scale": 0.1, "zero_point": 0, "dtype": torch.qint8}
STRANGE = {
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor([r[: 1 + i % 3] for i, r in enumerate(x)], layout=torch.jagged),
    "masked": lambda x: torch.masked.masked_tensor(x, x > 0),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), **QUANTIZED),
    "uninitialized": lambda x: nn.UninitializedParameter(),
}


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", STRANGE)
def test_strange_tensors_are_right_or_refused_by_name(kind: str, where: int) -> None:
    args = [W, X]
    args[where] = STRANGE[kind](args[where])
    try:
        actual = per_sample_grad(loss)(*args)
    except PerSampleError as error:
        message = str(error)
    else:
        assert kind.startswith("sparse")
        assert_close(actual, loop(loss, (0,), (None, 0))(W, X)[0])
        return
    assert f"rgument {where}" in message


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("how", ["closed over", "argument"])
def test_products_with_a_shared_sparse_matrix_are_right_or_refused(layout: str, how: str) -> None:
    dense = real(5, 5).relu()
    sparse = getattr(dense, layout)()

    def fn(w: Tensor, x: Tensor, s: Tensor) -> Tensor:
        return (s @ (x @ w)).sin().sum()

    w, x = real(3, 2), real(N, 5, 3)
    try:
        if how == "argument":
            actual = per_sample_grad(fn, 0, (None, 0, None))(w, x, sparse)
        else:
            actual = per_sample_grad(lambda w, x: fn(w, x, sparse))(w, x)
    except PerSampleError:
        return
    assert_close(actual, loop(lambda w, x: fn(w, x, dense), (0,), (None, 0))(w, x)[0])


@pytest.mark.parametrize("labels", [np.arange(N), np.ones((N, 3))])
def test_arrays_are_not_shared_by_default(labels: Any) -> None:
    def fn(w: Tensor, x: Tensor, y: Any) -> Tensor:
        return loss(w, x) * float(y.sum())

    with pytest.raises(ArgumentError, match=r"rgument 2 .*(ndarray|array)"):
        per_sample_grad(fn)(W, X, labels)
    assert_close(per_sample_grad(fn, 0, (None, 0, None))(W, X, labels), loop(loss, (0,), (None, 0))(W, X)[0] * labels.sum())


NOT_TENSORS = {
    "array": lambda: W.numpy(),
    "number": lambda: 1.0,
    "numpy number": lambda: np.float64(1.0),
    "list of numbers": lambda: W.tolist(),
    "bool tensor": lambda: W > 0,
    "module": lambda: nn.Linear(3, 2),
    "parameter dict": lambda: nn.ParameterDict({"w": W}),
    "generator": lambda: nn.Linear(3, 2).parameters(),
    "set": lambda: {W},
    "string": lambda: "w",
    "quantized": lambda: torch.quantize_per_tensor(W.float(), **QUANTIZED),
}


@pytest.mark.parametrize("name", NOT_TENSORS)
def test_what_cannot_be_differentiated_is_refused_by_name(name: str) -> None:
    with pytest.raises(PerSampleError, match="Argument 0"):
        per_sample_grad(lambda w, x: x.sum())(NOT_TENSORS[name](), X)
    with pytest.raises(PerSampleError, match="Argument 0"):
        per_sample_grad(lambda w, x: x.sum())({"good": W, "bad": [NOT_TENSORS[name]()]}, X)


@pytest.mark.parametrize("samples", [X.numpy(), X.tolist(), 1.0, None, "x"], ids=["array", "list", "number", "None", "string"])
def test_samples_that_are_no_tensors(samples: Any) -> None:
    with pytest.raises(ArgumentError, match=r"rgument 1|No argument is batched"):
        per_sample_grad(lambda w, x: w.sum())(W, samples)


def test_a_state_dict_and_live_parameters() -> None:
    net = nn.Linear(3, 2).double()
    net.weight.requires_grad_(False)

    def fn(p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(net, p, (x,)).square().sum()

    expected = loop(fn, (0,), (None, 0))({k: v.detach() for k, v in net.named_parameters()}, X)[0]
    assert_close({k: g.detach() for k, g in per_sample_grad(fn)(dict(net.named_parameters()), X).items()}, expected)
    assert_close(dict(per_sample_grad(fn)(net.state_dict(), X)), expected)
    assert net.weight.grad is None
    assert not net.weight.requires_grad
