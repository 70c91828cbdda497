"""`F.linear` as one op: where it is taken whole, where its single ops must be seen, and that both give the loop's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from per_sample import UnsupportedError, explain, per_sample_grad, per_sample_grad_norm
from tree_oracle import assert_close, loop

# torch's derivatives in forward mode still script their decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

D = torch.float64
N, T, IN, OUT = 3, 4, 5, 2
W = torch.randn(OUT, IN, dtype=D, generator=torch.Generator().manual_seed(0))
B = torch.randn(OUT, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, T, IN, dtype=D, generator=torch.Generator().manual_seed(2))
PARAMS = {"w": W, "b": B}
WHOLE = {"aten.linear.default", "aten.linear_backward.default"}
SINGLE = {"aten.addmm.default", "aten.mm.default"}


def dense(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"], p["b"]).tanh().sum()


def ops(fn: Callable[..., Tensor]) -> set[str]:
    return {row.op for row in explain(fn)(PARAMS, X).rows}


def check(fn: Callable[..., Tensor]) -> None:
    assert_close(per_sample_grad(fn)(PARAMS, X), loop(fn, (0,), (None, 0))(PARAMS, X)[0])


def closed_over(p: Any, x: Tensor) -> Tensor:
    return (F.linear(F.linear(x, W.t() @ W), p["w"]) * p["b"]).tanh().sum()


def as_keywords(p: Any, x: Tensor) -> Tensor:
    return F.linear(bias=p["b"], input=x, weight=p["w"]).tanh().sum()


def tied(p: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["w"].t()).sin().sum()


def row(p: Any, x: Tensor) -> Tensor:
    return F.linear(x[1], p["w"], p["b"]).tanh().sum()


def strided(p: Any, x: Tensor) -> Tensor:
    return F.linear(x.t().contiguous().t()[::2], p["w"], p["b"]).t().tanh().sum()


def written_afterwards(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"], p["b"]).mul_(2).tanh().sum()


def differentiated_inside(p: Any, x: Tensor) -> Tensor:
    """The backward pass of the linear layer is differentiated again."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.linear(x, p["w"], p["b"]).tanh().sum(), x, create_graph=True)
    return (g.sin() * x).sum()


def gradient_inside(p: Any, x: Tensor) -> Tensor:
    """Weight gradients of a pass that is not the transform's are per-sample tensors like others."""
    w = p["w"].detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(F.linear(x, w, p["b"].detach()).tanh().sum(), w)
    return (g * p["w"]).sum() + p["b"].sum()


@pytest.mark.parametrize(
    "fn", [dense, closed_over, as_keywords, tied, row, strided, written_afterwards, differentiated_inside, gradient_inside]
)
def test_taken_whole(fn: Callable[..., Tensor]) -> None:
    check(fn)
    assert "aten.linear.default" in ops(fn)
    assert "aten.addmm.default" not in ops(fn)


