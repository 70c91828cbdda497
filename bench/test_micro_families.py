"""Micro-benchmarks of each family of rules: `pytest bench --benchmark-only -k families`. The answer is checked before the time is taken.

A group holds one family, its rows the methods: the gradients summed over samples (plain), `vmap(grad)`, this library.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.micro import assert_close
from bench.micro_families import FAMILIES, Family, Params
from per_sample import per_sample_grad

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.benchmark(disable_gc=True, warmup="on")]


def _plain(family: Family, params: Params, data: tuple[Tensor, ...]) -> Params:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    return dict(zip(leaves, torch.autograd.grad(family.total(leaves, *data), list(leaves.values())), strict=True))


def _vmap(family: Family, params: Params, data: tuple[Tensor, ...]) -> Params:
    grads: Params = torch.func.vmap(torch.func.grad(family.loss), in_dims=(None, *[0] * len(data)))(params, *data)
    return grads


def _ours(family: Family, params: Params, data: tuple[Tensor, ...]) -> Params:
    grads: Params = per_sample_grad(family.loss)(params, *data)
    return grads


METHODS = {"plain": _plain, "vmap": _vmap, "ours": _ours}


def _loop(family: Family, params: Params, data: tuple[Tensor, ...]) -> list[Params]:
    """The oracle: each sample by itself, in float64."""
    params = {name: p.double() for name, p in params.items()}
    return [_plain(family, params, tuple(x[None].double() for x in sample)) for sample in zip(*data, strict=True)]


def _checked(family: Family, method: str, small: bool) -> tuple[Params, tuple[Tensor, ...]]:
    params, data = family.make(3 if small else family.n, small)
    samples = _loop(family, params, data)
    for name, got in METHODS[method](family, params, data).items():
        want = torch.stack([grads[name] for grads in samples])
        assert_close(got, want.sum(0) if method == "plain" else want)
    return params, data


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families(benchmark: Any, family: Family, method: str) -> None:
    params, data = _checked(family, method, small=False)
    benchmark.group = family.name
    benchmark(METHODS[method], family, params, data)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_small(family: Family) -> None:
    """Fast, without a clock: each method on one small shape."""
    for method in METHODS:
        _checked(family, method, small=True)
