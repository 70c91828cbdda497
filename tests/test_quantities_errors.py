"""What the quantities refuse: with the library's own errors, before or instead of a wrong number."""

from __future__ import annotations

import math

import optree
import pytest
import torch
import torch.nn.functional as F

import per_sample
from per_sample import (
    ArgumentError,
    BatchSizeError,
    NotScalarError,
    PerSampleError,
    RandomnessError,
    SharedWriteError,
    reference,
)
from programs import BY_NAME, real
from quantity_table import QUANTITIES, direction

both = pytest.mark.parametrize("package", [per_sample, reference], ids=["per_sample", "reference"])
each_quantity = pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda q: q.name)
MLP = BY_NAME["mlp"]
NAN = float("nan")


@each_quantity
@pytest.mark.parametrize(
    "options",
    [
        {"argnums": "0"},
        {"argnums": ()},
        {"argnums": True},
        {"randomness": "none"},
        {"chunk_size": 0},
        {"chunk_size": 2.0},
        {"chunk_size": True},
    ],
    ids=str,
)
def test_options_that_cannot_be_right(quantity, options):
    with pytest.raises(ArgumentError):
        quantity.make(per_sample, MLP, **options)


@each_quantity
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"argnums": 3}, ArgumentError),
        ({"argnums": (0, 0)}, ArgumentError),
        ({"in_dims": (None, 0)}, ArgumentError),
        ({"in_dims": (None, None, None)}, BatchSizeError),
        ({"in_dims": (None, 0, 1)}, BatchSizeError),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(quantity, options, error):
    with pytest.raises(error):
        quantity.make(per_sample, MLP, **options)(*MLP.args)


@both
@each_quantity
def test_integers_are_not_differentiated(quantity, package):
    with pytest.raises(ArgumentError):
        quantity.make(package, MLP)({**MLP.params[0], "b1": torch.zeros(6, dtype=torch.int64)}, *MLP.args[1:])


class _Loss:
    """A loss of its own with the gradients of the MLP, on which the quantities' arguments depend."""

    def __init__(self, loss):
        self.loss = loss
        self.grads, self.leaves, self.n, self.numbers, self.others = MLP.grads, MLP.leaves, MLP.n, MLP.numbers, MLP.others


REFUSED = {
    "no scalar": (lambda p, x, y: F.linear(x, p["w1"]), NotScalarError),
    "no tensor": (lambda p, x, y: 1.0, NotScalarError),
    "complex": (lambda p, x, y: (p["w1"].sum() * x.sum()).to(torch.complex128), NotScalarError),
    "random": (lambda p, x, y: F.dropout(p["w1"] @ x).sum(), RandomnessError),
    "branch": (lambda p, x, y: (p["w1"] @ x).sum() * (1 if (x == MLP.args[1][0]).all() else 2), per_sample.DataDependentError),
    "shared write": (lambda p, x, y: OUTSIDE.copy_(p["w1"] @ x).sum(), SharedWriteError),
}
OUTSIDE = real(6)


@each_quantity
@pytest.mark.parametrize("name", REFUSED)
def test_functions_that_are_refused(name, quantity):
    fn, error = REFUSED[name]
    with pytest.raises(error):
        quantity.make(per_sample, _Loss(fn))(*MLP.args)


@each_quantity
def test_errors_of_the_function_itself_come_through(quantity):
    with pytest.raises(ZeroDivisionError):
        quantity.make(per_sample, _Loss(lambda p, x, y: 1 / 0))(*MLP.args)