def test_two_ops_instead_of_eight() -> None:
    def single(p: Any, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return dense(p, x)

    counts = [sum(row.count for row in explain(fn)(PARAMS, X).rows if row.op.startswith("aten")) for fn in (dense, single)]
    assert counts[0] <= counts[1] - 6


def per_sample_weight(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p["w"] * x.sum(), p["b"]).tanh().sum()


def in_autocast(p: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, p["w"], p["b"]).double().tanh().sum()


def counted(p: Any, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        out = F.linear(x, p["w"], p["b"])
    assert counter.get_total_flops() > 0
    return out.tanh().sum()


def checkpointed(p: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda x: F.linear(x.sin(), p["w"], p["b"]).tanh(), x, use_reentrant=False).sum()


def packed(p: Any, x: Tensor) -> Tensor:
    with save_on_cpu():
        return F.linear(x, p["w"], p["b"]).tanh().sum()


def forward_mode(p: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = F.linear(forward_ad.make_dual(x, x.cos()), p["w"], p["b"])
        return forward_ad.unpack_dual(out).tangent.tanh().sum()


def functorch_inside(p: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: F.linear(row, p["w"], p["b"]))(x).tanh().sum()


def functorch_grad_inside(p: Any, x: Tensor) -> Tensor:
    return torch.func.grad(lambda s: (F.linear(x, p["w"], p["b"]) * s).tanh().sum())(x.sum())


SEEN = [per_sample_weight, in_autocast, counted, checkpointed, packed, forward_mode, functorch_inside, functorch_grad_inside]


@pytest.mark.parametrize("fn", SEEN)
def test_single_ops_where_somebody_would_see_them(fn: Callable[..., Tensor]) -> None:
    check(fn)
    assert "aten.linear.default" not in ops(fn)


class Doubled(TorchFunctionMode):
    """Makes `F.linear` another function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is F.linear else out


@pytest.mark.parametrize("make", [per_sample_grad, per_sample_grad_norm], ids=["gradients", "norms"])
def test_a_mode_around_the_transform_sees_the_function(make: Any) -> None:
    def twice(p: Any, x: Tensor) -> Tensor:
        return (2 * F.linear(x, p["w"], p["b"])).tanh().sum()

    with Doubled():
        found = make(dense)(PARAMS, X)
    assert_close(found, make(twice)(PARAMS, X))


@pytest.mark.parametrize("make", [per_sample_grad, per_sample_grad_norm], ids=["gradients", "norms"])
def test_the_gradient_of_a_bias_is_its_own(make: Any) -> None:
    """Another branch goes on to write into the gradient that the bias received."""

    def fn(p: Any, x: Tensor) -> Tensor:
        h = (x @ W.t() * p["b"]).tanh()
        h.register_hook(lambda g: g.mul_(3))
        return ((F.linear(x, p["w"], p["b"]) + h) * torch.arange(1.0, OUT + 1, dtype=D)).square().sum()

    rows = loop(fn, (0,), (None, 0))(PARAMS, X[:, 0])[0]
    wanted = rows if make is per_sample_grad else torch.cat([g.flatten(1) for g in rows.values()], 1).norm(dim=1)
    assert_close(make(fn)(PARAMS, X[:, 0]), wanted)


def test_autocast_around_the_backward_pass_alone() -> None:
    """Torch's own products are then in half precision, and so are these."""

    def fn(w: Tensor, x: Tensor) -> Tensor:
        out = F.linear(x, w).tanh().sum()
        with torch.autocast("cpu", torch.bfloat16):
            (g,) = torch.autograd.grad(out, w, create_graph=False)
        return (g * w).sum()

    w, x = W.float(), X.float()
    assert_close(per_sample_grad(fn)(w, x), loop(fn, (0,), (None, 0))(w, x)[0])


def test_a_mode_left_open_by_the_program_stays_open() -> None:
    left = Doubled()

    def fn(p: Any, x: Tensor) -> Tensor:
        left.__enter__()
        return (x @ p["w"].t() + p["b"]).tanh().sum()

    per_sample_grad(fn)(PARAMS, X)
    assert _get_current_function_mode_stack() == [left]
    left.__exit__(None, None, None)
    assert _get_current_function_mode_stack() == []


def test_a_mode_of_the_caller_closed_by_the_program_is_closed() -> None:
    outer, left = Doubled(), Doubled()

    def fn(p: Any, x: Tensor) -> Tensor:
        left.__exit__(None, None, None)
        return (x @ p["w"].t() + p["b"]).tanh().sum()

    with outer:
        left.__enter__()
        per_sample_grad(fn)(PARAMS, X)
        assert _get_current_function_mode_stack() == [outer]
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize(("positions", "width", "outputs"), [(0, IN, OUT), (T, 0, OUT), (T, IN, 0)])
def test_sizes_of_zero(positions: int, width: int, outputs: int) -> None:
    params = {"w": torch.ones(outputs, width, dtype=D), "b": torch.ones(outputs, dtype=D)}
    x = torch.ones(N, positions, width, dtype=D)
    assert_close(per_sample_grad(dense)(params, x), loop(dense, (0,), (None, 0))(params, x)[0])


def test_derivatives_of_the_caller() -> None:
    """Whoever differentiates again meets the single ops, which have derivatives."""
    direction = torch.linspace(-1, 1, N * OUT * IN, dtype=D).view(N, OUT, IN)

    def summed(w: Tensor) -> Tensor:
        return (per_sample_grad(dense)({"w": w, "b": B}, X)["w"] * direction).sum()

    def by_loop(w: Tensor) -> Tensor:
        rows = [torch.func.grad(dense)({"w": w, "b": B}, x)["w"] for x in X]
        return (torch.stack(rows) * direction).sum()

    assert_close(torch.func.grad(summed)(W), torch.func.grad(by_loop)(W))
    w = W.clone().requires_grad_()
    assert_close(torch.autograd.grad(summed(w), w), [torch.func.grad(by_loop)(W)])


def test_a_write_into_what_was_saved() -> None:
    def fn(p: Any, x: Tensor) -> Tensor:
        h = x.sin()
        out = F.linear(h, p["w"], p["b"]).tanh().sum()
        h.mul_(2)
        return out

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        per_sample_grad(fn)(PARAMS, X)


@pytest.mark.parametrize("bad", [{"w": W[:, 1:]}, {"b": torch.cat((B, B))}, {"w": W.float()}, {"w": W[None]}])
def test_what_torch_refuses_is_refused(bad: dict[str, Tensor]) -> None:
    with pytest.raises((RuntimeError, UnsupportedError)):
        per_sample_grad(dense)(PARAMS | bad, X)


def test_weights_that_require_grad_outside() -> None:
    """A closed-over weight of the caller's keeps its derivative."""
    outer = W.clone().requires_grad_()
    grads = per_sample_grad(lambda b, x: (F.linear(x, outer) * b).tanh().sum())(B, X)
    assert_close(grads, loop(lambda b, x: (F.linear(x, W) * b).tanh().sum(), (0,), (None, 0))(B, X)[0])
    assert torch.autograd.grad(grads.sum(), outer)[0].abs().sum() > 0
