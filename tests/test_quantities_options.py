"""The options that all quantities share: chunks, auxiliary values, randomness, empty and single batches, half precision, groups."""

from __future__ import annotations

import dataclasses
import math

import optree
import pytest
import torch
import torch.nn.functional as F

import per_sample
import quantity_table
from per_sample import reference
from programs import BY_NAME, D, Program, ints, real
from quantity_table import QUANTITIES
from tree_oracle import assert_close

each_quantity = pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda q: q.name)
both = pytest.mark.parametrize("package", [per_sample, reference], ids=["per_sample", "reference"])
SEVERAL = ["mixed", "conv2d grouped", "cnn, keep_batch_dim", "own parameters", "sample differentiated too"]


@each_quantity
@pytest.mark.parametrize(("name", "chunk_size"), [*((name, 2) for name in SEVERAL), ("mixed", 1), ("mixed", 9)])
def test_chunks_give_the_same(name, chunk_size, quantity):
    program = BY_NAME[name]
    actual = quantity.make(per_sample, program, chunk_size=chunk_size, **program.options)(*program.args)
    assert_close(actual, quantity.expected(program))


@each_quantity
def test_chunks_of_the_reference_give_the_same(quantity):
    program = BY_NAME["mixed"]
    assert_close(quantity.make(reference, program, chunk_size=2)(*program.args), quantity.expected(program))


@each_quantity
def test_at_most_chunk_size_samples_at_once(quantity):
    seen = []

    def fn(p, x):
        seen.append(x.n)
        return torch.tanh(p @ x)

    program = Program("watched", fn, (real(2, 3),), lambda n: (real(n, 3),))
    expected = dataclasses.replace(program, fn=lambda p, x: torch.tanh(p @ x))
    expected.__dict__["args"] = program.args
    program.__dict__["grads"] = expected.grads
    others = quantity.name == "gram with others"
    if others:
        program.__dict__["others"] = expected.others
    quantity.make(per_sample, program, chunk_size=2)(*program.args)
    assert set(seen) == {1, 2}
    # A second pass is for what asks for it; the Gram matrix of chunks takes them in pairs.
    passes = 2 if "low" in quantity.name or "by norm" in quantity.name else 1
    if "gram" not in quantity.name:
        assert len(seen) <= 3 * passes


class _WithAux(Program):
    """The loss comes with values of the sample's own, shared values, and what is no tensor."""

    def loss(self, *args):
        return super().loss(*args), {"x": args[-1] * 2, "shared": args[0]["b1"] + 1, "name": "aux"}


@both
@each_quantity
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_auxiliary_values(quantity, package, chunk_size):
    plain = BY_NAME["mlp"]
    program = _WithAux(plain.name, plain.fn, plain.params, plain.samples)
    program.__dict__.update(args=plain.args, others=plain.others, grads=plain.grads)
    found = quantity.make(package, program, has_aux=True, chunk_size=chunk_size)(*program.args)
    assert isinstance(found, tuple)
    *actual, aux = found
    if "others" not in quantity.name:
        expected = quantity.expected(plain)
        assert_close(actual, expected if isinstance(expected, tuple) else [expected])
    assert_close(aux, {"x": plain.args[-1] * 2, "shared": (plain.params[0]["b1"] + 1).expand(plain.n, -1), "name": "aux"})


def _drop(p, x):
    return F.dropout(torch.tanh(F.linear(x, p["w"], p["b"])), 0.4) * torch.rand_like(p["b"])


RANDOM = Program("random", _drop, ({"w": real(4, 3), "b": real(4)},), lambda n: (real(n, 3),))


