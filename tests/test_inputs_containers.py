"""Containers that optree does not know: each sample gets its part of them, or they are refused; none is shared in silence."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from per_sample import ArgumentError, per_sample_grad
from tree_oracle import assert_close, loop

N = 4


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


W, X = real(2, 3), real(N, 3)


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).tanh().square().sum()


@dataclasses.dataclass
class Unregistered:
    x: Tensor


class Tokens(UserDict[str, Any]):
    """As Hugging Face's `BatchEncoding`: no pytree, its entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class Output(OrderedDict[str, Any]):
    """As Hugging Face's `ModelOutput`: a pytree of torch's that optree does not know."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


register_pytree_node(Output, lambda o: (list(o.values()), list(o)), lambda values, names: Output(zip(names, values, strict=True)))


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("kind", [Tokens, Output, lambda d: [Tokens(inner=Output(d))], lambda d: (Output(inner=Tokens(d)), None)])
def test_dicts_that_optree_does_not_open_give_each_sample_its_part(kind: Any, chunk_size: int | None) -> None:
    seen = []

    def found(tree: Any) -> Any:
        while not hasattr(tree, "x"):
            tree = tree["inner"] if isinstance(tree, (Tokens, Output)) else tree[0]
        seen.append(type(tree))
        return tree

    batch = kind({"x": X, "scale": 2.0})
    actual = per_sample_grad(lambda w, b: loss(w, found(b).x * found(b)["scale"]), chunk_size=chunk_size)(W, batch)
    (expected,) = loop(lambda w, x: loss(w, 2 * x), (0,), (None, 0))(W, X)
    assert_close(actual, expected)
    assert set(seen) == {type(found(batch))}
    shared = per_sample_grad(lambda w, x, b: loss(w, x + found(b).x[0]), in_dims=(None, 0, None))(W, X, batch)
    assert_close(shared, loop(lambda w, x: loss(w, x + X[0]), (0,), (None, 0))(W, X)[0])


@pytest.mark.parametrize("kind", [Tokens, Output])
def test_such_a_dict_cannot_be_differentiated(kind: Any) -> None:
    with pytest.raises(ArgumentError, match=f"holds a {kind.__name__}"):
        per_sample_grad(lambda p, x: loss(p["w"], x))(kind({"w": W}), X)


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Any


HIDDEN = [
    Unregistered,
    Slotted,
    lambda x: Unregistered([x]),  # type: ignore[arg-type]
    lambda x: Slotted({"x": (x,)}),
    lambda x: Unregistered(Slotted(x)),  # type: ignore[arg-type]
    lambda x: SimpleNamespace(x=x),
    lambda x: MappingProxyType({"x": x}),
    lambda x: {"s": {x}},
]


@pytest.mark.parametrize("kind", HIDDEN)
def test_containers_that_nobody_can_open_are_not_shared_by_default(kind: Any) -> None:
    with pytest.raises(ArgumentError, match="holds tensors but is no pytree"):
        per_sample_grad(lambda w, x, other: loss(w, x))(W, X, kind(X))
    per_sample_grad(lambda w, x, other: loss(w, x), in_dims=(None, 0, None))(W, X, kind(X))


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("kind", [Tokens, Output, lambda d: [Tokens(inner=Output(d))]])
def test_such_dicts_come_out_as_auxiliary_values(kind: Any, chunk_size: int | None) -> None:
    def fn(w: Tensor, x: Tensor) -> Any:
        return loss(w, x), kind({"x": 2 * x, "name": "n"})

    _, aux = per_sample_grad(fn, has_aux=True, chunk_size=chunk_size)(W, X)
    expected = kind({"x": 2 * X, "name": "n"})
    assert type(aux) is type(expected)
    inner, wanted = (aux[0]["inner"], expected[0]["inner"]) if isinstance(aux, list) else (aux, expected)
    assert type(inner) is type(wanted)
    torch.testing.assert_close(inner["x"], wanted["x"])
    assert inner["name"] == "n"


@pytest.mark.parametrize("kind", [Tokens, Output])
def test_the_axis_of_what_such_a_dict_holds(kind: Any) -> None:
    actual = per_sample_grad(lambda w, b: loss(w, b.x), in_dims=(None, 1))(W, kind({"x": X.T.contiguous()}))
    assert_close(actual, loop(loss, (0,), (None, 0))(W, X)[0])


def test_attributes_beside_the_dict_are_kept() -> None:
    batch = Tokens({"x": X})
    batch.source = "here"
    seen = []
    per_sample_grad(lambda w, b: (seen.append(b.source), loss(w, b.x))[1])(W, batch)
    assert set(seen) == {"here"}


@dataclasses.dataclass
class Registered:
    x: Tensor


register_pytree_node(Registered, lambda r: ([r.x], None), lambda values, _: Registered(*values))


class Cache:
    def __init__(self, x: Tensor) -> None:
        self.layers = [x]


def test_auxiliary_values_in_a_class_of_ones_own() -> None:
    _, aux = per_sample_grad(lambda w, x: (loss(w, x), Registered(2 * x)), has_aux=True)(W, X)
    torch.testing.assert_close(aux.x, 2 * X)
    for kind in (Unregistered, Cache):
        with pytest.raises(ArgumentError, match="is no pytree"):
            per_sample_grad(lambda w, x, kind=kind: (loss(w, x), kind(2 * x)), has_aux=True)(W, X)
