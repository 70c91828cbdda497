"""The transforms inside and around torch.func, autograd, make_fx and themselves: exact, and not by falling back to the reference."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.func import functionalize, grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from per_sample import UnsupportedError, per_sample_grad, reference
from per_sample._interpreter import Interpreter

# torch's own jvp decompositions are scripted on first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

D = torch.float64
N, IN, OUT = 4, 3, 5


def loss(p, x, y):
    h = torch.tanh(F.linear(x, p["w"], p["b"]))
    return ((h - y) ** 2).sum() * h.exp().mean()


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed + sum(shape)))


PARAMS = {"w": random(OUT, IN), "b": random(OUT)}
C = random(OUT, seed=1)


def params():
    return dict(PARAMS)


X, Y = random(N, IN), random(N, OUT)
STACKED = {k: torch.stack([v, 2 * v]) for k, v in params().items()}


def total(tree):
    return sum((t**3).sum() for t in tree_leaves(tree))


def through_autograd(psg, fn, *inputs_requiring_grad):
    p = {k: v.clone().requires_grad_() for k, v in params().items()}
    out = psg(fn)(p, X, Y)
    return torch.autograd.grad(total(out), [*p.values(), *inputs_requiring_grad])


def forward_mode(psg):
    with forward_ad.dual_level():
        p = {k: forward_ad.make_dual(v, torch.ones_like(v)) for k, v in params().items()}
        return [forward_ad.unpack_dual(t).tangent for t in psg(loss)(p, X, Y).values()]


def closed_over_by_autograd(psg):
    c = C.clone().requires_grad_()
    out = psg(lambda p, x, y: loss(p, x, y) * (c * x.sum()).sum().sin())(params(), X, Y)
    return torch.autograd.grad(total(out), c)


def closed_over_by_transform(psg):
    def outer(c):
        return total(psg(lambda p, x, y: loss(p, x, y) * (c * x.sum()).sum().sin())(params(), X, Y))

    c = C
    return grad(outer)(c), vmap(outer)(torch.stack([c, -c])), jacrev(grad(outer))(c)


def closed_over_in_inner_transform(psg):
    """The closed-over tensor of the outer level is touched only inside a functorch transform of the function's own."""

    def outer(c):
        def fn(p, x, y):
            return grad(lambda z: (z * c).sin().sum() * z.sum())(F.linear(x, p["w"])).square().sum() + 0 * y.sum()

        return total(psg(fn)({"w": params()["w"]}, X, Y))

    return grad(outer)(C), jacrev(grad(outer))(C)


def func_inside(psg):
    def fn(p, x, y):
        inner = grad(lambda z: torch.sin(F.linear(z, p["w"], p["b"])).sum())(x)
        rows = vmap(lambda r: (r * x).sum())(p["w"])
        return (inner**2).sum() + (rows * y).sum()

    return psg(fn)(params(), X, Y)


def laplacian_inside(psg):
    def fn(p, x, y):
        def u(z):
            return torch.sin(F.linear(z, p["w"], p["b"])).sum()

        return torch.trace(hessian(u)(x)) ** 2 + jvp(u, (x,), (x,))[1] * y.sum()

    return psg(fn)(params(), X, Y)


def inside_itself(psg):
    def outer(p, x, y):
        inner = psg(lambda q, s: loss(q, x * s, y))(p, torch.arange(1, 4, dtype=D))
        return sum((t**2).sum() for t in inner.values())

    return psg(outer)(params(), X, Y)


def user_detach(psg):
    return through_autograd(psg, lambda p, x, y: loss(p, x, y).detach() * torch.detach(x).sum() * loss(p, x, y))


def user_no_grad(psg):
    def fn(p, x, y):
        with torch.no_grad():
            c = loss(p, x, y)
        return c * loss(p, x, y)

    return through_autograd(psg, fn)


def inference_mode(psg):
    # torch 2.11's own vmap over grad is wrong in inference mode.
    with torch.inference_mode(psg is per_sample_grad):
        c = X[0].clone()
        p = {k: v.clone() for k, v in params().items()}
        return psg(lambda p, x, y: loss(p, x, y) * (c * x).sum())(p, X.clone(), Y)


