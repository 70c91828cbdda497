"""Clipping: padding, samples that are not finite, zero and huge gradients, groups, and what is returned."""

from __future__ import annotations

import math

import optree
import pytest
import torch

import per_sample
from per_sample import ArgumentError, NonFiniteWarning, clipped_grad, reference
from programs import BY_NAME, CLIPPED, D, real
from quantity_table import middle, only
from tree_oracle import assert_close

both = pytest.mark.parametrize("package", [per_sample, reference], ids=["per_sample", "reference"])


@both
@pytest.mark.parametrize(("chunk_size", "memory"), [(None, "fast"), (2, "fast"), (2, "low")])
@pytest.mark.parametrize("name", CLIPPED)
def test_padding_is_absence(name, chunk_size, memory, package):
    """Whatever the padded samples hold, and in silence."""
    p = BY_NAME[name]
    shared, samples = p.args[: len(p.params)], p.args[len(p.params) :]
    filled = [x.clone() for x in samples]
    for x in filled:
        if not x.dtype.is_floating_point and not x.is_complex():
            continue
        x[1], x[3] = math.nan, math.inf
    options = {"return_norms": True, "chunk_size": chunk_size, "memory": memory, **p.options}
    clipped = package.clipped_grad(p.loss, middle(p), **options)
    rest = torch.tensor([0, 2, 4])
    grads, found = clipped(*shared, *filled, is_padding=only(p.n, 1, 3))
    expected, lengths = clipped(*shared, *(x[rest] for x in samples))
    assert_close(grads, expected)
    assert_close(found[rest], lengths)
    assert found[[1, 3]].tolist() == [0, 0]
    # To the bit with the same shapes: what the padding holds makes no difference.
    again, _ = clipped(*shared, *samples, is_padding=only(p.n, 1, 3))
    for got, want in zip(optree.tree_leaves(again), optree.tree_leaves(grads), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@both
def test_all_is_padding(package):
    p = BY_NAME["mixed"]
    grads = package.clipped_grad(p.loss, 1.0)(*p.args, is_padding=torch.ones(p.n, dtype=torch.bool))
    assert_close(grads, optree.tree_map(torch.zeros_like, p.params[0]))


@both
@pytest.mark.parametrize(
    ("chunk_size", "memory", "groups", "automatic"),
    [(None, "fast", False, False), (None, "low", True, False), (2, "fast", True, True), (2, "low", False, True), (2, "fast", False, False)],
)
@pytest.mark.parametrize("name", ["mlp", "mlp over positions", "mixed", "conv2d grouped", "used twice"])
def test_samples_that_are_not_finite_are_dropped(name, chunk_size, memory, groups, automatic, package):
    p = BY_NAME[name]
    *samples, x = (y.clone() for y in p.args[1:]) if p.name != "mlp" else reversed([y.clone() for y in p.args[1:]])
    if p.name == "mlp":
        samples, order = [samples[0]], lambda y, x: (x, y)
    else:
        order = lambda *s: s  # noqa: E731
    x[1], x[3] = math.nan, math.inf
    max_norm = optree.tree_map(lambda _: middle(p) / 2, p.params[0]) if groups else middle(p)
    options = {"return_norms": True, "chunk_size": chunk_size, "memory": memory, "automatic": automatic, **p.options}
    clipped = package.clipped_grad(p.loss, max_norm, **options)
    with pytest.warns(NonFiniteWarning, match="2 of 5") as seen:
        grads, found = clipped(p.params[0], *order(*samples, x))
    assert len(seen) == 1
    rest = torch.tensor([0, 2, 4])
    expected, lengths = clipped(p.params[0], *order(*(y[rest] for y in samples), x[rest]))
    assert_close(grads, expected)
    for got, want in zip(optree.tree_leaves(found), optree.tree_leaves(lengths), strict=True):
        assert_close(got[rest], want)
    bad = torch.stack([~f.isfinite() for f in optree.tree_leaves(found)]).any(0)
    assert bad.tolist() == [False, True, False, True, False]


@both
@pytest.mark.parametrize("where", ["one leaf", "one number"])
def test_a_gradient_that_is_not_finite_in_one_place_is_dropped_from_all(where, package):
    def fn(p, x, s):
        return (p["a"] @ x).sin().sum() + (p["b"] * s).sum() * (p["c"] if where == "one leaf" else p["c"][:1]).sum()

    params = {"a": real(2, 3), "b": real(2) * 0, "c": real(2)}
    x, s = real(4, 3), torch.ones(4, dtype=D)
    s[2] = math.inf
    bounds = {"a": 0.5, "b": 0.25, "c": 0.125}
    rest = torch.tensor([0, 1, 3])
    for bound in (0.5, bounds):
        with pytest.warns(NonFiniteWarning):
            found = package.clipped_grad(fn, bound)(params, x, s)
        assert_close(found, package.clipped_grad(fn, bound)(params, x[rest], s[rest]))


NAMES = ["stem.0.weight", "stem.0.bias", "stems", "head.weight"]


@both
def test_groups_of_a_modules_parameters_by_name(package):
    params = dict(zip(NAMES, [real(2, 3), real(2), real(4, 2), real(4)], strict=True))

    def fn(p, x):
        return (p["stems"] @ (p["stem.0.weight"] @ x + p["stem.0.bias"]).tanh()) @ p["head.weight"]

    x = real(5, 3)
    one_by_one = [torch.func.grad(fn)(params, row) for row in x]
    groups = {"stem": NAMES[:2], "stems": NAMES[2:3], "head": NAMES[3:]}
    bounds = {"head": 0.2, "stem": 0.3, "stems": 0.4}
    clipped = package.clipped_grad(fn, bounds, return_norms=True)
    summed, norms = clipped(params, x)
    assert norms.keys() == bounds.keys()
    assert clipped.sensitivity() == pytest.approx(math.hypot(0.2, 0.3, 0.4))
    for group, names in groups.items():
        lengths = torch.stack([torch.cat([g[name].flatten() for name in names]).norm() for g in one_by_one])
        assert_close(norms[group], lengths)
        weights = (bounds[group] / lengths).clamp(max=1)
        assert weights.min() < 1
        for name in names:
            assert_close(summed[name], sum(w * g[name] for w, g in zip(weights, one_by_one, strict=True)))


@both
@pytest.mark.parametrize("bounds", [["stem", "head"], ["stem", "stems", "head", "tail"], ["stem", "stem.0", "stems", "head"]])
def test_names_of_modules_that_are_not_those_of_all_parameters(bounds, package):
    params = {name: real(2) for name in NAMES}
    with pytest.raises(ArgumentError, match="`max_norm` is not a prefix"):
        package.clipped_grad(lambda p, x: sum(v.sum() for v in p.values()) * x, dict.fromkeys(bounds, 1.0))(params, real(3))


@both
def test_nobody_is_left(package):
    with pytest.warns(NonFiniteWarning, match="5 of 5"):
        found = package.clipped_grad(BY_NAME["mlp"].loss, 1.0)(*BY_NAME["mlp"].params, real(5, 3) * math.nan, real(5, 2))
    assert_close(found, optree.tree_map(torch.zeros_like, BY_NAME["mlp"].params[0]))


@both
@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("bound", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_gradients_that_are_zero(automatic, bound, package):
    x = torch.zeros(4, 3, dtype=D)
    x[2] = 3.0
    found, lengths = package.clipped_grad(lambda w, x: (w * x).sum(), bound, automatic=automatic, return_norms=True)(real(3), x)
    norm = math.sqrt(27)
    factor = 0.5 / (norm + 0.01) if automatic else 0.5 / norm
    torch.testing.assert_close(found, factor * x[2])
    torch.testing.assert_close(lengths, torch.tensor([0, 0, norm, 0], dtype=D))


@both
@pytest.mark.parametrize("name", CLIPPED)
def test_an_infinite_bound_clips_nothing(name, package):
    p = BY_NAME[name]
    clipped = package.clipped_grad(p.loss, math.inf, **p.options)
    assert_close(clipped(*p.args), optree.tree_map(lambda g: g.sum(0), p.grads))
    assert clipped.sensitivity() == math.inf


@both
@pytest.mark.parametrize("power", [-30, -22, 22, 30])
@pytest.mark.parametrize("positions", [False, True])
def test_gradients_whose_squares_do_not_fit(positions, power, package):
    """Single precision holds 1e30, not its square: clipped like any other, neither dropped nor let through."""
    torch.manual_seed(0)
    w = torch.randn(6, 4)
    x = torch.randn(3, 5, 4) if positions else torch.randn(3, 4)
    scale = torch.tensor([1.0, 10.0**power, 1.0])

    def fn(w, x, s):
        return (x @ w.T).sum() * s

    found, lengths = package.clipped_grad(fn, 1.0, return_norms=True)(w, x, scale)
    rows = reference.per_sample_grad(fn)(w.double(), x.double(), scale.double())
    exact = rows.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths.double() / exact, torch.ones(3, dtype=D), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.double(), torch.einsum("n,nab->ab", (1 / exact).clamp(max=1), rows), rtol=1e-4, atol=1e-5)


@both
def test_groups_of_leaves(package):
    """A bound for each subtree: every group is clipped on its own, and the bounds add up as the sides of a box."""
    p = BY_NAME["mlp"]
    params = {"first": {"w1": p.params[0]["w1"], "b1": p.params[0]["b1"]}, "second": [p.params[0]["w2"], p.params[0]["b2"]]}

    def fn(q, x, y):
        return p.loss({**q["first"], "w2": q["second"][0], "b2": q["second"][1]}, x, y)

    bounds = {"first": 0.75, "second": 0.5}
    clipped = package.clipped_grad(fn, bounds, normalize_by=2.0, return_norms=True)
    grads, found = clipped(params, *p.args[1:])
    names = {"first": ["w1", "b1"], "second": ["w2", "b2"]}
    expected = {}
    for group, members in names.items():
        rows = torch.cat([p.grads[name].flatten(1) for name in members], 1)
        lengths = rows.norm(dim=1)
        assert_close(found[group], lengths)
        weights = (bounds[group] / lengths).clamp(max=1) / 2
        expected[group] = [torch.einsum("n,n...->...", weights, p.grads[name]) for name in members]
    assert_close(grads["first"], dict(zip(names["first"], expected["first"], strict=True)))
    assert_close(grads["second"], expected["second"])
    assert clipped.sensitivity() == pytest.approx(math.hypot(0.75, 0.5) / 2)
    assert clipped.sensitivity("replace_one") == pytest.approx(math.hypot(0.75, 0.5))


@both
def test_groups_of_several_arguments_in_any_order(package):
    p = BY_NAME["two arguments"]
    w, b, x = p.args
    forward, lengths = package.clipped_grad(p.loss, (0.5, 0.25), argnums=(0, 1), return_norms=True)(w, b, x)
    backward, other = package.clipped_grad(p.loss, (0.25, 0.5), argnums=(1, 0), return_norms=True)(w, b, x)
    assert_close(backward, forward[::-1])
    assert_close(other, lengths[::-1])


@both
def test_what_is_returned(package):
    p = BY_NAME["mlp"]
    fn = lambda q, x, y: (p.loss(q, x, y), x)  # noqa: E731
    plain = package.clipped_grad(p.loss, 1.0)(*p.args)
    grads, lengths = package.clipped_grad(p.loss, 1.0, return_norms=True)(*p.args)
    both_of, aux = package.clipped_grad(fn, 1.0, has_aux=True)(*p.args)
    all_of = package.clipped_grad(fn, 1.0, has_aux=True, return_norms=True)(*p.args)
    assert_close(plain, grads)
    assert_close(plain, both_of)
    assert_close(list(all_of), [plain, lengths, aux])
    torch.testing.assert_close(aux, p.args[1])


def test_keyword_arguments_are_shared_and_is_padding_is_not_one_of_them():
    p = BY_NAME["mlp"]
    fn = lambda q, x, y, *, scale: p.loss(q, x, y) * scale  # noqa: E731
    found = clipped_grad(fn, 1e9)(*p.args, is_padding=None, scale=2.0)
    assert_close(found, optree.tree_map(lambda g: 2 * g.sum(0), p.grads))


def test_a_module_and_its_optimizer():
    """The sums have the parameters' shapes and are made to be written into `.grad`."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    fn = lambda q, x: torch.func.functional_call(net, q, x).square().sum()  # noqa: E731
    sums = clipped_grad(fn, 1.0, normalize_by=4)(dict(net.named_parameters()), torch.randn(4, 3))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for name, parameter in net.named_parameters():
        parameter.grad = sums[name].detach()
    torch.optim.SGD(net.parameters(), 0.1).step()
    for name, parameter in net.named_parameters():
        assert sums[name].any()
        assert_close(parameter.detach(), before[name] - 0.1 * sums[name].detach())


WITH_LOSSES = {
    "clipped": lambda p, loss, **o: p.clipped_grad(loss, 0.7, **o),
    "clipped, low": lambda p, loss, **o: p.clipped_grad(loss, 0.7, memory="low", **o),
    "clipped, with norms": lambda p, loss, **o: p.clipped_grad(loss, 0.7, return_norms=True, **o),
    "norm": lambda p, loss, **o: p.per_sample_grad_norm(loss, **o),
    "norm of leaves": lambda p, loss, **o: p.per_sample_grad_norm(loss, per_leaf=True, **o),
    "weighted by norm": lambda p, loss, **o: p.weighted_grad(loss, torch.cos, **o),
    "weighted": lambda p, loss, **o: p.weighted_grad(loss, torch.arange(4.0, dtype=D), **o),
}


@both
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", WITH_LOSSES)
def test_the_losses_stand_before_what_else_is_returned(name, chunk_size, package):
    def loss(w, x):
        return (w @ x).sin(), x * 2

    w, x = real(3), real(4, 3)
    make = WITH_LOSSES[name]
    plain = make(package, lambda w, x: loss(w, x)[0], chunk_size=chunk_size)(w, x)
    *found, values, aux = make(package, loss, return_values=True, has_aux=True, chunk_size=chunk_size)(w, x)
    assert_close(found if isinstance(plain, tuple) else found[0], plain)
    torch.testing.assert_close([values, aux], [(x @ w).sin(), 2 * x])
