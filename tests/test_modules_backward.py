"""A module that is called in the backward pass, too, has the same tensors there; a weight that it reaches past its attributes is told."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from per_sample import (
    SharedWriteError,
    UnsupportedError,
    UnusedArgumentWarning,
    _swapped,
    call_for_per_sample_grads,
    clipped_grad,
    functional,
    load_back,
    per_sample_grad,
    per_sample_grad_norm,
)
from per_sample._batched import Batched

N, D = 4, torch.float64


class Recomputed(torch.autograd.Function):
    """A checkpoint of one's own, which is given the parameters, as in diffusion models."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.run, ctx.x, ctx.params = run, x, params
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        return (None, *torch.autograd.grad(out, [x, *ctx.params], grad))


class Own(torch.autograd.Function):
    """One that asks the module for its parameters when it runs again."""

    @staticmethod
    def forward(ctx: Any, module: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.module, ctx.x = module, x
        with torch.no_grad():
            return module.plain(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.module.plain(x)
        return (None, *torch.autograd.grad(out, [x, *ctx.module.parameters()], grad))


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(5, 6), nn.Linear(6, 5)

    def plain(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "given":
            return Recomputed.apply(self.plain, x, *self.parameters())
        if self.kind == "asked":
            return Own.apply(self, x, *self.parameters())
        out = self.plain(x)
        if self.kind == "hook" and out.requires_grad:

            def again(grad: Tensor) -> Tensor:
                with torch.enable_grad():
                    z = x.detach().requires_grad_()
                    return grad + torch.autograd.grad(self.plain(z), z, grad)[0]

            out.register_hook(again)
        return out


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), Block(kind), Block(kind), nn.Linear(5, 2)).double()


X, Y = torch.randn(N, 3, dtype=D), torch.tensor([0, 1, 1, 0])


def by_loop(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in zip(X, Y, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        for name, grad in zip(found, grads, strict=True):
            found[name].append(grad)
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("grad_mode", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("moved", [0.0, 0.5], ids=["own parameters", "other parameters"])
@pytest.mark.parametrize("kind", ["given", "asked", "hook"])
def test_what_runs_again_has_the_parameters_of_the_call(kind: str, moved: float, grad_mode: bool) -> None:
    model = network(kind)
    loss = functional(model, F.cross_entropy)
    params = {name: p + moved for name, p in loss.params.items()}
    truth = copy.deepcopy(model)
    load_back(truth, params)
    expected = by_loop(truth)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in expected.values()]).norm(dim=0)
    bound = float(norms.median())
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.set_grad_enabled(grad_mode):
        torch.testing.assert_close(per_sample_grad(loss)(params, X, Y), expected)
        torch.testing.assert_close(per_sample_grad_norm(loss)(params, X, Y), norms)
        clipped = clipped_grad(loss, bound, memory="low", chunk_size=3)(params, X, Y)
    torch.testing.assert_close(clipped, {k: torch.einsum("n,n...->...", (bound / norms).clamp(max=1), g) for k, g in expected.items()})
    assert all(type(p) is nn.Parameter and torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["given", "asked", "hook"])
def test_grad_sample_of_what_runs_again(kind: str) -> None:
    model = network(kind)
    expected = by_loop(model)
    F.cross_entropy(call_for_per_sample_grads(model, loss_reduction="sum")(X), Y, reduction="sum").backward()
    torch.testing.assert_close({name: p.grad_sample for name, p in model.named_parameters()}, expected)


def test_two_sets_of_parameters_are_refused_where_either_may_run_again() -> None:
    for kind, refused in (("given", True), ("asked", True), ("hook", False), ("plain", False)):
        loss = functional(network(kind), F.cross_entropy)
        both = lambda p, x, y, loss=loss: loss(p, x, y) + loss({k: 2 * v for k, v in p.items()}, x, y)  # noqa: E731
        if refused:
            with pytest.raises(UnsupportedError, match="several sets of parameters"):
                per_sample_grad(both)(loss.params, X, Y)
            continue
        doubled = {k: 2 * v for k, v in loss.params.items()}
        expected = {k: g + 2 * per_sample_grad(loss)(doubled, X, Y)[k] for k, g in per_sample_grad(loss)(loss.params, X, Y).items()}
        torch.testing.assert_close(per_sample_grad(both)(loss.params, X, Y), expected)
    twice = per_sample_grad(lambda p, x, y: loss(p, x, y) + loss(p, 2 * x, y))(loss.params, X, Y)
    torch.testing.assert_close(twice, {k: a + b for (k, a), b in zip(*pairs(loss), strict=True)})


def test_two_sets_of_parameters_of_a_function_that_calls_no_module() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * grad

    loss = functional(nn.Linear(3, 2).double(), lambda output, y: F.cross_entropy(Doubled.apply(output), y))
    both = per_sample_grad(lambda p, x, y: loss(p, x, y) + loss({k: 2 * v for k, v in p.items()}, x, y))(loss.params, X, Y)
    doubled = per_sample_grad(loss)({k: 2 * v for k, v in loss.params.items()}, X, Y)
    torch.testing.assert_close(both, {k: g + 2 * doubled[k] for k, g in per_sample_grad(loss)(loss.params, X, Y).items()})


def pairs(loss: Any) -> Any:
    grads = per_sample_grad(functional(network("plain"), F.cross_entropy))
    return grads(loss.params, X, Y).items(), grads(loss.params, 2 * X, Y).values()


class Looks(nn.Module):
    """Has something of its own looked at in the backward pass."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(3, 4), nn.Linear(4, 2)

    def look(self, grad: Tensor) -> Tensor:
        return grad * self.a.bias.detach().sum()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.kind == "tensor" and h.requires_grad:
            h.register_hook(self.look)
        if self.kind == "node" and h.requires_grad:
            h.grad_fn.register_hook(lambda to_inputs, to_outputs: (self.look(to_inputs[0]),))
        if self.kind == "prehook" and h.requires_grad:
            h.grad_fn.register_prehook(lambda grads: (self.look(grads[0]),))
        if self.kind == "saved":
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, self.look):
                h = h.sin()
        return self.b(h)


@pytest.mark.parametrize("kind", ["tensor", "node", "prehook", "saved", "in the loss"])
def test_what_is_looked_at_in_the_backward_pass_is_of_the_call(kind: str) -> None:
    torch.manual_seed(0)
    model = Looks(kind).double()
    looked: list[Any] = [model]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if kind == "in the loss" and output.requires_grad:
            output.register_hook(lambda grad: looked[0].look(grad))
        return F.cross_entropy(output, target)

    loss = functional(model, loss_fn)
    params = {name: p + 0.5 for name, p in loss.params.items()}
    truth = copy.deepcopy(model)
    load_back(truth, params)
    found = per_sample_grad(loss)(params, X, Y)
    looked[0] = truth
    for i in range(N):
        grads = torch.autograd.grad(loss_fn(truth(X[i : i + 1]), Y[i : i + 1]), list(truth.parameters()))
        torch.testing.assert_close([g[i] for g in found.values()], list(grads))


def test_hooks_of_two_that_are_bound_to_different_tensors() -> None:
    loss = functional(Looks("tensor").double(), F.cross_entropy)
    one, other = (loss.bind({"a.bias": torch.full((4,), value, dtype=D)}) for value in (1.0, 2.0))
    found = per_sample_grad(lambda p, x, y: one(p, x, y) + other(p, x, y))(one.params, X, Y)
    single = [per_sample_grad(fn)(one.params, X, Y) for fn in (one, other)]
    torch.testing.assert_close(found, {k: single[0][k] + single[1][k] for k in found})


@pytest.mark.parametrize("kind", ["tensor", "node"])
def test_derivatives_of_inputs_where_all_parameters_are_bound(kind: str) -> None:
    model = Looks(kind).double()
    bound = {name: p.detach() + 0.5 for name, p in model.named_parameters()}
    loss = functional(model, F.cross_entropy).bind(bound)
    found = per_sample_grad(loss, argnums=1, in_dims=(None, 0, 0))({}, X, Y)
    load_back(model, bound)
    for i in range(N):
        x = X[i : i + 1].clone().requires_grad_()
        torch.testing.assert_close(found[i], torch.autograd.grad(F.cross_entropy(model(x), Y[i : i + 1]), x)[0][0])


def test_a_derivative_of_the_functions_own() -> None:
    """A gradient penalty: the hook runs in a backward pass that is not the transform's."""
    model = Looks("tensor").double()
    loss = functional(model, F.cross_entropy)

    def penalty(p: Any, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(p, x, y), x, create_graph=True)[0].square().sum()

    params = {name: p + 0.5 for name, p in loss.params.items()}
    found = per_sample_grad(penalty)(params, X, Y)
    truth = copy.deepcopy(model)
    load_back(truth, params)
    for i in range(N):
        x = X[i : i + 1].clone().requires_grad_()
        own = torch.autograd.grad(F.cross_entropy(truth(x), Y[i : i + 1]), x, create_graph=True)[0].square().sum()
        expected = torch.autograd.grad(own, list(truth.parameters()), materialize_grads=True)
        torch.testing.assert_close([g[i] for g in found.values()], list(expected))


def test_nothing_of_a_call_outlives_it() -> None:
    loss = functional(network("hook"), F.cross_entropy)
    gc.collect()
    gc.disable()
    before = {id(x): x for x in gc.get_objects() if type(x) is Batched}  # of other tests
    try:
        for _ in range(2):
            per_sample_grad(loss)(loss.params, X, Y)
        assert not [x for x in gc.get_objects() if type(x) is Batched and id(x) not in before]
    finally:
        gc.enable()


def test_a_thread_of_the_engine_may_run_a_part_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a GPU, while the thread that has the turn waits for it; any other thread has to wait itself."""
    monkeypatch.setattr(_swapped, "_SECONDS", 0.05)
    module = nn.Linear(3, 2)
    new = torch.zeros(2)
    held, other = (_swapped.Exchange(module, dict(module.named_parameters()), {"bias": new}) for _ in range(2))
    with ThreadPoolExecutor(1) as pool, held.held():
        assert pool.submit(_swapped._Again(lambda: module.bias is new, held)).result()
        with pytest.raises(UnsupportedError, match="while another thread"):
            pool.submit(_swapped._Again(lambda: None, other)).result()
        assert module.bias is new
    assert type(module.bias) is nn.Parameter
    assert _swapped._HELD == []


@pytest.mark.parametrize(
    "use",
    [
        lambda w: float(w.shape[0]),
        lambda w: float(w.size(0)),
        lambda w: torch.zeros_like(w).sum(),
        lambda w: w.new_zeros(3).sum(),
        lambda w: (w > 0).sum(),
    ],
)
@pytest.mark.parametrize("around", ["nothing", "no_grad", "vmap"])
def test_what_takes_no_value_of_a_weight_is_no_use_of_it(use: Any, around: str) -> None:
    class Listing(Listed):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.tanh(self.a(x)))
            return out + use(self.weights[0])

    loss = functional(Listing().double(), F.cross_entropy)
    with torch.set_grad_enabled(around != "no_grad"):
        transformed = per_sample_grad_norm(loss)
        found = (
            torch.func.vmap(transformed, (None, 0, 0))(loss.params, X[None], Y[None])[0]
            if around == "vmap"
            else transformed(loss.params, X, Y)
        )
    assert found.isfinite().all()


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.weights = [self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) @ self.weights[0].T + self.b.bias


class Closed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        weight = self.a.weight
        self.run = lambda x: F.linear(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.run(x)) + self.a.bias


@pytest.mark.parametrize("grad_mode", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize(("make", "name"), [(Listed, "b.weight"), (Closed, "a.weight")])
def test_a_weight_past_its_attribute_is_told(make: Any, name: str, grad_mode: bool) -> None:
    model = make().double()
    loss = functional(model, F.cross_entropy)
    with torch.set_grad_enabled(grad_mode), pytest.warns(UnusedArgumentWarning, match=f"parameter '{name}' by another way"):
        per_sample_grad_norm(loss)(loss.params, X, Y)


def test_a_weight_that_is_only_looked_at_is_not() -> None:
    class Looks(Listed):
        def forward(self, x: Tensor) -> Tensor:
            anchor = self.weights[0].detach() if self.weights[0].requires_grad else None
            out: Tensor = self.b(torch.tanh(self.a(x)))
            return out + 0.01 * (self.b.weight - anchor).square().sum()

    loss = functional(Looks().double(), F.cross_entropy)
    assert per_sample_grad_norm(loss)(loss.params, X, Y).isfinite().all()


@pytest.mark.parametrize("kind", ["node", "prehook", "saved"])
def test_hooks_of_autograds_own_in_a_derivative_of_the_functions_own(kind: str) -> None:
    model = Looks(kind).double()
    loss = functional(model, F.cross_entropy)

    def weighed(module: Any, p: Any, x: Tensor, y: Tensor) -> Tensor:
        """A factor that no derivative goes through, from a backward pass in the middle."""
        x = x.detach().requires_grad_()
        own = torch.autograd.grad(module(p, x, y), x)[0]
        return (own.detach() * x).sum() * module(p, x.detach(), y)

    params = {name: p + 0.5 for name, p in loss.params.items()}
    found = per_sample_grad(lambda p, x, y: weighed(loss, p, x, y))(params, X, Y)
    truth = copy.deepcopy(model)
    load_back(truth, params)
    for i in range(N):
        own = weighed(lambda _, x, y: F.cross_entropy(truth(x[None]), y[None]), None, X[i], Y[i])
        expected = torch.autograd.grad(own, list(truth.parameters()), materialize_grads=True)
        torch.testing.assert_close([g[i] for g in found.values()], list(expected))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)

        def assign(grad: Tensor) -> None:
            self.seen = grad.sum()

        if h.requires_grad:
            h.register_hook(assign)
        return h


def test_what_a_hook_assigns_to_a_buffer_is_refused() -> None:
    model = Remembers().double()
    loss = functional(model, F.cross_entropy)
    with pytest.raises(SharedWriteError, match="its buffer 'seen'"):
        per_sample_grad(loss)(loss.params, X, Y)
    assert model.seen == 0


def test_a_thread_of_the_engine_may_run_a_hook_during_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_swapped, "_SECONDS", 5)

    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 1, dtype=D)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            h = self.a(x).sin()
            h.register_hook(lambda grad: 2 * grad)
            # The engine differentiates on a thread of its own where there is a GPU, and this one waits.
            with ThreadPoolExecutor(1) as engine:
                (force,) = engine.submit(torch.autograd.grad, h.sum(), x, create_graph=True).result()
            return (force.sum() + h.sum()).detach()

    loss = functional(Forces())
    x = X[0]
    h = loss.params["a.weight"][0] @ x + loss.params["a.bias"][0]
    torch.testing.assert_close(loss(loss.params, x), 2 * h.cos() * loss.params["a.weight"].sum() + h.sin())


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_recurrent_layer_that_is_called_twice(layer: Any, checkpoints: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r = layer(3, 2, batch_first=True)

        def core(self, x: Tensor) -> Tensor:
            return self.r(x)[0]

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.core, x, use_reentrant=False) if checkpoints else self.core(x)

    model = Model().double()
    x, y = torch.randn(N, 5, 3, dtype=D), torch.randn(N, 5, 2, dtype=D)
    loss = functional(model, F.mse_loss)
    params = {name: p + 0.5 for name, p in loss.params.items()}
    found = per_sample_grad(lambda p, x, y: loss(p, x, y) + loss(p, 2 * x, y))(params, x, y)
    load_back(model, params)
    for i in range(N):
        own = F.mse_loss(model(x[i : i + 1]), y[i : i + 1]) + F.mse_loss(model(2 * x[i : i + 1]), y[i : i + 1])
        torch.testing.assert_close([g[i] for g in found.values()], list(torch.autograd.grad(own, list(model.parameters()))))


def test_a_layer_in_a_reentrant_checkpoint_and_outside_of_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.a, self.a(x).tanh(), use_reentrant=True)

    model = Model().double()
    loss = functional(model, F.cross_entropy)
    found = per_sample_grad(loss)(loss.params, X, Y % 3)
    for i in range(N):
        model.zero_grad()
        F.cross_entropy(model(X[i : i + 1]), Y[i : i + 1] % 3).backward()
        torch.testing.assert_close([g[i] for g in found.values()], [p.grad for p in model.parameters()])