COMPOSITIONS = {
    "vmap over params": lambda psg: vmap(lambda p: psg(loss)(p, X, Y))(STACKED),
    "vmap over data": lambda psg: vmap(lambda x: psg(loss)(params(), x, Y))(torch.stack([X, X + 1])),
    "vmap over both": lambda psg: vmap(lambda p, x: psg(loss)(p, x, Y))(STACKED, torch.stack([X, X + 1])),
    "grad": lambda psg: grad(lambda p: total(psg(loss)(p, X, Y)))(params()),
    "grad wrt data": lambda psg: grad(lambda x: total(psg(loss)(params(), x, Y)))(X),
    "jacrev": lambda psg: jacrev(lambda p: psg(loss)(p, X, Y))(params()),
    "jvp": lambda psg: jvp(lambda p: psg(loss)(p, X, Y), (params(),), (params(),)),
    "hessian": lambda psg: hessian(lambda b: psg(loss)({**params(), "b": b}, X, Y)["b"].sum())(params()["b"]),
    "functionalize": lambda psg: functionalize(lambda p: psg(loss)(p, X, Y))(params()),
    "vmap of grad": lambda psg: vmap(grad(lambda p: total(psg(loss)(p, X, Y))))(STACKED),
    "grad of vmap": lambda psg: grad(lambda q: total(vmap(lambda p: psg(loss)(p, X, Y))(q)))(STACKED),
    "autograd": lambda psg: through_autograd(psg, loss),
    "forward mode": forward_mode,
    "closed over, autograd": closed_over_by_autograd,
    "closed over, transform": closed_over_by_transform,
    "closed over, inner transform": closed_over_in_inner_transform,
    "torch.func inside": func_inside,
    "laplacian inside": laplacian_inside,
    "inside itself": inside_itself,
    "grad of inside itself": lambda psg: grad(
        lambda s: total(psg(lambda p, x, y: total(psg(lambda q, z: loss(q, x * z * s, y))(p, torch.ones(2, dtype=D))))(params(), X, Y))
    )(torch.tensor(0.7, dtype=D)),
    "user detach": user_detach,
    "user no_grad": user_no_grad,
    "inference mode": inference_mode,
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition_equals_reference(name):
    actual = COMPOSITIONS[name](per_sample_grad)
    expected = COMPOSITIONS[name](reference.per_sample_grad)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition_runs_the_interpreter_and_not_the_reference(name, monkeypatch):
    entered = []
    original = Interpreter.__enter__
    monkeypatch.setattr(Interpreter, "__enter__", lambda self: (entered.append(1), original(self))[1])

    def refuse(*args, **kwargs):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "per_sample_grad_and_value", refuse)
    COMPOSITIONS[name](per_sample_grad)
    assert entered


def test_params_requiring_grad_are_recorded_only_where_the_caller_records():
    p = {k: v.clone().requires_grad_() for k, v in params().items()}
    assert all(g.requires_grad for g in per_sample_grad(loss)(p, X, Y).values())
    with torch.no_grad():
        assert not any(g.requires_grad for g in per_sample_grad(loss)(p, X, Y).values())
    assert all(v.grad is None for v in p.values())


def test_make_fx_gives_a_flat_graph_of_batched_ops():
    graph = make_fx(lambda p, x, y: per_sample_grad(loss)(p, x, y), tracing_mode="symbolic")(params(), X, Y)
    x, y = random(7, IN), random(7, OUT)
    torch.testing.assert_close(graph(params(), x, y), reference.per_sample_grad(loss)(params(), x, y))
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert calls
    assert not any("per_sample" in str(node.target) for node in calls)


TH = random(OUT, OUT, seed=2)
CLOSED_OVER = {
    "matrix product": lambda th, w, x: ((w @ x) @ th).square().sum(),
    "linear": lambda th, w, x: F.linear(w @ x, th, th[0]).tanh().sum(),
    "transpose": lambda th, w, x: (th.t() @ (w @ x)).square().sum(),
    "derived outside": lambda th, w, x: ((w @ x) @ th).square().sum(),
    "bmm": lambda th, w, x: torch.bmm((w @ x).view(1, 1, -1), th[None]).square().sum(),
    "power": lambda th, w, x: ((w @ x).square() + 1).pow(th[0]).sum(),
    "attention": lambda th, w, x: _attention((w @ x).expand(1, 2, OUT), th[None]).square().sum(),
    "layer norm": lambda th, w, x: (F.layer_norm(w @ x, (OUT,), th[0], th[1]) ** 3).sum(),
    "in-place write": lambda th, w, x: _half_written(w, x, th),
    "inner autograd.grad": lambda th, w, x: _inner_grad(w @ x, th, create_graph=False),
    "inner autograd.grad, create_graph": lambda th, w, x: _inner_grad(w @ x, th, create_graph=True),
    "detach": lambda th, w, x: (th.detach() @ th.t() @ (w @ x)).square().sum(),
    "inner torch.func.grad": lambda th, w, x: (grad(lambda h: (h @ th).square().sum())((w @ x).tanh()) * (w @ x)).sum(),
}


def _half_written(w, x, th):
    """The write comes back in the backward pass, where the second use of ``w`` has left a factor."""
    copy = (w @ x).tanh().expand(2, OUT).clone()
    copy[0] = 0.5
    return ((copy @ th) @ w).square().sum()


def _attention(q, th):
    # The loop's own second derivative: torch has none of its fused kernels.
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, th, th)


def _inner_grad(h, th, create_graph):
    y = (h.tanh() @ th).square().sum()
    (g,) = torch.autograd.grad(y, h, create_graph=create_graph, retain_graph=True)
    return (g * h.sin()).sum() + (h @ th).sum()


