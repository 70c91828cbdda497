"""What only an outer transform or derivative sees of a function: detaches, hooks, tensors of the caller's that it reaches by itself."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.func import grad, hessian, jvp, vjp, vmap

from per_sample import SharedWriteError, UnsupportedError, per_sample_grad, reference

N, D = 5, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


W, V, X, OUTSIDE = real(3, 4), real(3), real(N, 3), real(N, 3, 4)


def in_place(w: Tensor, x: Tensor) -> Tensor:
    h = x @ w
    z = h * 1
    z.detach_()
    return (z * h).sum()


def shared_in_place(w: Tensor, x: Tensor) -> Tensor:
    s = w * 2
    s.detach_()
    return (s * w * x[:, None]).sum()


def below_grad(w: Tensor, x: Tensor) -> Tensor:
    return (grad(lambda q: ((q @ w).tanh().detach() * q.sum()).sum())(x) ** 2).sum() + (x @ w).sin().sum()


def below_grad_data(w: Tensor, x: Tensor) -> Tensor:
    return (grad(lambda q: ((q @ w).tanh().data * q.sum()).sum())(x) ** 2).sum()


def below_grad_in_place(w: Tensor, x: Tensor) -> Tensor:
    def inner(q: Tensor) -> Tensor:
        y = (q @ w) * 1
        y.detach_()
        return (y * q.sum()).sum()

    return (grad(inner)(x) ** 2).sum()


def below_grad_argument(w: Tensor, x: Tensor) -> Tensor:
    return (grad(lambda q: ((q @ w.detach()).tanh() * q.sum()).sum())(x) ** 2).sum() + (w**2).sum()


def below_vmap(w: Tensor, x: Tensor) -> Tensor:
    return (vmap(lambda c: (c @ x).tanh().detach() * c.sum(), 1)(w) * (x @ w)).sum()


def below_jvp(w: Tensor, x: Tensor) -> Tensor:
    return jvp(lambda q: (q @ w).detach() * q.sum(), (x,), (x.cos(),))[1].sum() ** 2 + (x @ w).sin().sum()


def below_vjp(w: Tensor, x: Tensor) -> Tensor:
    return (vjp(lambda q: (q @ w).tanh().detach() * q.sum(), x)[1](x.new_ones(4))[0] ** 2).sum() + (x @ w).sin().sum()


def below_hessian(w: Tensor, x: Tensor) -> Tensor:
    return (hessian(lambda q: ((q @ w).tanh() * (q @ w).detach()).sum())(x) ** 2).sum()


def of_lists_in_place(w: Tensor, x: Tensor) -> Tensor:
    a = x @ w
    torch._foreach_mul_([a], 2.0)
    return (a * a).sin().sum()


def of_views_in_place(w: Tensor, x: Tensor) -> Tensor:
    h = (x @ w).view(2, 2)
    torch._foreach_mul_([h], 2.0)
    return h.tanh().sum()


def jacobians(w: Tensor, x: Tensor) -> Tensor:
    return (jacobian(lambda q: (q @ w).tanh(), x, create_graph=True) ** 2).sum()


FUNCTIONS = [
    in_place,
    shared_in_place,
    below_grad,
    below_grad_data,
    below_grad_in_place,
    below_grad_argument,
    below_vmap,
    below_jvp,
    below_vjp,
    below_hessian,
    of_lists_in_place,
    of_views_in_place,
    jacobians,
]


def by_loop(fn: Any, w: Tensor, xs: Tensor, create_graph: bool = False) -> Tensor:
    w = w if w.requires_grad else w.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(fn(w, x), w, create_graph=create_graph)[0] for x in xs])


def derivative(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    out = of(at)
    return torch.autograd.grad(out, at, materialize_grads=True)[0] if out.requires_grad else torch.zeros_like(at)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_first_derivatives(fn: Any) -> None:
    expected = by_loop(fn, W, X)
    torch.testing.assert_close(per_sample_grad(fn)(W, X), expected)
    torch.testing.assert_close(per_sample_grad(fn)(W.clone().requires_grad_(), X).detach(), expected)
    with torch.inference_mode():
        found = per_sample_grad(fn)(W, X) if fn is not jacobians else expected
    torch.testing.assert_close(found.clone(), expected)
    if fn not in (jacobians, of_lists_in_place, of_views_in_place):  # which functorch refuses
        torch.testing.assert_close(vmap(per_sample_grad(fn), (0, None))(torch.stack([W, 2 * W]), X)[0], expected)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_second_derivatives(fn: Any) -> None:
    by_params = derivative(lambda w: (by_loop(fn, w, X, create_graph=True) * OUTSIDE).sum(), W)
    by_batch = derivative(lambda x: (by_loop(fn, W, x, create_graph=True) * OUTSIDE).sum(), X)
    for expected, of, at in (
        (by_params, lambda w: (per_sample_grad(fn)(w, X) * OUTSIDE).sum(), W),
        (by_batch, lambda x: (per_sample_grad(fn)(W, x) * OUTSIDE).sum(), X),
    ):
        torch.testing.assert_close(derivative(of, at), expected)
        torch.testing.assert_close(grad(of)(at), expected)
        nested = per_sample_grad(lambda a, s, of=of: of(a * s))(at, torch.ones(2, dtype=D))
        torch.testing.assert_close(nested, expected.expand(2, *expected.shape))


@pytest.mark.parametrize("norm", [lambda h: F.layer_norm(h, (4,)), lambda h: F.instance_norm(h.view(1, 2, 2))])
def test_norms_below_a_forward_derivative_of_a_gradient_are_refused_where_a_derivative_would_be_wrong(norm: Any) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return jvp(grad(lambda q: norm(q @ w).sin().sum()), (x,), (x.cos(),))[1].sum()

    torch.testing.assert_close(per_sample_grad(fn)(W, X), reference.per_sample_grad(fn)(W, X))
    for around in (grad, lambda of: lambda w: of(w.clone().requires_grad_())):
        with pytest.raises(UnsupportedError, match="forward derivative of a gradient"):
            around(lambda w: per_sample_grad(fn)(w, X).sin().sum())(W)


def test_a_recurrent_layer_below_a_vmap_over_parameters_or_data() -> None:
    gru = torch.nn.GRU(3, 4, batch_first=True).double()
    state = {name: p.detach() for name, p in gru.named_parameters()}

    def fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(gru, p, (x[None],))[0].square().sum()

    sequences, twice = real(N, 6, 3), {name: 2 * p for name, p in state.items()}
    found = vmap(per_sample_grad(fn), (0, None))({name: torch.stack([p, twice[name]]) for name, p in state.items()}, sequences)
    torch.testing.assert_close({name: g[1] for name, g in found.items()}, per_sample_grad(fn)(twice, sequences))
    # As in torch: it writes into states that it makes from nothing.
    with pytest.raises(UnsupportedError, match="written into a tensor"):
        vmap(per_sample_grad(fn), (None, 0))(state, torch.stack([sequences, sequences]))


class Packs:
    def __call__(self, t: Tensor) -> Tensor:
        return t * 1


HOOKS = [lambda t: t * 1, functools.partial(lambda k, t: t * k, 1), Packs()]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_saved_tensors_are_refused_where_a_derivative_would_be_lost(hook: Any) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
            return (x @ w).sin().sum()

    torch.testing.assert_close(per_sample_grad(fn)(W, X), by_loop(fn, W, X))
    with pytest.raises(UnsupportedError, match="saved_tensors_hooks"):
        per_sample_grad(fn)(W.clone().requires_grad_(), X)


def test_what_else_happens_below_hooks_on_saved_tensors_is_not() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            h = x @ w
            with torch.no_grad():
                scale = h.abs().max()
            return (h / scale).sin().sum()

    expected = derivative(lambda w: (by_loop(fn, w, X, create_graph=True) * OUTSIDE).sum(), W)
    torch.testing.assert_close(derivative(lambda w: (per_sample_grad(fn)(w, X) * OUTSIDE).sum(), W), expected)


def multiplied(w: Tensor, x: Tensor) -> Tensor:
    x = x.view(3)
    x.mul_(2)
    return (x @ w).sin().sum()


def overwritten(w: Tensor, x: Tensor) -> Tensor:
    x[0] = 1.0
    return (x @ w).sin().sum()


@pytest.mark.parametrize("fn", [multiplied, overwritten], ids=lambda fn: fn.__name__)
def test_writes_into_what_the_caller_records(fn: Any) -> None:
    x, copied = X.clone(), lambda w, x: fn(w, x * 1)
    expected = derivative(lambda x: (by_loop(copied, W, x, create_graph=True) * OUTSIDE).sum(), x)
    torch.testing.assert_close(derivative(lambda x: (per_sample_grad(fn)(W, x) * OUTSIDE).sum(), x), expected)
    torch.testing.assert_close(grad(lambda x: (per_sample_grad(fn)(W, x) * OUTSIDE).sum())(x), expected)
    assert torch.equal(x, X)


class Holder:
    tensor: Tensor


class Slots:
    __slots__ = ("tensor",)


@dataclasses.dataclass(slots=True)
class Data:
    tensor: Tensor


module = types.ModuleType("module")


def by_class(t: Tensor) -> Callable[[], Tensor]:
    Holder.tensor = t
    return lambda: Holder.tensor


def by_slot(t: Tensor) -> Callable[[], Tensor]:
    slots = Slots()
    slots.tensor = t
    return lambda: slots.tensor


def by_dataclass(t: Tensor) -> Callable[[], Tensor]:
    data = Data(t)
    return lambda: data.tensor


def by_deque(t: Tensor) -> Callable[[], Tensor]:
    items = deque([t])
    return lambda: items[0]


def by_module(t: Tensor) -> Callable[[], Tensor]:
    module.tensor = t  # type: ignore[attr-defined]
    return lambda: module.tensor  # type: ignore[attr-defined,no-any-return]


def by_proxy(t: Tensor) -> Callable[[], Tensor]:
    items = types.MappingProxyType({"t": t})
    return lambda: items["t"]


def by_default(t: Tensor) -> Callable[[], Tensor]:
    def get(*, own: Tensor = t) -> Tensor:
        return own

    return get


def by_generator(t: Tensor) -> Callable[[], Tensor]:
    def forever() -> Iterator[Tensor]:
        while True:
            yield t

    tensors = forever()
    return lambda: next(tensors)


def by_property(t: Tensor) -> Callable[[], Tensor]:
    class Own:
        @property
        def tensor(self) -> Tensor:
            return t

    own = Own()
    return lambda: own.tensor


def by_cache(t: Tensor) -> Callable[[], Tensor]:
    return functools.lru_cache(lambda: t)


def by_many(t: Tensor) -> Callable[[], Tensor]:
    items = [*range(20_000), t]
    return lambda: items[-1]


def by_odd(t: Tensor) -> Callable[[], Tensor]:
    """An object that does not like to be asked."""

    class Odd:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("out of context")

    odd = Odd()
    return lambda: (odd, t)[1]


def by_closure(t: Tensor) -> Callable[[], Tensor]:
    return lambda: t


def below_a_transform(get: Callable[[], Tensor]) -> Any:
    return lambda w, x: (grad(lambda q: (q * w * get()).sum().sin())(x) ** 2).sum()


WAYS = [
    by_class,
    by_slot,
    by_dataclass,
    by_deque,
    by_module,
    by_proxy,
    by_default,
    by_generator,
    by_property,
    by_cache,
    by_many,
    by_odd,
    by_closure,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_tensor_of_a_transform_around_is_known_below_one_inside(way: Any) -> None:
    w, t = real(3), real(3) + 1

    def expected(t: Tensor) -> Tensor:
        return by_loop(below_a_transform(way(t)), w, X, create_graph=True)

    def found(t: Tensor) -> Tensor:
        return per_sample_grad(below_a_transform(way(t)))(w, X)

    torch.testing.assert_close(grad(lambda t: found(t).sum())(t), derivative(lambda t: expected(t).sum(), t))
    torch.testing.assert_close(vmap(found)(torch.stack([t, 2 * t])), torch.stack([expected(t), expected(2 * t)]).detach())
    # The same with a constant, below a transform that has nothing to do with it.
    constant = way(t)
    torch.testing.assert_close(
        vmap(lambda w: per_sample_grad(below_a_transform(constant))(w, X))(torch.stack([w, 2 * w]))[0], expected(t).detach()
    )


@pytest.mark.parametrize("around", [lambda of, t: grad(of)(t), lambda of, t: vmap(of)(torch.stack([t, t]))], ids=["grad", "vmap"])
def test_a_transform_of_a_tensor_closed_over_from_a_transform_around_is_refused(around: Any) -> None:
    def found(t: Tensor) -> Tensor:
        return per_sample_grad(lambda w, x: (grad(lambda q: (q * w * x).sum().sin())(t) ** 2).sum())(V, X).sum()

    with pytest.raises(UnsupportedError, match="argument"):
        around(found, real(3))


LISTS = {
    "list": lambda h, g, a, b: torch._foreach_add_([h, g], [a, b], alpha=2.0),
    "lists": lambda h, g, a, b: torch._foreach_addcmul_([h, g], [a, b], [b, a], [2.0, 3.0]),
    "scalars": lambda h, g, a, b: torch._foreach_mul_([h, g], [2.0, 3.0]),
    "nothing": lambda h, g, a, b: torch._foreach_exp_([h, g]),
    "names": lambda h, g, a, b: torch._foreach_addcdiv_([h, g], tensor2=[a.exp(), b.exp()], tensor1=[b, a], value=0.5),
    "names of numbers": lambda h, g, a, b: torch._foreach_addcmul_(self=[h, g], tensor2=[a, b], tensor1=[b, a], scalars=[2.0, 3.0]),
    "weight": lambda h, g, a, b: torch._foreach_lerp_([h, g], weight=0.3, tensors1=[a, b]),
    "bounds": lambda h, g, a, b: torch._foreach_maximum_([h, g], [a, b]),
}


@pytest.mark.parametrize("name", LISTS)
def test_writes_into_lists(name: str) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        h, g = x @ w, (x * 2) @ w.cos()
        LISTS[name](h, g, x @ w.sin(), x @ (w * w))
        return (h * g).tanh().sum()

    torch.testing.assert_close(per_sample_grad(fn)(W, X), by_loop(fn, W, X))
    expected = derivative(lambda w: (by_loop(fn, w, X, create_graph=True) * OUTSIDE).sum(), W)
    torch.testing.assert_close(grad(lambda w: (per_sample_grad(fn)(w, X) * OUTSIDE).sum())(W), expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda h, a: torch._foreach_add_([h], [a, a]),
        lambda h, a: torch._foreach_mul_([h], [2.0, 3.0]),
        lambda h, a: torch._foreach_add_([h], a),
        lambda h, a: torch._foreach_add_([], 1.0),
    ],
    ids=["tensors", "numbers", "a vector", "nothing"],
)
def test_lists_that_do_not_fit_are_refused_as_by_torch(write: Any) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        h = x @ w
        write(h, x @ w)
        return h.sum()

    with pytest.raises(RuntimeError):
        fn(W, X[0])
    with pytest.raises(RuntimeError):
        per_sample_grad(fn)(W, X)


def test_writes_into_lists_that_meet_come_in_turn() -> None:
    """As their values do; autograd has the derivative of both at once (torch 2.13)."""

    def by_lists(w: Tensor, x: Tensor) -> Tensor:
        h, g = x @ w, (x * 2) @ w.cos()
        torch._foreach_add_([h, g], [g, h])
        return (h * g).tanh().sum()

    def one_by_one(w: Tensor, x: Tensor) -> Tensor:
        h, g = x @ w, (x * 2) @ w.cos()
        h.add_(g)
        g.add_(h)
        return (h * g).tanh().sum()

    torch.testing.assert_close(by_lists(W, X[0]), one_by_one(W, X[0]))
    torch.testing.assert_close(per_sample_grad(by_lists)(W, X), by_loop(one_by_one, W, X))


def _written(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    x.mul_(2.0)
    return (w * x * jacobian(lambda t: (t * t * w).sum(), y, create_graph=True)).sum()


@pytest.mark.parametrize("closed_over", [False, True])
def test_autograds_functional_where_an_argument_is_written_into(closed_over: bool) -> None:
    """What the caller records requires grad in the function's eyes, also when it begins again."""

    def outer(found: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        x, y = X.clone().requires_grad_(), V.clone().requires_grad_()
        return torch.autograd.grad((found(x * 1, y * 1) * OUTSIDE[..., 0]).sum(), [x, y])

    def together(x: Tensor, y: Tensor) -> Tensor:
        if closed_over:
            return per_sample_grad(lambda w, x: _written(x, y, w))(V, x)
        return per_sample_grad(lambda w, x, y: _written(x, y, w), in_dims=(None, 0, None))(V, x, y)

    def one_by_one(x: Tensor, y: Tensor) -> Tensor:
        w = V.clone().requires_grad_()
        return torch.stack([torch.autograd.grad(_written(row.clone(), y, w), w, create_graph=True)[0] for row in x])

    torch.testing.assert_close(outer(together), outer(one_by_one))


def test_a_tensor_from_outside_that_the_caller_records_is_not_written_into() -> None:
    outside = V.clone().requires_grad_() * 1
    with pytest.raises(SharedWriteError, match="never modified"):
        per_sample_grad(lambda w, x: (w * x * outside.mul_(2)).sum())(V, X)


class Hides:
    __slots__ = ("held",)


def test_a_wrapper_that_hides_beside_a_plain_tensor_of_its_memory() -> None:
    hidden = Hides()

    def outer(rows: Callable[[Any], Tensor], t: Tensor) -> Tensor:
        hidden.held = t

        def fn(w: Tensor, x: Tensor) -> Tensor:
            return (grad(lambda q: (q * hidden.held).sin().sum())(w * x) * V).sum()

        return rows(fn).square().sum()

    found = grad(functools.partial(outer, lambda fn: per_sample_grad(fn)(V, X)))(V)
    expected = grad(functools.partial(outer, lambda fn: torch.stack([grad(fn)(V, x) for x in X])))(V)
    torch.testing.assert_close(found, expected)


class NoLength(list[Any]):
    def __len__(self) -> int:
        raise ValueError("no length")

    def __iter__(self) -> Any:
        raise ValueError("no items")


def test_odd_objects_that_the_function_reaches_are_not_looked_into() -> None:
    odd = NoLength()

    def fn(w: Tensor, x: Tensor) -> Tensor:
        assert odd is not None
        return grad(lambda q: (q * w).sin().sum())(x).sum()

    found = vmap(lambda w: per_sample_grad(fn)(w, X))(torch.stack([V, 2 * V]))
    torch.testing.assert_close(found[0], per_sample_grad(fn)(V, X))
