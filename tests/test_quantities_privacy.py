"""What privacy rests on: no sample moves the sum of clipped gradients by more than its bound, for random models, data and bounds."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import per_sample
from per_sample import NonFiniteWarning, clipped_grad, reference
from programs import BY_NAME, CLIPPED, D
from quantity_table import middle, norms, only
from test_isolation_random import OPS, Parameters, program
from tree_oracle import assert_close

both = pytest.mark.parametrize("package", [per_sample, reference], ids=["per_sample", "reference"])


def length(tree: Any) -> float:
    """The L2 norm of all leaves together."""
    parts = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in optree.tree_leaves(tree)]
    return math.hypot(*(float(p.double().norm()) for p in parts))


def minus(a: Any, b: Any) -> Any:
    return optree.tree_map(lambda x, y: x.to(torch.promote_types(x.dtype, D)) - y, a, b)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=3),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-3, 1.0, 1.0, 30.0]),
    bound=st.sampled_from([1e-4, 0.1, 1.0, 100.0]),
    kind=st.sampled_from(["plain", "automatic", "groups", "low", "chunks"]),
    normalize_by=st.sampled_from([1.0, 7.0]),
    j=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_one_sample_moves_the_sum_by_no_more_than_its_bound(names, shape, dtype, scale, bound, kind, normalize_by, j, seed):
    """Without a sample the sum moves by at most the bound, group by group and overall.

    Allowed on top is the rounding of the sums in single precision: each of the n terms is at most as long as the bound, and takes part in
    some tens of roundings, of its norm, its weight, and the sum over its own positions.
    """
    n = 4
    torch.manual_seed(seed)
    x, i = (torch.randn(n, *shape) * scale).to(dtype), torch.randint(0, 12, (n, 3))
    first = Parameters()
    program(names, first, x[0].double(), i[0])
    params = [p.to(dtype) for p in first.made]

    def loss(params: list[Tensor], x: Tensor, i: Tensor) -> Tensor:
        return program(names, Parameters([p.float() for p in params]), x.float(), i).float()

    options: dict[str, Any] = {"automatic": kind == "automatic", "normalize_by": normalize_by}
    options |= {"memory": "low" if kind == "low" else "fast", "chunk_size": 3 if kind == "chunks" else None}
    max_norm = [bound * (k + 1) for k in range(len(params))] if kind == "groups" else bound
    clipped = clipped_grad(loss, max_norm, return_norms=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        whole, found = clipped(params, x, i)
        moved = minus(whole, clipped(params, x, i, is_padding=only(n, j))[0])
        alone = clipped(params, x[j : j + 1], i[j : j + 1])[0]
    allowed = 1 + 100 * n * torch.finfo(torch.float32).eps
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in whole)
    assert clipped.sensitivity() == pytest.approx(math.hypot(*max_norm if kind == "groups" else [bound]) / normalize_by)
    for change in (moved, alone):
        assert length(change) <= clipped.sensitivity() * allowed
        if kind == "groups":
            assert all(length([g]) * normalize_by <= own * allowed for g, own in zip(change, max_norm, strict=True))
    assert optree.tree_structure(found) == optree.tree_structure(max_norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "mlp over positions", "mixed", "conv2d grouped", "used twice"])
def test_one_sample_moves_the_sum_by_no_more_than_its_bound_in_any_precision(name, dtype):
    """The sums are in single precision, whatever that of the model."""
    p = BY_NAME[name]
    args = optree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, p.args)
    for bound in (middle(p), middle(p) / 1000):
        clipped = clipped_grad(p.loss, bound)
        whole = clipped(*args)
        for j in range(p.n):
            moved = length(minus(whole, clipped(*args, is_padding=only(p.n, j))))
            assert moved <= bound * (1 + 100 * p.n * torch.finfo(torch.float32).eps)
            # A gradient that is longer gives all of it.
            if norms(p)[j] > 1.5 * bound:
                assert moved >= bound * (1 - 100 * p.n * torch.finfo(torch.float32).eps)


@both
@pytest.mark.parametrize("name", CLIPPED)
def test_one_sample_less(name, package):
    """Not masked but gone: the difference is its own clipped gradient."""
    p = BY_NAME[name]
    clipped = package.clipped_grad(p.loss, middle(p), **p.options)
    whole = clipped(*p.args)
    for j in range(p.n):
        rest = [k for k in range(p.n) if k != j]
        less = clipped(*p.params, *(x[rest] for x in p.args[len(p.params) :]))
        own = optree.tree_map(lambda g, j=j: g[j] * min(1.0, middle(p) / float(norms(p)[j])), p.grads)
        assert_close(minus(whole, less), own)
        assert length(own) <= middle(p) * (1 + 1e-12)


def _generator() -> Any:
    generator = torch.Generator().manual_seed(3)
    return lambda: torch.randn(3, dtype=torch.float64, generator=generator)


SOURCES = {
    "a generator": _generator,
    "numpy": lambda: lambda: torch.as_tensor(np.random.randn(3)),
    "Python": lambda: lambda: torch.tensor([random.gauss(0, 1) for _ in range(3)], dtype=torch.float64),
}


@pytest.mark.parametrize("source", SOURCES)
def test_two_passes_draw_the_same_numbers_from_any_generator(source):
    """Weights that belong to other numbers would let one sample move the sum beyond its bound."""
    x = torch.randn(6, 3, dtype=torch.float64)
    w = torch.zeros(3, dtype=torch.float64)
    for make in (
        lambda fn: per_sample.clipped_grad(fn, 1.0, memory="low", randomness="different"),
        lambda fn: per_sample.weighted_grad(fn, lambda norms: 1 / norms, chunk_size=1, randomness="different"),
        lambda fn: per_sample.weighted_grad(fn, lambda norms: 1 / norms, memory="low", randomness="different"),
    ):
        draw = SOURCES[source]()
        transform = make(lambda w, x, draw=draw: (w * x * draw().exp()).sum() * 1e3)
        for i in range(6):
            torch.testing.assert_close(transform(w, x[i : i + 1]).norm(), torch.ones((), dtype=torch.float64))


def test_a_second_pass_that_draws_other_numbers_is_refused():
    own = np.random.default_rng(0)
    fn = per_sample.clipped_grad(lambda w, x: (w * x * float(own.normal())).sum(), 1.0, memory="low")
    with pytest.raises(per_sample.UnsupportedError, match="other losses when it ran a second time"):
        fn(torch.ones(3), torch.randn(6, 3))