@pytest.mark.parametrize("how", ["closed over", "argument", "inside itself, closed over", "inside itself, argument"])
@pytest.mark.parametrize("name", CLOSED_OVER)
def test_outer_derivative_with_respect_to_a_shared_tensor(name, how):
    fn = CLOSED_OVER[name]
    w = random(OUT, IN)
    th = TH.clone().requires_grad_()
    used = th * 2 if name == "derived outside" else th

    def loss_of(w, x):
        return fn(used, w, x)

    def by_loop(w, x):
        q = w.clone().requires_grad_()
        return torch.autograd.grad(loss_of(q, x), q, create_graph=True)[0]

    expected = torch.stack([by_loop(w, x) for x in X])
    if how == "closed over":
        actual = per_sample_grad(loss_of)(w, X)
    elif how == "argument":
        actual = per_sample_grad(lambda w, t, x: fn(t, w, x), in_dims=(None, None, 0))(w, used, X)
    else:

        def outer(c, x):
            if how.endswith("over"):
                return (per_sample_grad(loss_of)(w * c, x[None])[0] ** 2).sum()
            return (per_sample_grad(fn, 1, (None, None, 0))(used, w * c, x[None])[0] ** 2).sum()

        if "autograd.grad" in name:
            pytest.skip("the inner autograd.grad would have to pass through two levels; vmap refuses it, too")
        actual = per_sample_grad(outer)(torch.ones((), dtype=D), X)

        def outer_by_loop(c, x):
            q = w * c
            g = torch.autograd.grad(loss_of(q, x), q, create_graph=True)[0]
            return torch.autograd.grad((g**2).sum(), c, create_graph=True)[0]

        c = torch.ones((), dtype=D, requires_grad=True)
        expected = torch.stack([outer_by_loop(c, x) for x in X])
    torch.testing.assert_close(actual, expected)
    found = torch.autograd.grad((actual**2).sum(), th, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad((expected**2).sum(), th))


class Straight(torch.autograd.Function):
    """Rounding whose gradient is taken to be one."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def straight_loss(p, x, y):
    return ((Straight.apply(F.linear(x, p["w"], p["b"])) - y) ** 2).sum()


def test_custom_function_without_vmap_support():
    grads = per_sample_grad(straight_loss)(params(), X, Y)
    for i in range(N):
        p = {k: v.clone().requires_grad_() for k, v in params().items()}
        expected = torch.autograd.grad(straight_loss(p, X[i], Y[i]), list(p.values()))
        torch.testing.assert_close([g[i] for g in grads.values()], list(expected))


def test_custom_function_is_refused_where_its_backward_would_be_ignored():
    with pytest.raises(UnsupportedError, match="Straight"):
        through_autograd(per_sample_grad, straight_loss)


class Steeper(Straight):
    """Of the same forward pass, and not used."""


def test_the_custom_function_that_was_used_is_named():
    with pytest.raises(UnsupportedError, match="`Straight` has a `backward` of its own"):
        through_autograd(per_sample_grad, straight_loss)


def test_an_op_with_a_backward_of_its_own_is_refused_by_its_name():
    @torch.library.custom_op("per_sample_compose::cubed", mutates_args=())
    def cubed(x: torch.Tensor) -> torch.Tensor:
        return x**3

    cubed.register_autograd(
        lambda ctx, g: 3 * g * ctx.saved_tensors[0] ** 2, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )

    def cubed_loss(p, x, y):
        return ((cubed(F.linear(x, p["w"], p["b"])) - y) ** 2).sum()

    grads = per_sample_grad(cubed_loss)(params(), X, Y)
    torch.testing.assert_close(grads, per_sample_grad(lambda p, x, y: ((F.linear(x, p["w"], p["b"]) ** 3 - y) ** 2).sum())(params(), X, Y))
    with pytest.raises(UnsupportedError, match=r"`per_sample_compose.cubed.default` has a `backward` of its own"):
        through_autograd(per_sample_grad, cubed_loss)


class Reversed(torch.autograd.Function):
    """Runs no op of its own in the forward pass."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


def test_a_custom_function_that_returns_its_argument_is_refused_just_so():
    def reversed_loss(p, x, y):
        return loss({k: Reversed.apply(v * v) for k, v in p.items()}, x, y)

    grads = per_sample_grad(reversed_loss)(params(), X, Y)
    expected = per_sample_grad(lambda p, x, y: loss({k: v * v for k, v in p.items()}, x, y))(params(), X, Y)
    torch.testing.assert_close(grads, {k: -g for k, g in expected.items()})
    with pytest.raises(UnsupportedError, match="Reversed"):
        through_autograd(per_sample_grad, reversed_loss)


def test_custom_function_under_outer_vmap():
    actual = vmap(lambda p: per_sample_grad(straight_loss)(p, X, Y))(STACKED)
    for i in range(2):
        one = per_sample_grad(straight_loss)({k: v[i] for k, v in STACKED.items()}, X, Y)
        torch.testing.assert_close({k: v[i] for k, v in actual.items()}, one)