MAKERS = {
    "norm of order 0": lambda p: p.per_sample_grad_norm(MLP.loss, ord=0),
    "norm of negative order": lambda p: p.per_sample_grad_norm(MLP.loss, ord=-1),
    "norm of order NaN": lambda p: p.per_sample_grad_norm(MLP.loss, ord=NAN),
    "norm by name": lambda p: p.per_sample_grad_norm(MLP.loss, ord="fro"),
    "norm of order True": lambda p: p.per_sample_grad_norm(MLP.loss, ord=True),
    "memory": lambda p: p.weighted_grad(MLP.loss, torch.ones(5), memory="none"),
    "weights that are a list": lambda p: p.weighted_grad(MLP.loss, [1.0] * 5)(*MLP.args),
    "memory of clipping": lambda p: p.clipped_grad(MLP.loss, 1.0, memory="none"),
    "no bound": lambda p: p.clipped_grad(MLP.loss, 0.0),
    "negative bound": lambda p: p.clipped_grad(MLP.loss, -1.0),
    "bound NaN": lambda p: p.clipped_grad(MLP.loss, NAN),
    "bound True": lambda p: p.clipped_grad(MLP.loss, True),
    "bound by name": lambda p: p.clipped_grad(MLP.loss, "1"),
    "negative bound of a group": lambda p: p.clipped_grad(MLP.loss, {"w1": 1.0, "b1": -1.0, "w2": 1.0, "b2": 1.0}),
    "normalise by zero": lambda p: p.clipped_grad(MLP.loss, 1.0, normalize_by=0.0),
    "normalise by less": lambda p: p.clipped_grad(MLP.loss, 1.0, normalize_by=-2.0),
    "normalise by NaN": lambda p: p.clipped_grad(MLP.loss, 1.0, normalize_by=NAN),
    "negative stability": lambda p: p.clipped_grad(MLP.loss, 1.0, automatic=True, stability=-0.1),
    "stability NaN": lambda p: p.clipped_grad(MLP.loss, 1.0, automatic=True, stability=NAN),
    "no stability": lambda p: p.clipped_grad(MLP.loss, 1.0, automatic=True, stability=0.0),
    "automatic without a bound": lambda p: p.clipped_grad(MLP.loss, math.inf, automatic=True),
    "relation": lambda p: p.clipped_grad(MLP.loss, 1.0).sensitivity("remove"),
    "variance": lambda p: p.grad_variance(MLP.loss, correction="1"),
    "no projector": lambda p: p.projected_grad(MLP.loss, 4),
    "other that is no tuple": lambda p: p.grad_gram(MLP.loss, other=MLP.args[1]),
    "across": lambda p: p.per_sample_grad_map(MLP.loss, lambda g: g.sq_norm(), across="all"),
    "a map that is no function": lambda p: p.per_sample_grad_map(MLP.loss, 3),
    "trees of another structure": lambda p: p.per_sample_grad_map(MLP.loss, lambda g, t: g.dot(t), trees=({"w": 1},))(*MLP.args),
    "a tree that is no sequence of trees": lambda p: p.per_sample_grad_map(MLP.loss, lambda g, t: g.dot(t), trees=MLP.params[0]),
}


@both
@pytest.mark.parametrize("name", MAKERS)
def test_options_of_one_quantity(name, package):
    with pytest.raises(ArgumentError):
        MAKERS[name](package)


BOUND = 1.0
CALLS = {
    "too few weights": lambda p: p.weighted_grad(MLP.loss, torch.ones(4)),
    "weights in a column": lambda p: p.weighted_grad(MLP.loss, torch.ones(5, 1)),
    "one weight": lambda p: p.weighted_grad(MLP.loss, torch.tensor(1.0)),
    "complex weights": lambda p: p.weighted_grad(MLP.loss, torch.ones(5, dtype=torch.complex64)),
    "a function that gives too few": lambda p: p.weighted_grad(MLP.loss, lambda n: n[:3]),
    "a function that gives one": lambda p: p.weighted_grad(MLP.loss, lambda n: n.sum()),
    "a function that gives no tensor": lambda p: p.weighted_grad(MLP.loss, lambda n: [1.0] * 5),
    "a direction that lacks a leaf": lambda p: p.per_sample_grad_dot(MLP.loss, {"w1": real(6, 3)}),
    "a direction that is a list": lambda p: p.per_sample_grad_dot(MLP.loss, list(direction(MLP).values())),
    "a direction of the wrong shape": lambda p: p.per_sample_grad_dot(MLP.loss, {**direction(MLP), "w1": real(3, 6)}),
    "a direction that would broadcast": lambda p: p.per_sample_grad_dot(MLP.loss, {**direction(MLP), "w1": real(6, 1)}),
    "a direction with a sample axis": lambda p: p.per_sample_grad_dot(MLP.loss, {**direction(MLP), "b1": real(5, 6)}),
    "a direction of numbers": lambda p: p.per_sample_grad_dot(MLP.loss, dict.fromkeys(MLP.params[0], 1.0)),
    "a complex direction": lambda p: p.per_sample_grad_dot(MLP.loss, {**direction(MLP), "b1": torch.ones(6, dtype=torch.complex128)}),
    "bounds that lack a leaf": lambda p: p.clipped_grad(MLP.loss, {"w1": BOUND}),
    "bounds for leaves that are not there": lambda p: p.clipped_grad(MLP.loss, {**dict.fromkeys(MLP.params[0], BOUND), "w3": BOUND}),
    "bounds that are a list": lambda p: p.clipped_grad(MLP.loss, [BOUND] * 4),
    "bounds below a leaf": lambda p: p.clipped_grad(MLP.loss, {**dict.fromkeys(MLP.params[0], BOUND), "w1": [BOUND, BOUND]}),
    "None for the bound of a tensor": lambda p: p.clipped_grad(MLP.loss, {**dict.fromkeys(MLP.params[0], BOUND), "w1": None}),
    "too few others": lambda p: p.grad_gram(MLP.loss, other=(MLP.args[1],)),
    "too many others": lambda p: p.grad_gram(MLP.loss, other=MLP.args),
    "others of two sizes": lambda p: p.grad_gram(MLP.loss, other=(real(4, 3), real(3, 2))),
}


