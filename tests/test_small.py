"""Small gradients are formed and reduced side by side; the numbers are those of the loop all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import per_sample
import tree_oracle
from per_sample import NonFiniteWarning, _backward, clipped_grad, per_sample_grad_norm, weighted_grad
from per_sample.quantities import side_by_side
from programs import PROGRAMS
from quantity_table import QUANTITIES

SIZES_AS_THEY_ARE = True

D = torch.float64
N, IN, OUT = 4, 5, 3
_NAMES = ("norm", "weighted", "clipped", "two passes", "clipped by leaf")
CHOSEN = [quantity for quantity in QUANTITIES if quantity.name.startswith(_NAMES)]


def params(dtype: torch.dtype = D) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator, dtype=D).to(dtype) for name, shape in {"w": (OUT, IN), "b": (OUT,)}.items()}


def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, p["w"], p["b"]).tanh().sum()


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of what was formed side by side, of each run."""
    found: list[Any] = []
    original = side_by_side.units

    def seen(leaves: Any, groups: Any) -> Any:
        units = original(leaves, groups)
        found.append([(tuple(unit.found.factor.value.shape), unit.found.dtype) for unit in units if unit.shapes is not None])
        return units

    for module in (per_sample._weighing, per_sample.transforms.norms):
        monkeypatch.setattr(module, "units", seen)
    return found


@pytest.mark.parametrize("quantity", CHOSEN, ids=lambda q: q.name)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_as_a_loop(program: Any, quantity: Any) -> None:
    actual = quantity.make(per_sample, program, **program.options)(*program.args)
    tree_oracle.assert_close(actual, quantity.expected(program))


CALLS = {
    "norm": (per_sample_grad_norm, {}),
    "clipped": (clipped_grad, {"max_norm": 0.5}),
    "weighted": (weighted_grad, {"weights": lambda norms: norms.reciprocal()}),
}


@pytest.mark.parametrize("name", CALLS)
def test_leaves_are_one_row(name: str, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    make, options = CALLS[name]
    x = torch.randn(N, IN, dtype=D)
    small = make(loss, **options)(params(), x)
    monkeypatch.setattr(side_by_side, "SMALL", N * OUT * IN - 1)
    tree_oracle.assert_close(small, make(loss, **options)(params(), x))
    assert rows == [[((N, OUT * IN + OUT), D)], [((N, OUT), D)]]


def test_each_group_has_its_own_row(rows: list[Any]) -> None:
    x = torch.randn(N, IN, dtype=D)
    found = clipped_grad(loss, {"w": 0.5, "b": 0.25})(params(), x)
    assert rows == [[((N, OUT), D), ((N, OUT * IN), D)]]
    twin = per_sample.reference.clipped_grad(loss, {"w": 0.5, "b": 0.25})
    tree_oracle.assert_close(found, twin(params(), x))


@pytest.mark.parametrize("small", [0, side_by_side.SMALL])
@pytest.mark.parametrize("large", [0, _backward.LARGE])
def test_what_is_written_into_a_gradient_later_counts(large: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a bias is the very tensor that the program's own backward pass goes on with, and here doubles."""
    monkeypatch.setattr(_backward, "LARGE", large)
    monkeypatch.setattr(side_by_side, "SMALL", small)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.mul_(2)

    def fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (Doubled.apply(F.linear(x, p["w"])) + p["b"]).tanh().sum()

    x = torch.randn(N, IN, dtype=D)
    wanted = per_sample.per_sample_grad(fn)(params(), x)
    torch.testing.assert_close(per_sample_grad_norm(fn)(params(), x), torch.cat([g.flatten(1) for g in wanted.values()], 1).norm(dim=1))
    tree_oracle.assert_close(wanted, tree_oracle.loop(fn, (0,), (None, 0))(params(), x)[0])


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_samples_that_are_not_finite_are_left_out(chunk_size: int | None, rows: list[Any]) -> None:
    x = torch.randn(N, IN, dtype=D)
    x[1, 2] = torch.inf
    clipped = clipped_grad(lambda p, x: F.linear(x, p["w"], p["b"]).sum(), 0.5, chunk_size=chunk_size)
    with pytest.warns(NonFiniteWarning, match="1 of 4"):
        found = clipped(params(), x)
    assert rows
    tree_oracle.assert_close(found, clipped(params(), x[[0, 2, 3]]))


def test_half_precision_is_summed_in_single(rows: list[Any]) -> None:
    found = clipped_grad(loss, 0.5)(params(torch.bfloat16), torch.randn(N, IN, dtype=torch.bfloat16))
    assert {leaf.dtype for leaf in found.values()} == {torch.float32}
    assert rows == [[((N, OUT * IN + OUT), torch.float32)]]


def test_leaves_of_different_dtypes_stay_apart(rows: list[Any]) -> None:
    mixed = {"w": params()["w"].float(), "b": params()["b"]}

    def own(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (F.linear(x.float(), p["w"]).double() + p["b"]).tanh().sum()

    x = torch.randn(N, IN, dtype=D)
    found = clipped_grad(own, 0.5)(mixed, x)
    assert rows == [[((N, OUT), D), ((N, OUT * IN), torch.float32)]]
    assert (found["w"].dtype, found["b"].dtype) == (torch.float32, torch.float64)
    parts = [clipped_grad(own, 0.5)(mixed, x[i : i + 1]) for i in range(N)]
    for name, value in found.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts))


def test_derivatives_of_the_caller(rows: list[Any]) -> None:
    x = torch.randn(N, IN, dtype=D)

    def total(w: Tensor, transformed: Any) -> Tensor:
        return transformed({"w": w, "b": params()["b"]}, x).sum()

    twin = per_sample.reference.per_sample_grad_norm(loss)
    found, wanted = (torch.func.grad(total)(params()["w"], f) for f in (per_sample_grad_norm(loss), twin))
    torch.testing.assert_close(found, wanted)
    assert rows == [[]]


def test_a_sum_may_be_written_into() -> None:
    x = torch.randn(N, IN, dtype=D)
    first, second = clipped_grad(loss, 0.5)(params(), x), clipped_grad(loss, 0.5)(params(), x)
    first["w"].zero_()
    torch.testing.assert_close(first["b"], second["b"])
