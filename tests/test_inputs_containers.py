"""Containers that optree does not know: each sample gets its part of them, or they are refused; none is shared in silence."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, UserDict
from types import MappingProxyType, SimpleNamespace
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from per_sample import ArgumentError, clipped_grad, per_sample_grad, per_sample_grad_dot, per_sample_grad_norm, reference
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


@dataclasses.dataclass
class Point:
    w: Any
    scale: Any = None


torch.export.register_dataclass(Point)
STRUCTURES = {
    "dataclass": lambda w, scale: Point(w, scale),
    "nested": lambda w, scale: {"a": [Point(Output(w=w), Tokens(scale=scale))], "b": None},
    "tokens": lambda w, scale: Tokens(w=w, scale=scale),
}


def parts(tree: Any) -> tuple[Any, Any]:
    if isinstance(tree, Point):
        return tree.w, tree.scale
    return (tree["w"], tree["scale"]) if isinstance(tree, Tokens) else (tree["a"][0].w.w, tree["a"][0].scale.scale)


def scaled(tree: Any, x: Tensor) -> Tensor:
    w, scale = parts(tree)
    return loss(w, scale * x)


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("transform", [per_sample_grad, reference.per_sample_grad], ids=["fast", "reference"])
def test_gradients_come_in_the_containers_of_the_parameters(kind: str, transform: Any) -> None:
    made, scale = STRUCTURES[kind], real(3)
    params = made(W, scale)
    expected = loop(lambda w, scale, x: loss(w, scale * x), (0, 1), (None, None, 0))(W, scale, X)
    found = transform(scaled)(params, X)
    assert type(found) is type(params)
    assert_close(parts(found), tuple(expected))
    both, other = transform(lambda x, p, q: scaled(p, x) + 0 * scaled(q, x), argnums=(1, 2))(X, params, params)
    assert_close(parts(both), tuple(expected))
    assert type(other) is type(params)
    aux = transform(lambda p, x: (scaled(p, x), p), has_aux=True)(params, X)[1]
    torch.testing.assert_close(parts(aux)[0], W.expand(N, *W.shape))


@pytest.mark.parametrize("kind", STRUCTURES)
def test_quantities_of_such_parameters(kind: str) -> None:
    made, scale = STRUCTURES[kind], real(3)
    params = made(W, scale)
    g, h = loop(lambda w, scale, x: loss(w, scale * x), (0, 1), (None, None, 0))(W, scale, X)
    norms = g.flatten(1).norm(dim=1), h.norm(dim=1)
    assert_close(parts(per_sample_grad_norm(scaled, per_leaf=True)(params, X)), norms)
    direction = made(torch.ones_like(W), 2 * torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(per_sample_grad_dot(scaled, direction)(params, X), g.flatten(1).sum(1) + 2 * h.sum(1))
    clip = clipped_grad(scaled, made(0.5, 0.25), return_norms=True)
    assert clip.sensitivity() == pytest.approx(math.hypot(0.5, 0.25))
    summed, shown = clip(params, X)
    assert type(summed) is type(shown) is type(params)
    assert_close(parts(shown), norms)
    weights = [(bound / norm).clamp(max=1) for bound, norm in zip((0.5, 0.25), norms, strict=True)]
    assert_close(parts(summed), (torch.einsum("nij,n->ij", g, weights[0]), weights[1] @ h))


def test_a_wrong_structure_of_such_parameters() -> None:
    for wrong in ([1.0], Output(w=1.0), {"w": 1.0}, Point(1.0, [1.0])):
        with pytest.raises(ArgumentError, match="structure"):
            clipped_grad(scaled, max_norm=wrong)(Point(W, real(3)), X)
    with pytest.raises(ArgumentError, match="`direction` must have the structure"):
        per_sample_grad_dot(scaled, Output(w=W, scale=real(3)))(Point(W, real(3)), X)


def test_what_nobody_can_open_is_told_how_to_register() -> None:
    with pytest.raises(ArgumentError, match=r"register the type.*register_dataclass"):
        per_sample_grad(lambda p, x: loss(p.x, x))(Unregistered(W), X)


@optree.dataclasses.dataclass(namespace="per_sample")
class OfOptree:
    w: Tensor


def test_a_type_in_the_librarys_namespace_of_optree() -> None:
    found = per_sample_grad(lambda p, x: loss(p.w, x))(OfOptree(W), X)
    assert_close(found.w, loop(loss, (0,), (None, 0))(W, X)[0])


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