@both
@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_the_arguments(name, package):
    with pytest.raises(ArgumentError):
        CALLS[name](package)(*MLP.args)


@both
@pytest.mark.parametrize(
    "is_padding",
    [torch.zeros(4, dtype=torch.bool), torch.zeros(5), torch.zeros(5, dtype=torch.int64), torch.zeros(5, 1, dtype=torch.bool), [False] * 5],
    ids=["too short", "floats", "integers", "a column", "a list"],
)
def test_padding_that_is_no_mask_of_the_samples(is_padding, package):
    with pytest.raises(ArgumentError):
        package.clipped_grad(MLP.loss, 1.0)(*MLP.args, is_padding=is_padding)


@pytest.mark.parametrize("across", ["samples", "sum"])
@pytest.mark.parametrize("leaf", [lambda g: "no tensor", lambda g: g.sq_norm().sum() if g.n > 1 else 1.0], ids=["text", "a number"])
def test_a_map_that_gives_what_cannot_be_joined(leaf, across):
    with pytest.raises(PerSampleError):
        per_sample.per_sample_grad_map(MLP.loss, leaf, across=across, chunk_size=2)(*MLP.args)


def test_a_map_across_samples_must_give_a_row_for_each():
    with pytest.raises(ArgumentError):
        per_sample.per_sample_grad_map(MLP.loss, lambda g: g.weighted_sum())(*MLP.args)


@each_quantity
def test_nothing_differentiated_at_all(quantity):
    """No tensor among the differentiated leaves: the library's error, or an answer without leaves, but no stumbling."""
    try:
        found = quantity.make(per_sample, _Loss(lambda p, x, y: x.sum()))(None, *MLP.args[1:])
    except PerSampleError:
        return
    assert not optree.tree_leaves(found)


def _spread(grads):
    mean, deviations = grads.moments()
    return mean / (deviations + 1).sqrt()


def test_a_map_of_the_whole_batch_is_refused_in_parts():
    whole = per_sample.per_sample_grad_map(MLP.loss, _spread, across="whole")
    rows = [torch.stack(list(g)) for g in MLP.leaves]
    expected = [g.mean(0) / ((g - g.mean(0)).square().sum(0) + 1).sqrt() for g in rows]
    torch.testing.assert_close(optree.tree_leaves(whole(*MLP.args)), expected)
    with pytest.raises(ArgumentError, match="leave `chunk_size` out"):
        per_sample.per_sample_grad_map(MLP.loss, _spread, across="whole", chunk_size=2)

    def branching(w, x):
        return (w * x).sum() if x.sum() > 0 else (w * x).sum().square()

    with per_sample.options(split_batch=True), pytest.raises(ArgumentError, match="runs in parts"):
        per_sample.per_sample_grad_map(branching, _spread, across="whole")(torch.ones(2), torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))


@pytest.mark.parametrize(
    ("leaf", "error", "pattern"),
    [
        (lambda g: g.abs().sum(1), AttributeError, "`materialize\\(\\)` gives the gradients as one"),
        (lambda g: torch.flatten(g, 1), TypeError, "flatten"),
        (lambda g: g[0], ArgumentError, "no tensor that has an index.*`materialize\\(\\)`"),
        (lambda g: g.nothing, AttributeError, "no attribute 'nothing'\\."),
        (lambda g: g.weighted_sum(torch.ones(3)), ArgumentError, "one for each of the"),
        (lambda g: g.dot(torch.ones(7, 7)), ArgumentError, "shape of one sample's gradient"),
    ],
)
def test_a_mistake_in_a_map_is_told_with_its_leaf(leaf, error, pattern):
    with pytest.raises(error, match=pattern) as caught:
        per_sample.per_sample_grad_map(MLP.loss, leaf)(*MLP.args)
    assert any("LeafGrads(n=" in note and "leaf " in note and "`materialize()`" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("ord", [1.0, 2.0, 3.5, math.inf])
def test_the_reference_has_the_norms_of_a_map(ord):
    for package in (per_sample, reference):
        found = package.per_sample_grad_map(MLP.loss, lambda g: g.norm(ord))(*MLP.args)
        expected = [torch.stack([torch.linalg.vector_norm(row, ord) for row in g]) for g in MLP.leaves]
        torch.testing.assert_close(optree.tree_leaves(found), expected)
