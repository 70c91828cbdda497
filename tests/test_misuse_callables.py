"""Functions and modules of every make: hooked, parametrised, traced, scripted, exported, compiled, partial, bound."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from per_sample import (
    ArgumentError,
    EscapedError,
    SharedWriteError,
    UnsupportedError,
    UnusedArgumentWarning,
    per_sample_grad,
    per_sample_grad_and_value,
)
from tree_oracle import assert_close, loop

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit",
    "ignore:.*weight_norm. is deprecated",
    "ignore:.*isinstance.treespec, LeafSpec",
)

D = torch.float64
N = 4
W = torch.randn(2, 3, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 3, dtype=D, generator=torch.Generator().manual_seed(2))
ONES = torch.ones(3, dtype=D)


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).tanh().square().sum()


class Scaled:
    """A loss in every form that a class can give it."""

    scale = 2.0

    def __call__(self, w: Tensor, x: Tensor) -> Tensor:
        return self.scale * loss(w, x)

    def method(self, w: Tensor, x: Tensor) -> Tensor:
        return self.scale * loss(w, x)

    @classmethod
    def of_class(cls, w: Tensor, x: Tensor) -> Tensor:
        return cls.scale * loss(w, x)

    @staticmethod
    def static(w: Tensor, x: Tensor) -> Tensor:
        return loss(w, x)


class Module(nn.Module):
    """A loss that is a module."""

    def forward(self, w: Tensor, x: Tensor) -> Tensor:
        return loss(w, x)


CALLABLES = {
    "object": Scaled,
    "method": lambda: Scaled().method,
    "class method": lambda: Scaled.of_class,
    "static method": lambda: Scaled.static,
    "partial": lambda: functools.partial(lambda k, w, x: k * loss(w, x), 3.0),
    "partial by keyword": lambda: functools.partial(lambda w, x, k: k * loss(w, x), k=torch.tensor(3.0)),
    "partial of a method": lambda: functools.partialmethod(Scaled.method).__get__(Scaled()),
    "cached": lambda: functools.lru_cache(loss),
    "wrapped": lambda: functools.wraps(loss)(lambda *args: loss(*args)),
    "default argument": lambda: lambda w, x, k=ONES: loss(w, k * x),
    "module": Module,
    "compiled": lambda: torch.compile(loss, backend="eager"),
    "compiled module": lambda: torch.compile(Module(), backend="eager"),
    "scripted": lambda: torch.jit.script(loss),
    "scripted module": lambda: torch.jit.script(Module()),
    "traced": lambda: torch.jit.trace(loss, (W, X[0])),
    "graph module": lambda: torch.fx.symbolic_trace(Module()),
    "exported": lambda: torch.export.export(Module(), (W, X[0])).module(),
    "no grad decorator inside": lambda: lambda w, x: loss(w, x) * torch.no_grad()(loss)(w, x),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", CALLABLES)
def test_callables(name: str, recorded: bool) -> None:
    fn = CALLABLES[name]()
    grads = per_sample_grad(fn)(W.clone().requires_grad_(recorded), X)
    assert_close(grads.detach(), loop(fn, (0,), (None, 0))(W, X)[0])
    if recorded:
        assert grads.requires_grad


def test_functions_of_torch() -> None:
    assert_close(per_sample_grad(torch.dot)(W[0], X), X)
    assert_close(per_sample_grad(functools.partial(F.mse_loss, reduction="sum"))(W[0], X), 2 * (W[0] - X))
    assert_close(per_sample_grad(nn.MSELoss())(W[0], X), 2 * (W[0] - X) / 3)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(D)


def _first_replaced(first: nn.Module) -> nn.Module:
    net = _net()
    net[0] = first.to(D)
    return net


def _hooked(register: str, hook: Any, at: int = 0) -> nn.Module:
    net = _net()
    getattr(net[at], register)(hook)
    return net


def _frozen() -> nn.Module:
    net = _net()
    net[0].weight.requires_grad_(False)
    return net


def _pruned() -> nn.Module:
    net = _net()
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


MODULES = {
    "plain": _net,
    "forward hook": lambda: _hooked("register_forward_hook", lambda m, i, o: 2 * o),
    "forward pre-hook": lambda: _hooked("register_forward_pre_hook", lambda m, i: (2 * i[0],)),
    "backward hook": lambda: _hooked("register_full_backward_hook", lambda m, gi, go: tuple(2 * g for g in gi), 2),
    "backward pre-hook": lambda: _hooked("register_full_backward_pre_hook", lambda m, go: tuple(2 * g for g in go), 2),
    "weight norm": lambda: _first_replaced(parametrizations.weight_norm(nn.Linear(3, 4))),
    "old weight norm": lambda: _first_replaced(nn.utils.weight_norm(nn.Linear(3, 4))),
    "spectral norm": lambda: _first_replaced(parametrizations.spectral_norm(nn.Linear(3, 4))).eval(),
    "orthogonal": lambda: _first_replaced(parametrizations.orthogonal(nn.Linear(3, 4))),
    "pruned": _pruned,
    "frozen": _frozen,
    "graph module": lambda: torch.fx.symbolic_trace(_net()),
    "exported": lambda: torch.export.export(_net(), (X[:1],)).module(),
    "compiled": lambda: torch.compile(_net(), backend="eager"),
    "batch norm in eval": lambda: _first_replaced(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).eval(),
    "deep copy": lambda: copy.deepcopy(_net()),
}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, live: bool) -> None:
    net = MODULES[name]()
    params = {k: p if live else p.detach() for k, p in net.named_parameters()}

    def fn(params: Any, x: Tensor) -> Tensor:
        return functional_call(net, params, (x,)).square().sum()

    if live and name.startswith("backward"):
        with pytest.raises(UnsupportedError, match=r"BackwardHookFunction.*detach"):
            per_sample_grad(fn, keep_batch_dim=True)(params, X)
        return
    grads = per_sample_grad(fn, keep_batch_dim=True)(params, X)
    expected = loop(lambda p, x: fn(p, x[None]), (0,), (None, 0))({k: p.detach() for k, p in params.items()}, X)[0]
    assert_close({k: g.detach() for k, g in grads.items()}, expected)
    assert all(p.grad is None for p in net.parameters())


class Keeper(nn.Module):
    """A module that keeps something of every call."""

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.layer, self.keep = nn.Linear(3, 2).to(D), keep
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(2, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.keep(self, out.detach())
        return out


def _count(m: Any, out: Tensor) -> None:
    m.calls += 1


def _average(m: Any, out: Tensor) -> None:
    m.mean.mul_(0.9).add_(0.1 * out)


def _constant(m: Any, out: Tensor) -> None:
    m.mean.fill_(3.0)


def _assign(m: Any, out: Tensor) -> None:
    m.last = out


@pytest.mark.parametrize(("keep", "refused"), [(_count, False), (_average, True), (_constant, True), (_assign, False)])
def test_modules_that_keep_something_of_every_call(keep: Any, refused: bool) -> None:
    net = Keeper(keep)
    params = {k: p.detach() for k, p in net.named_parameters()}

    def fn(params: Any, x: Tensor) -> Tensor:
        return functional_call(net, params, (x,)).square().sum()

    if refused:
        with pytest.raises(SharedWriteError):
            per_sample_grad(fn)(params, X)
        assert not net.mean.any()
        return
    grads = per_sample_grad(fn)(params, X)
    if keep is _assign:
        with pytest.raises(EscapedError):
            net.last.sum()
    assert_close(grads, loop(fn, (0,), (None, 0))(params, X)[0])


@pytest.mark.parametrize("keep", [_count, _average, _constant])
def test_buffers_passed_in_are_not_modified(keep: Any) -> None:
    net = Keeper(keep)
    params = {k: p.detach() for k, p in net.named_parameters()}
    buffers = {k: b.clone() for k, b in net.named_buffers()}

    def fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(net, (params, buffers), (x,)).square().sum()

    try:
        grads = per_sample_grad(fn, 0, (None, None, 0))(params, buffers, X)
    except SharedWriteError:
        grads = None
    assert not any(b.any() for b in (*buffers.values(), *net.buffers()))
    if grads is not None:
        expected = loop(lambda p, x: fn(p, {k: b.clone() for k, b in buffers.items()}, x), (0,), (None, 0))(params, X)[0]
        assert_close(grads, expected)


def test_modules_that_torch_cannot_call_statelessly() -> None:
    for net in (torch.jit.script(_net()), torch.jit.trace(_net(), X), nn.DataParallel(_net())):
        params = {k: p.detach() for k, p in net.named_parameters()}
        with pytest.raises(RuntimeError, match="stateless"):
            per_sample_grad(lambda p, x, net=net: functional_call(net, p, (x,)).sum())(params, X)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_a_module_called_with_its_own_parameters_gives_zeros_for_those_passed(recorded: bool, grad_mode: bool) -> None:
    net = _net()
    params = {k: p if recorded else p.detach() for k, p in net.named_parameters()}
    with torch.set_grad_enabled(grad_mode), pytest.warns(UnusedArgumentWarning, match="functional"):
        grads = per_sample_grad(lambda p, x: net(x).sum())(params, X)
    assert not any(g.any() for g in grads.values())


def test_a_tensor_from_outside_that_requires_grad_is_no_mistake_by_itself() -> None:
    outside = torch.ones(3, dtype=X.dtype, requires_grad=True)
    assert per_sample_grad(lambda w, x: (w * x * outside).sum())(torch.ones(3, dtype=X.dtype), X).any()
    assert not per_sample_grad(lambda w, x: x.sum())(torch.ones(3, dtype=X.dtype), X).any()


def test_trees_that_are_no_parameters() -> None:
    with pytest.raises(ArgumentError, match=r"Argument 0 .*int64"):
        per_sample_grad(lambda p, x: loss(p["w"], x))({"w": W, "steps": torch.arange(3)}, X)
    assert per_sample_grad(lambda p, x: x.sum())({}, X) == {}
    assert per_sample_grad(lambda p, x: x.sum())(None, X) is None
    grads, values = per_sample_grad_and_value(lambda p, x: x.sum())([], X)
    assert grads == []
    assert_close(values, X.sum(1))


def test_many_samples() -> None:
    n = 300_000
    x = torch.randn(n, dtype=D)
    assert_close(per_sample_grad(lambda w, x: w.sin() * x)(torch.zeros((), dtype=D), x), x)
    shared = torch.ones((), dtype=D).expand(n)
    assert_close(per_sample_grad(lambda w, x: w * x, chunk_size=n // 2)(torch.zeros((), dtype=D), shared), shared)
