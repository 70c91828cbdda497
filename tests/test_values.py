"""Python values of per-sample tensors: right where the samples agree, split where that is allowed, refused elsewhere."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from per_sample import DataDependentError, explain, options, per_sample_grad, per_sample_grad_and_value
from tree_oracle import assert_close, loop

D = torch.float64
N = 6
W = torch.randn(4, 3, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 3, dtype=D, generator=torch.Generator().manual_seed(2))
POSITIVE = X.abs() + 0.5


def by_sum(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).square().sum() if x.sum() > 0 else (w @ x).sin().sum()


def by_mask(w: Tensor, x: Tensor) -> Tensor:
    kept = x > 0
    rows = torch.nonzero(kept)
    return w[:, kept].square().sum() + x[kept].sum() * w.sum() + rows.sum() * w[0, 0] + torch.masked_select(x, kept).prod() * w[1].sum()


def by_selection(w: Tensor, x: Tensor) -> Tensor:
    return torch.masked_select(w * x, x > 0).sin().sum()


def by_several_indices(w: Tensor, x: Tensor) -> Tensor:
    even, kept = torch.arange(4) % 2 == 0, x > 0
    out = (w * x).clone()
    out[1, kept] = w[0, 0] * 2
    out[torch.arange(4)[:, None], kept.nonzero()[None, :, 0]] *= w[3, 2]
    return out.square().sum() + out[even][:, kept].prod()


def by_unique(w: Tensor, x: Tensor) -> Tensor:
    return (w.sum() * torch.unique((x * 2).round())).square().sum()


def by_number(w: Tensor, x: Tensor) -> Tensor:
    steps = int(x.abs().sum().round())
    out = w
    for _ in range(steps):
        out = out.sin() * x
    return out.sum()


def by_list(w: Tensor, x: Tensor) -> Tensor:
    return sum((row.sum() for row, keep in zip(w, (x > 0).tolist(), strict=False) if keep), w.sum() * 0)


BRANCHES = {f.__name__: f for f in (by_sum, by_mask, by_selection, by_several_indices, by_unique, by_number, by_list)}


@pytest.mark.parametrize("name", BRANCHES)
def test_samples_of_different_values_run_apart_where_that_is_allowed(name):
    fn = BRANCHES[name]
    expected = loop(fn, (0,), (None, 0))(W, X)[0]
    with options(split_batch=True):
        grads, values = per_sample_grad_and_value(fn)(W, X)
        assert explain(fn)(W, X).runs > 1
        assert_close(per_sample_grad(fn, chunk_size=4)(W, X), expected)
    assert_close(grads, expected)
    assert_close(values, torch.stack([fn(W, x) for x in X]))
    with pytest.raises(DataDependentError, match="split_batch=True"):
        per_sample_grad(fn)(W, X)


def test_code_that_is_installed_is_not_to_be_changed(tmp_path, monkeypatch):
    place = tmp_path / "site-packages" / "somebodys.py"
    place.parent.mkdir()
    place.write_text("def loss(w, x):\n    return (w * x).sum() if x.sum() > 0 else w.sum()\n")
    monkeypatch.syspath_prepend(str(place.parent))
    with pytest.raises(DataDependentError, match=r"somebodys.py, line 2 .*split_batch=True.*Use `torch.where`"):
        per_sample_grad(importlib.import_module("somebodys").loss)(W, X)
    with pytest.raises(DataDependentError, match=r"test_values.py, .*Use `torch.where`.*split_batch=True"):
        per_sample_grad(by_sum)(W, X)


@pytest.mark.parametrize("name", ["by_sum", "by_mask", "by_list"])
def test_values_on_which_the_samples_agree_are_values(name):
    fn = BRANCHES[name]
    assert_close(per_sample_grad(fn)(W, POSITIVE), loop(fn, (0,), (None, 0))(W, POSITIVE)[0])
    assert explain(fn)(W, POSITIVE).runs == 1


def test_a_check_of_the_whole_batch_in_the_forward():
    def fn(w: Tensor, x: Tensor) -> Tensor:
        h = w @ x
        if not x.isfinite().all() or torch.isnan(h).any():
            raise ValueError("not finite")
        assert torch.allclose(h, h + 0)
        assert torch.equal(x, x.clone())
        return h.square().sum()

    assert_close(per_sample_grad(fn)(W, X), loop(fn, (0,), (None, 0))(W, X)[0])


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_single_sample_always_agrees_with_itself(chunk_size):
    if chunk_size == 1:
        assert_close(per_sample_grad(by_sum, chunk_size=1)(W, X), loop(by_sum, (0,), (None, 0))(W, X)[0])
    else:
        with pytest.raises(DataDependentError):
            per_sample_grad(by_sum, chunk_size=2)(W, X)


def test_a_refusal_that_the_function_catches_still_counts():
    def fn(w: Tensor, x: Tensor) -> Tensor:
        try:
            keep = bool(x.sum() > 0)
        except BaseException:
            keep = True
        return (w @ x).square().sum() if keep else (w @ x).sum()

    with options(split_batch=True):
        assert_close(per_sample_grad(fn)(W, X), loop(by_sum_else_linear, (0,), (None, 0))(W, X)[0])


def by_sum_else_linear(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).square().sum() if x.sum() > 0 else (w @ x).sum()


def test_auxiliary_values_come_back_in_order():
    def fn(w: Tensor, x: Tensor, i: Tensor) -> Any:
        return by_sum(w, x), (i, x * 2)

    with options(split_batch=True):
        _, (number, twice) = per_sample_grad(fn, has_aux=True)(W, X, torch.arange(N))
    assert number.tolist() == list(range(N))
    assert_close(twice, 2 * X)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_numbers_and_groups(randomness):
    def fn(w: Tensor, x: Tensor) -> Any:
        noise = torch.rand(3, dtype=D)
        return by_sum(w, x), noise

    with options(split_batch=True):
        _, noise = per_sample_grad(fn, has_aux=True, randomness=randomness)(W, X)
    assert len({tuple(row) for row in noise.tolist()}) == (N if randomness == "different" else 1)


def test_not_a_number_agrees_with_itself_and_zero_not_with_minus_zero():
    same = torch.full((N,), float("nan"), dtype=D)
    assert_close(per_sample_grad(lambda w, x: w.sum() if x.item() != x.item() else w.prod())(W, same), torch.ones(N, 4, 3, dtype=D))
    signs = torch.tensor([0.0, -0.0], dtype=D)
    with pytest.raises(DataDependentError):
        per_sample_grad(lambda w, x: w.sum() * np.copysign(1.0, x.item()))(W, signs)


def test_numbers_strings_lists_and_arrays():
    k = torch.full((N,), 2)

    def fn(w: Tensor, x: Tensor, k: Tensor) -> Tensor:
        table = {"2": 1.5, "2.00": 0.5}
        assert k.tolist() == 2
        assert np.asarray(k) == 2
        return (w[: int(k)] * x).sum() * table[f"{k}"] + w[k.item()].sum() * table[f"{k.double():.2f}"] + int(k.numpy()) * w[0].prod()

    assert_close(per_sample_grad(fn)(W, X, k), loop(fn, (0,), (None, 0, 0))(W, X, k)[0])


@pytest.mark.parametrize("show", [lambda x: f"{x:.3f}", lambda x: float(x), lambda x: x.tolist(), lambda x: np.asarray(x.detach())])
def test_values_on_which_the_samples_differ_are_refused(show):
    with pytest.raises(DataDependentError):
        per_sample_grad(lambda w, x: (w @ x).sum() + len(str(show(x.sum()))))(W, X)


def test_a_tensor_that_is_only_printed_shows_what_it_is():
    shown = []

    def fn(w: Tensor, x: Tensor) -> Tensor:
        shown.append(f"{x.sum()}")
        return (w @ x).sum()

    per_sample_grad(fn)(W, X)
    assert shown == ["Batched(n=6, shape=[], dtype=torch.float64)"]


def test_values_are_not_at_hand_under_vmap():
    with pytest.raises(DataDependentError, match="vmap"):
        torch.vmap(lambda x: per_sample_grad(by_sum)(W, x))(X.expand(2, N, 3))
