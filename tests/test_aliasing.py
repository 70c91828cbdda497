"""In-place writes and views: right, or refused; never a write that is lost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from per_sample import PerSampleError, SharedWriteError, UnsupportedError, per_sample_grad
from tree_oracle import assert_close, loop

D = torch.float64
W, X = torch.randn(5, 6, dtype=D), torch.randn(3, 4, 5, dtype=D)


def right_or_refused(fn, w=W, x=X):
    expected = loop(fn, (0,), (None, 0))(w, x)[0]
    try:
        actual = per_sample_grad(fn)(w, x)
    except PerSampleError:
        return "refused"
    assert_close(actual, expected)
    return "right"


def with_hook(hook):
    def fn(w, x):
        v = w * 1
        v.register_hook(hook)
        return ((x @ v) ** 2).sum()

    return fn


def transposed_in_place(g):
    g = g.clone()
    g.t_()
    return g.reshape(6, 5).t()


HOOKS = {
    "mul_": (lambda g: g.mul_(2), "right"),
    "clone, mul_": (lambda g: g.clone().mul_(2), "right"),
    "t_": (transposed_in_place, "right"),
    "write into a detached gradient": (lambda g: g.detach().mul_(2), "refused"),
    "write into a transposed gradient": (lambda g: g.t().mul_(2), "refused"),
    "write into a row of a view": (lambda g: g.view(-1)[0].zero_(), "refused"),
    "write beside a view": (lambda g: (g.detach(), g.mul_(2))[0] + g, "refused"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_gradients_that_are_still_factored(name):
    hook, expected = HOOKS[name]

    def silent(g):
        out = hook(g)
        return out if name in ("mul_", "clone, mul_", "t_", "write beside a view") else None

    assert right_or_refused(with_hook(silent)) == expected


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda h: h[0].mul_(2), "right"),
        (lambda h: h[1:].add_(h[:-1].clone()), "right"),
        (lambda h: h.view(-1)[3:9].zero_(), "right"),
        (lambda h: h.t()[2].fill_(1.0), "right"),
        (lambda h: h.unsqueeze(0).transpose(0, 2).mul_(3), "right"),
        (lambda h: F.relu_(h), "right"),
        (lambda h: h.masked_fill_(h > 0, 0.5), "right"),
        (lambda h: h.index_put_((torch.tensor([0, 2]),), h[1].clone()), "right"),
        (lambda h: h.copy_(h.flip(0)), "right"),
        (lambda h: h.t_(), "right"),
        (lambda h: setattr(h, "data", h.data * 2), "refused"),
    ],
)
def test_writes_into_values_of_the_function(write, expected):
    def fn(w, x):
        h = (x @ w).clone()
        write(h)
        return (h.sin() * h).sum()

    assert right_or_refused(fn) == expected


@pytest.mark.parametrize(
    "program",
    [
        lambda z: (z.conj().mul_(2j + 1), z)[1],
        lambda z: (z.conj(), z.mul_(2j + 1))[0],
        lambda z: (z, z.conj().imag.mul_(3))[0],
    ],
)
def test_lazy_conjugates_are_refused_where_a_write_would_show_through(program):
    def fn(w, x):
        z = program(torch.complex(x @ w, (x @ w) * 2).clone())
        return (z * z).abs().sum()

    assert right_or_refused(fn) == "refused"


def test_a_restart_is_not_lost_in_an_except_clause():
    def fn(w, x):
        try:
            x.mul_(2)
        except BaseException:
            pass
        return (x @ w).sin().sum()

    assert_close(per_sample_grad(fn)(W, X), loop(fn, (0,), (None, 0))(W, X.clone())[0])


def test_a_write_into_an_outer_argument_from_an_inner_transform_ends():
    def fn(w, x):
        def inner(w, y):
            x.mul_(2)
            return ((y @ w) ** 2).sum() * x.sum()

        return (per_sample_grad(inner)(w, torch.ones(2, 4, 5, dtype=D)) ** 2).sum()

    with pytest.raises(SharedWriteError):
        per_sample_grad(fn)(W, X)


def test_a_tensor_from_outside_may_not_change():
    outside = torch.zeros(2, dtype=D)

    def fn(w, x):
        outside.add_(1)
        return (x @ w).sum() * outside.sum()

    with pytest.raises(SharedWriteError, match="from outside"):
        per_sample_grad(fn)(W, X)
    assert not outside.any()


def test_a_tensor_made_inside_may_change():
    def fn(w, x):
        c = torch.tensor([1.0, 2.0], dtype=D)
        c.mul_(3)
        buffer = torch.zeros(6, dtype=D)
        buffer[2:] += 1
        return ((x @ w) * buffer).sum() * c.sum()

    assert right_or_refused(fn) == "right"


@pytest.mark.parametrize(("c", "dtype"), [(1e-40, torch.float32), (torch.tensor(1e-320, dtype=D), D), (torch.tensor(0.0, dtype=D), D)])
def test_dividing_by_tiny_numbers(c, dtype):
    def fn(w, x):
        return (x @ (w / c)).sum() * 0

    w, x = W.to(dtype), X.to(dtype)
    actual, expected = per_sample_grad(fn)(w, x), loop(fn, (0,), (None, 0))(w, x)[0]
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_writing_a_view_of_a_gradient_in_a_custom_backward_is_refused():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            gw = x.t() @ g
            gw.t().mul_(2)
            return g @ w.t(), gw

    with pytest.raises(UnsupportedError, match="shares memory"):
        per_sample_grad(lambda w, x: Product.apply(x, w).square().sum())(W, X)
