"""Every quantity inside ``vmap``, ``grad``, ``jvp`` and ``jacrev``, under plain autograd, and with arguments that want gradients."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import per_sample
from per_sample import reference
from programs import BY_NAME, D, real
from quantity_table import BY_NAME as QUANTITY
from quantity_table import QUANTITIES, direction, middle

# torch's own jvp decompositions are scripted on first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

MIXED = BY_NAME["mixed"]
PARAMS, INDEX, X = MIXED.args
STACKED = tree_map(lambda v: torch.stack([v, 2 * v.cos()]), PARAMS)


# One of each kind.
COMPOSED = [
    *("norm", "norm of leaves", "weighted", "weighted by norm", "clipped", "clipped automatically", "clipped leaf by leaf"),
    *("second moment", "variance", "noise scale", "dot", "gram", "gram with others", "projected, factored", "map to a sum"),
]


def total(tree):
    return sum((t**3).sum() for t in tree_leaves(tree))


def _autograd(f):
    p = tree_map(lambda t: t.clone().requires_grad_(), PARAMS)
    x = X.clone().requires_grad_()
    return torch.autograd.grad(total(f(p, INDEX, x)), [*p.values(), x])


COMPOSITIONS = {
    "vmap over params": lambda f: vmap(lambda p: f(p, INDEX, X))(STACKED),
    "vmap over data": lambda f: vmap(lambda x: f(PARAMS, INDEX, x))(torch.stack([X, X + 1])),
    "grad": lambda f: grad(lambda p: total(f(p, INDEX, X)))(PARAMS),
    "grad wrt data": lambda f: grad(lambda x: total(f(PARAMS, INDEX, x)))(X),
    "jvp": lambda f: jvp(lambda p: f(p, INDEX, X), (PARAMS,), (tree_map(torch.cos, PARAMS),)),
    "jacrev": lambda f: jacrev(lambda s: f({**PARAMS, "s": s}, INDEX, X))(PARAMS["s"]),
    "autograd": _autograd,
}


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("composed", COMPOSED)
def test_compositions(name, composed):
    quantity = QUANTITY[composed]
    actual, expected = (COMPOSITIONS[name](quantity.make(package, MIXED)) for package in (per_sample, reference))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", ["norm", "weighted by norm, low", "clipped, low", "variance", "gram", "gram with others", "map to a sum"])
def test_autograd_through_chunks(name, chunk_size):
    actual = _autograd(QUANTITY[name].make(per_sample, MIXED, chunk_size=chunk_size))
    torch.testing.assert_close(actual, _autograd(QUANTITY[name].make(reference, MIXED)))


def _weights(package, w):
    return package.weighted_grad(MIXED.loss, w)(*MIXED.args)


def _weights_by_function(package, c):
    return package.weighted_grad(MIXED.loss, lambda norms: (c * norms).cos())(*MIXED.args)


def _direction(package, d):
    return package.per_sample_grad_dot(MIXED.loss, {**direction(MIXED), "w": d})(*MIXED.args)


def _closed_over(package, c):
    return package.per_sample_grad_norm(lambda p, i, x: MIXED.loss(p, i, x) * (c * x.sum()).sin().sum())(*MIXED.args)


def _closed_over_by_clipping(package, c):
    return package.clipped_grad(lambda p, i, x: MIXED.loss(p, i, x) * (1 + c.square().sum()), middle(MIXED))(*MIXED.args)


def _other_batch(package, x):
    return package.grad_gram(MIXED.loss, other=[INDEX[:2], x])(*MIXED.args)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("by", "at"),
    [
        (_weights, real(5)),
        (_weights_by_function, real()),
        (_direction, real(3, 4)),
        (_closed_over, real(3)),
        (_closed_over_by_clipping, real(3)),
        (_other_batch, real(2, 6, 3)),
    ],
)
def test_what_else_may_want_gradients(by, at):
    def through_autograd(package):
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(total(by(package, leaf)), leaf)

    torch.testing.assert_close(through_autograd(per_sample), through_autograd(reference))
    for outer in (
        lambda package: jacrev(lambda z: by(package, z))(at),
        lambda package: vmap(lambda z: by(package, z))(torch.stack([at, -at])),
    ):
        torch.testing.assert_close(outer(per_sample), outer(reference))


@pytest.mark.parametrize("package", [per_sample, reference], ids=["per_sample", "reference"])
@pytest.mark.parametrize("name", ["norm", "norm-1", "norm-3.5", "norm of leaves", "weighted by norm", "clipped", "clipped automatically"])
def test_derivatives_where_a_gradient_is_zero(name, package):
    """Of a norm, too: zero is one of its subgradients there, and no NaN comes from its square root."""
    x = real(5, 4, 3)
    x[1] = 0
    plain = BY_NAME["mlp over positions"]

    def by(p):
        transformed = QUANTITY[name].make(package, _Linear)
        return total(transformed(p, x))

    class _Linear:
        loss = staticmethod(lambda p, x: (x @ p["w1"].T).sin().sum())
        grads, leaves, n = plain.grads, plain.leaves, plain.n

    found = grad(by)(plain.params[0])
    assert all(g.isfinite().all() for g in tree_leaves(found))
    p = tree_map(lambda t: t.clone().requires_grad_(), plain.params[0])
    for g, want in zip(torch.autograd.grad(by(p), list(p.values()), allow_unused=True), found.values(), strict=True):
        torch.testing.assert_close(torch.zeros_like(want) if g is None else g, want)


def test_nothing_is_recorded_where_nobody_asks():
    p = tree_map(lambda t: t.clone().requires_grad_(), PARAMS)
    for quantity in QUANTITIES:
        with torch.no_grad():
            assert not any(t.requires_grad for t in tree_leaves(quantity.make(per_sample, MIXED)(p, INDEX, X)))
    assert all(t.grad is None for t in p.values())


@pytest.mark.parametrize("name", COMPOSED)
def test_inside_a_loss(name):
    """A per-sample gradient of a function of quantities."""
    quantity = QUANTITY[name]

    def outer(package):
        def fn(s, z):
            return total(quantity.make(package, MIXED)({**PARAMS, "s": s}, INDEX, X * z))

        return package.per_sample_grad(fn)(PARAMS["s"], torch.tensor([1.0, 0.5], dtype=D))

    torch.testing.assert_close(outer(per_sample), outer(reference))
