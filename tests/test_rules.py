"""Every rule against a loop of plain autograd and against vmap(grad), with the route and the factor it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from case import Case, real
from cases import CASES
from oracle import loop_grads
from per_sample import _arguments, _run, per_sample_grad_and_value, reference
from per_sample._errors import BatchNormError
from per_sample._record import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

SLOW_ROUTES = ("fallback", "loop")


def recorded(case: Case, params: Any, samples: Any) -> tuple[_run.Outcome, dict[str, set[str]]]:
    """One run, with the routes that each op took."""
    recorder = Recorder()
    program = _run.Program(case.loss, {}, False, case.keep_batch_dim, "error")
    arguments = _arguments.read((params, *samples), 0, None)
    outcome = _run.run(program, arguments, arguments.leaves, arguments.n, lambda number, factor, functional: factor, recorder)
    routes: dict[str, set[str]] = {}
    for op, route in recorder.rows:
        routes.setdefault(op, set()).add(route)
    return outcome, routes


def check_values(case: Case, n: int) -> None:
    params, samples = case.draw(n)
    transform = per_sample_grad_and_value(case.loss, keep_batch_dim=case.keep_batch_dim)
    grads, values = transform(params, *samples)
    expected, expected_values = loop_grads(case.loss, params, samples, keep_batch_dim=case.keep_batch_dim)
    torch.testing.assert_close(values, expected_values.to(values.dtype))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_a_loop_of_plain_autograd(case: Case, n: int) -> None:
    check_values(case, n)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", [c for c in CASES if c.reference], ids=lambda c: c.name)
def test_against_vmap_of_grad(case: Case) -> None:
    params, samples = case.draw(3)
    options = {"keep_batch_dim": case.keep_batch_dim}
    grads, values = per_sample_grad_and_value(case.loss, **options)(params, *samples)
    expected, expected_values = reference.per_sample_grad_and_value(case.loss, **options)(params, *samples)
    torch.testing.assert_close(values, expected_values)
    torch.testing.assert_close(list(grads), list(expected))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_routes_and_factors(case: Case) -> None:
    params, samples = case.draw(3)
    outcome, routes = recorded(case, params, samples)
    slow = {op for op, taken in routes.items() if taken & set(SLOW_ROUTES)}
    assert slow <= case.loose
    for op, route in case.routes.items():
        assert routes.get(op) == {route}, op
    if case.factors:
        assert tuple(type(f).__name__ for f in outcome.results) == case.factors


def test_names_are_distinct() -> None:
    names = [c.name for c in CASES]
    assert len(names) == len(set(names))


@settings(max_examples=40, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    bias=st.booleans(),
    keep=st.booleans(),
    n=st.integers(1, 4),
)
def test_linear_of_any_rank(lead: list[int], sizes: tuple[int, int], bias: bool, keep: bool, n: int) -> None:
    width_out, width_in = sizes
    params = (real(width_out, width_in), real(width_out)) if bias else (real(width_out, width_in),)
    fn = torch.nn.functional.linear
    case = Case("linear", lambda p, x: fn(x, *p), params, (real(*lead, width_in),), keep_batch_dim=keep)
    check_values(case, n)


def _train(x: torch.Tensor, p: Any) -> torch.Tensor:
    return torch.nn.functional.batch_norm(x, torch.zeros(6).double(), torch.ones(6).double(), *p, training=True)


def _legit(x: torch.Tensor, p: Any) -> torch.Tensor:
    stats = (torch.zeros(6).double(), torch.ones(6).double())
    return torch.ops.aten._native_batch_norm_legit_functional(x, *p, *stats, True, 0.1, 1e-5)[0]


def _update(x: torch.Tensor, p: Any) -> torch.Tensor:
    stats = (torch.zeros(6).double(), torch.ones(6).double())
    return torch.ops.aten._batch_norm_with_update_functional(x, *p, *stats, 0.1, 1e-5)[0]


@pytest.mark.parametrize("form", [_train, _legit, _update])
def test_batch_norm_in_training_mode_is_refused(form: Any) -> None:
    case = Case("bn", lambda p, x: form(x, p), (real(6), real(6)), (real(2, 6, 4),))
    params, samples = case.draw(3)
    with pytest.raises(BatchNormError, match=r"mixes\s+samples.*eval\(\).*GroupNorm"):
        per_sample_grad_and_value(case.loss)(params, *samples)
