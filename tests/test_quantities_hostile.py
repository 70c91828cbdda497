"""Programs and samples that would break a clipped sum, or numbers that were right a moment ago."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from per_sample import (
    ArgumentError,
    GaussianProjector,
    NonFiniteWarning,
    _backward,
    clipped_grad,
    grad_gram,
    grad_second_moment,
    per_sample_grad,
    per_sample_grad_dot,
    per_sample_grad_map,
    per_sample_grad_norm,
    per_sample_jacobian,
    projected_grad,
    weighted_grad,
)

MODES: dict[str, dict[str, Any]] = {
    "one pass": {},
    "two passes": {"memory": "low"},
    "normalised": {"automatic": True},
    "chunks": {"chunk_size": 4},
}


def paired(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """The gradient is ``c.T @ x``."""
    return (c * F.linear(x, w)).sum()


def cancelling(scale: float, t: int, o: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nine samples, of which the gradient of number 4 is zero, a difference of two that are huge."""
    torch.manual_seed(0)
    x, c = torch.randn(9, t, i), torch.randn(9, t, o)
    x[4] *= scale
    x[4, 1], c[4, 1] = -x[4, 0], c[4, 0]
    x[4, 2:] = 0
    return torch.zeros(o, i), x, c


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("t", "o", "i"), [(4, 16, 17), (2, 8, 9), (2, 3, 5)])
@pytest.mark.parametrize("scale", [1e5, 1e9, 1e15])
def test_a_sample_whose_gradient_cancels_stays_within_the_bound(scale: float, t: int, o: int, i: int, mode: str) -> None:
    w, x, c = cancelling(scale, t, o, i)
    clipped = clipped_grad(paired, 1.0, **MODES[mode])
    others = [k for k in range(9) if k != 4]
    moved = (clipped(w, x, c) - clipped(w, x[others], c[others])).norm()
    # The sum itself is of length 8 at most, and rounds in float32.
    assert moved <= clipped.sensitivity() * (1 + 1e-5) + 8 * 1e-6


def test_a_compiled_sum_allows_for_the_rounding_that_it_cannot_see() -> None:
    w, x, c = cancelling(1e9, 4, 16, 17)
    clipped = clipped_grad(paired, 1.0)
    compiled = torch.compile(lambda *args: clipped(*args), fullgraph=True, backend="aot_eager", dynamic=False)
    others = [k for k in range(9) if k != 4]
    assert (compiled(w, x, c) - compiled(w, x[others], c[others])).norm() <= 1.0


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_gradient_that_overflows_on_the_way_is_left_out(memory: str) -> None:
    x = torch.tensor([[[3e30] * 8, [-3e30] * 8], [[1.0] * 8, [0.0] * 8]])
    c = torch.full((2, 2, 8), 1e20)
    c[1] = 1
    clipped = clipped_grad(paired, 1.0, return_norms=True, memory=memory)
    with pytest.warns(NonFiniteWarning, match="1 of 2"):
        summed, norms = clipped(torch.zeros(8, 8), x, c)
    torch.testing.assert_close(summed, torch.full((8, 8), 1 / 8))
    assert norms[0].isnan()
    assert norms[1] == 8