@each_quantity
@pytest.mark.parametrize(
    ("package", "randomness", "chunk_size"),
    [
        *((per_sample, randomness, chunk_size) for randomness in ("different", "same") for chunk_size in (None, 2)),
        (reference, "different", 2),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_random_numbers_are_those_of_vmap_in_every_pass(package, randomness, chunk_size, quantity):
    """Those of the plain gradients under the same seed, also where the function runs twice, and as many of them."""
    options = {"randomness": randomness, "chunk_size": chunk_size}
    program = dataclasses.replace(RANDOM)
    program.__dict__["args"] = RANDOM.args
    torch.manual_seed(3)
    program.__dict__["grads"] = reference.per_sample_grad(program.loss, **options)(*program.args)
    if quantity.name == "gram with others":
        program.__dict__["others"] = RANDOM.others
        right = reference.per_sample_grad(program.loss, **options)(*RANDOM.others)
        expected = quantity_table.flat(program) @ quantity_table.real_rows(optree.tree_leaves(right)).T
    else:
        expected = quantity.expected(program)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert_close(quantity.make(package, program, **options)(*program.args), expected)
    torch.testing.assert_close(torch.rand(1), after)


@each_quantity
@pytest.mark.parametrize(("name", "chunk_size"), [("mixed", None), ("mixed", 2), ("conv2d grouped", None), ("own parameters", None)])
def test_an_empty_batch(name, chunk_size, quantity):
    program = dataclasses.replace(BY_NAME[name], n=0)
    shapes = program.wanted
    program.__dict__["grads"] = reference.per_sample_grad(program.loss, **program.options)(*program.args)
    program.__dict__["others"] = program.args
    actual, expected = (
        quantity.make(package, program, chunk_size=chunk_size, **program.options)(*program.args) for package in (per_sample, reference)
    )
    torch.testing.assert_close(optree.tree_leaves(actual), optree.tree_leaves(expected), equal_nan=True)
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    if quantity.name in ("weighted", "map to a sum") and name not in SEVERAL[3:]:
        assert_close(actual, optree.tree_map(torch.zeros_like, shapes))
    if quantity.name == "gram":
        assert actual.shape == (0, 0)


@each_quantity
def test_an_empty_batch_of_a_function_that_asks_for_values(quantity):
    def fn(p, x):
        return p @ x if x.sum() > 0 else p @ x * 2

    program = Program("branch", fn, (real(2, 3),), lambda n: (real(n, 3),), n=0)
    program.__dict__["grads"] = torch.zeros(0, 2, 3, dtype=D)
    program.__dict__["others"] = program.args
    plain = dataclasses.replace(program, fn=lambda p, x: p @ x)
    plain.__dict__.update(args=program.args, grads=program.grads, others=program.others)
    with per_sample.options(split_batch=True):
        actual = quantity.make(per_sample, program)(*program.args)
    expected = quantity.make(reference, plain)(*program.args)
    torch.testing.assert_close(optree.tree_leaves(actual), optree.tree_leaves(expected), equal_nan=True)


@both
@each_quantity
def test_one_sample(quantity, package):
    program = dataclasses.replace(BY_NAME["mlp"], n=1)
    actual = quantity.make(package, program)(*program.args)
    if quantity.name in ("variance", "noise scale", "noise scale in parts"):
        assert all(x.isnan().all() for x in optree.tree_leaves(actual))
    else:
        assert_close(actual, quantity.expected(program))


def _branch(p, x, i):
    h = torch.tanh(p["w"] @ x) * p["table"][i % 4].sum()
    if x[0] > 0:
        return h * p["table"][0]
    return h.exp() * 2


def _of_both_kinds(n):
    return real(n, 3).abs() * (-1) ** torch.arange(n)[:, None], ints(4, n)


SPLIT = Program("groups", _branch, ({"w": real(3, 3), "table": real(4, 3)},), _of_both_kinds)


@each_quantity
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_groups_that_run_apart(quantity, chunk_size):
    assert len({bool(x[0] > 0) for x in SPLIT.args[1]}) == 2
    with pytest.raises(per_sample.DataDependentError):
        quantity.make(per_sample, SPLIT)(*SPLIT.args)
    with per_sample.options(split_batch=True):
        actual = quantity.make(per_sample, SPLIT, chunk_size=chunk_size)(*SPLIT.args)
    assert_close(actual, quantity.expected(SPLIT))


@each_quantity
@pytest.mark.parametrize(
    ("package", "name", "dtype"),
    [
        *((per_sample, name, torch.bfloat16) for name in ("mlp over positions", "conv2d grouped")),
        (per_sample, "used twice, over positions", torch.float16),
        (reference, "mlp over positions", torch.bfloat16),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_half_precision_is_summed_in_single(package, name, dtype, quantity):
    """Near to what the rounded parameters and samples give in full precision.

    Each op of the program, some ten, rounds its result; what is at most quadratic in the gradients doubles that.
    """
    program = BY_NAME[name]
    half = dataclasses.replace(program)
    rounded = optree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, program.args)
    half.__dict__["args"] = rounded
    half.__dict__["others"] = optree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, program.others)
    exact = dataclasses.replace(program)
    exact.__dict__["args"], exact.__dict__["others"] = (
        optree.tree_map(lambda t: t.to(D) if t.is_floating_point() else t, tree) for tree in (half.args, half.others)
    )
    half.__dict__["grads"] = exact.grads
    actual = optree.tree_leaves(quantity.make(package, half, **half.options)(*half.args))
    expected = optree.tree_leaves(quantity.expected(exact))
    for a, e in zip(actual, expected, strict=True):
        # The squares of the numbers of single precision need more.
        assert a.dtype == torch.float32 or (a.dtype == D and quantity.name == "map of samples")
        assert a.shape == e.shape
        assert (a - e).abs().max() <= 40 * torch.finfo(dtype).eps * e.abs().max() or math.isclose(float(e.abs().max()), 0)