def overwriting(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the sum of two layers reaches one of them before the other's hook overwrites it."""
    u = F.linear(y, p["V"]) * 1
    u.register_hook(lambda g: g.mul_(3))
    return (F.linear(x, p["W"]) + u).square().sum()


@pytest.mark.parametrize(
    "quantity",
    [
        lambda fn: clipped_grad(fn, 5.0),
        lambda fn: clipped_grad(fn, 5.0, memory="low"),
        lambda fn: weighted_grad(fn, lambda norms: (5.0 / norms).clamp(max=1.0)),
    ],
    ids=["clipped", "two passes", "weighted"],
)
def test_a_gradient_overwritten_after_it_was_kept(quantity: Any) -> None:
    torch.manual_seed(0)
    p = {"V": torch.randn(7, 4).double(), "W": torch.randn(7, 5).double()}
    x, y = torch.randn(6, 1, 5).double(), torch.randn(6, 1, 4).double()
    expected = {name: torch.zeros_like(w) for name, w in p.items()}
    for k in range(6):
        leaves = {name: w.clone().requires_grad_() for name, w in p.items()}
        grads = dict(zip(leaves, torch.autograd.grad(overwriting(leaves, x[k], y[k]), list(leaves.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        for name, g in grads.items():
            expected[name] += min(1.0, 5.0 / norm) * g
    torch.testing.assert_close(quantity(overwriting)(p, x, y), expected)


def test_a_masked_dot_leaves_the_other_samples_bit_for_bit() -> None:
    torch.manual_seed(0)
    mask, d = torch.rand(7, 5) > 0.5, torch.randn(7, 5)
    w, x = torch.randn(7, 5), torch.randn(6, 3, 5)
    dots = per_sample_grad_dot(lambda w, x: F.linear(x, torch.where(mask, w, 0.0)).tanh().square().sum(), d)
    before = dots(w, x)
    x[3] = torch.nan
    after = dots(w, x)
    assert after[3].isnan()
    assert torch.equal(before[[0, 1, 2, 4, 5]], after[[0, 1, 2, 4, 5]])


@pytest.mark.parametrize("bound", [torch.nan, -1.0, 0.0])
def test_a_bound_in_a_tensor_is_looked_at(bound: float) -> None:
    with pytest.raises(ArgumentError, match="max_norm"):
        clipped_grad(paired, torch.tensor(bound))
    with pytest.raises(ArgumentError, match="finite"):
        clipped_grad(paired, torch.tensor(torch.inf), automatic=True)


def test_a_jacobian_through_a_reentrant_checkpoint() -> None:
    w, x = torch.randn(3, 2), torch.randn(5, 2)

    def outputs(w: Tensor, x: Tensor) -> Tensor:
        return checkpoint(lambda x, w: (w @ x).tanh(), x, w, use_reentrant=True)

    torch.testing.assert_close(per_sample_jacobian(outputs)(w, x), vmap(jacrev(lambda w, x: (w @ x).tanh()), (None, 0))(w, x))


@pytest.mark.parametrize("n", [0, 5])
def test_a_jacobian_of_nothing(n: int) -> None:
    assert per_sample_jacobian(lambda w, x: (w @ x)[:0])(torch.randn(3, 2), torch.randn(n, 2)).shape == (n, 0, 3, 2)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an op returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.dtype.itemsize)
        return out


SAMPLES, POSITIONS, OUT, IN = 16, 3, 64, 48


@pytest.mark.parametrize(
    "quantity",
    [
        per_sample_grad_norm,
        lambda fn: clipped_grad(fn, 0.1),
        lambda fn: clipped_grad(fn, 0.1, memory="low"),
        lambda fn: weighted_grad(fn, torch.ones(SAMPLES)),
        grad_gram,
        lambda fn: per_sample_grad_dot(fn, {"w": torch.ones(OUT, IN), "v": torch.ones(OUT, OUT)}),
    ],
    ids=["norm", "clipped", "clipped low", "weighted", "gram", "dot"],
)
def test_no_gradient_is_formed_where_the_factors_serve(quantity: Any) -> None:
    torch.manual_seed(0)
    params = {"w": torch.randn(OUT, IN), "v": torch.randn(OUT, OUT)}
    transformed = quantity(lambda p, x: F.linear(F.linear(x, p["w"]).tanh(), p["v"]).square().sum())
    with Largest() as largest:
        transformed(params, torch.randn(SAMPLES, POSITIONS, IN))
    assert 0 < largest.numel < SAMPLES * OUT * IN / 2


@pytest.mark.parametrize("last", [False, True], ids=["the first leaf", "the last leaf"])
def test_a_leaf_is_reduced_and_gone_before_the_next_arrives(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output's gradient of each layer, held by its factor alone, dies when the leaf is reduced, unless all of them are small."""
    monkeypatch.setattr(_backward, "LARGE", 4 * 5 * 36 - 1)
    params = [torch.randn(6, 6) for _ in range(5)]
    alive: list[int] = []
    operands: list[Any] = []

    def look(grads: Any) -> Tensor:
        gc.collect()
        alive.append(sum(reference() is not None for reference in operands))
        operands.append(weakref.ref(grads.factor.left.untyped_storage()))
        return grads.sq_norm()

    def fn(ws: list[Tensor], x: Tensor) -> Tensor:
        for w in ws:
            x = F.linear(x, w).tanh()
        return x.square().sum()

    per_sample_grad_map(fn, look)(params, torch.randn(4, 2, 6))
    assert len(alive) == 5
    assert alive[-1 if last else 0] == 0


def test_the_gradients_of_a_jacobian_are_those_of_its_outputs() -> None:
    w, x = torch.randn(3, 2).double(), torch.randn(5, 2).double()
    rows = [per_sample_grad(lambda w, x, k=k: (w @ x).tanh()[k])(w, x) for k in range(3)]
    torch.testing.assert_close(per_sample_jacobian(lambda w, x: (w @ x).tanh())(w, x), torch.stack(rows, 1))


@pytest.mark.parametrize("seed", [2**62 + 1, -7])
def test_a_long_seed_gives_the_same_projection_where_it_is_compiled(seed: int) -> None:
    w, x = torch.randn(5, 4), torch.randn(3, 2, 5)
    projected = projected_grad(lambda w, x: (x @ w).sin().sum(), GaussianProjector(6, seed=seed))
    compiled = torch.compile(lambda w, x: projected(w, x), fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(w, x), projected(w, x))


def named(p: dict[str, Tensor], d: dict[str, Tensor]) -> Tensor:
    return (F.linear(d["x"], p["a"]) + p["b"]).square().sum() * d["s"][0]


@pytest.mark.parametrize("compiled", [False, True])
def test_bounds_and_directions_go_by_key_whatever_the_order(compiled: bool) -> None:
    torch.manual_seed(0)
    p, d = {"b": torch.randn(7), "a": torch.randn(7, 5)}, {"x": torch.randn(5, 6), "s": torch.randn(6, 2)}
    in_dims = (None, {"s": 0, "x": 1})

    def run(f: Any) -> Any:
        return (torch.compile(lambda *args: f(*args), fullgraph=True, backend="aot_eager", dynamic=False) if compiled else f)(p, d)

    grads = {name: torch.stack([torch.func.grad(named)(p, {"x": d["x"][:, k], "s": d["s"][k]})[name] for k in range(6)]) for name in p}
    norms = {name: g.flatten(1).norm(dim=1) for name, g in grads.items()}
    bounds = {"a": 1.0, "b": 0.5}
    summed, found = run(clipped_grad(named, bounds, in_dims=in_dims, return_norms=True))
    torch.testing.assert_close(found, norms)
    for name, g in grads.items():
        torch.testing.assert_close(summed[name], torch.tensordot((bounds[name] / norms[name]).clamp(max=1), g, 1))
    direction = {"a": torch.randn(7, 5), "b": torch.randn(7)}
    dots = sum((grads[name] * direction[name]).flatten(1).sum(1) for name in p)
    torch.testing.assert_close(run(per_sample_grad_dot(named, direction, in_dims=in_dims)), dots)


def test_squares_of_a_scaled_weight_are_taken_after_the_scale() -> None:
    torch.manual_seed(0)
    s, x = torch.rand(4, 3) * 1e-25, torch.randn(5, 2, 3)
    moment = grad_second_moment(lambda w, x: F.linear(x, w * s).sum() * 1e30)(torch.randn(4, 3), x)
    expected = (x.double().sum(1).unsqueeze(1) * s.double() * 1e30).square().mean(0)
    torch.testing.assert_close(moment.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bound", [1.0, 1e-3, 1e-7])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_weights_next_to_zero_are_rounded_down(bound: float, memory: str) -> None:
    x = torch.linspace(1e38, 3e38, 64).unsqueeze(1)
    clipped = clipped_grad(lambda w, x: (w * x).sum(), bound, memory=memory)
    for k in range(64):
        assert clipped(torch.zeros(1), x[k : k + 1]).norm().double() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_scale_that_is_not_finite_leaves_zeros(memory: str) -> None:
    s = torch.ones(4, 3)
    s[0, 0] = torch.inf
    clipped = clipped_grad(lambda w, x: F.linear(x, w * s).sum(), 1.0, memory=memory)
    with pytest.warns(NonFiniteWarning, match="5 of 5"):
        assert not clipped(torch.randn(4, 3), torch.randn(5, 2, 3)).any()


@pytest.mark.parametrize("grad_mode", [False, True], ids=["plain", "parameters that require grad"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e20), (torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float64, 1e200)])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_huge_input_without_a_gradient(memory: str, dtype: torch.dtype, size: float, grad_mode: bool) -> None:
    """The squares of a dead unit's inputs leave the range; its gradient is zero all the same."""
    torch.manual_seed(0)
    w, x = torch.rand(7, 5).to(dtype).requires_grad_(grad_mode), torch.rand(6, 2, 5).to(dtype)
    x[2] = -size

    def dead(w: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, w).relu().sum()

    summed, norms = clipped_grad(dead, 0.7, return_norms=True, memory=memory)(w, x)
    others = [0, 1, 3, 4, 5]
    assert norms[2] == 0
    torch.testing.assert_close(summed, clipped_grad(dead, 0.7, memory=memory)(w, x[others]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("company", [1.0, 1e20])
def test_a_norm_does_not_depend_on_the_company(company: float) -> None:
    w, x = torch.rand(7, 5), torch.rand(6, 2, 5)
    x[2], x[3] = -1e20, company
    norms = per_sample_grad_norm(lambda w, x: F.linear(x, w).relu().sum())(w, x)
    assert norms[2] == 0
    assert norms.isfinite().all()


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_cancelling_sample_beside_one_that_is_left_out(memory: str) -> None:
    w, x, c = cancelling(1e9, 4, 16, 17)
    x[7] = torch.nan
    clipped = clipped_grad(paired, 1.0, memory=memory)
    others = [k for k in range(9) if k not in (4, 7)]
    with pytest.warns(NonFiniteWarning, match="1 of 9"):
        summed = clipped(w, x, c)
    assert (summed - clipped(w, x[others], c[others])).norm() <= clipped.sensitivity() * (1 + 1e-5) + 8 * 1e-6
