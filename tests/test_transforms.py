"""The public transforms: arguments, pytrees, chunks, empty batches, what is promised of inputs and outputs."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections import OrderedDict, namedtuple

import optree
import pytest
import torch
import torch.nn.functional as F

from per_sample import per_sample_grad, per_sample_grad_and_value, reference
from per_sample._batched import Batched
from tree_oracle import assert_close, loop

D = torch.float64
N = 4
W, B = torch.randn(2, 3, dtype=D), torch.randn(2, dtype=D)
X, Y = torch.randn(N, 3, dtype=D), torch.randn(N, 2, dtype=D)


def loss(p, x, y):
    return ((F.linear(x, p["w"], p["b"]) - y) ** 2).sum()


def two(w, b, x, y):
    return loss({"w": w, "b": b}, x, y)


P = {"w": W, "b": B}
Pair = namedtuple("Pair", ["w", "b"])


@optree.dataclasses.dataclass(namespace="")
class Params:
    w: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize("argnums", [0, 1, (0, 1), (1, 0), -4, (0,)])
def test_argnums(argnums):
    actual = per_sample_grad(two, argnums)(W, B, X, Y) if argnums == (0, 1) or argnums == (1, 0) else None
    if actual is None:
        numbers = argnums if isinstance(argnums, tuple) else (argnums,)
        in_dims = (None, None, 0, 0)
        actual = per_sample_grad(two, argnums, in_dims)(W, B, X, Y)
        expected = loop(two, numbers, in_dims)(W, B, X, Y)
    else:
        expected = loop(two, argnums, (None, None, 0, 0))(W, B, X, Y)
    if not isinstance(argnums, tuple):
        actual = (actual,)
    assert isinstance(actual, tuple)
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("in_dims", "args"),
    [
        ((None, 0, 0), (P, X, Y)),
        ((None, 1, -1), (P, X.T, Y.T)),
        (({"w": 0, "b": None}, 0, 0), ({"w": torch.stack([W] * N), "b": B}, X, Y)),
        ((0, 0, 0), ({"w": torch.stack([W] * N), "b": torch.stack([B] * N)}, X, Y)),
        (({"w": 2, "b": 1}, 0, 0), ({"w": torch.stack([W] * N, 2), "b": torch.stack([B] * N, 1)}, X, Y)),
        ((None, 0, None), (P, X, Y[0])),
        (0, ({"w": torch.stack([W] * N), "b": torch.stack([B] * N)}, X, Y)),
    ],
)
@pytest.mark.parametrize("keep_batch_dim", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_in_dims(in_dims, args, keep_batch_dim, chunk_size):
    def fn(p, x, y):
        squeezed = [t.squeeze(0) if keep_batch_dim and t.dim() > nd else t for t, nd in ((p["w"], 2), (p["b"], 1), (x, 1), (y, 1))]
        return two(*squeezed)

    options = {"keep_batch_dim": keep_batch_dim, "chunk_size": chunk_size}
    actual = per_sample_grad_and_value(fn, 0, in_dims, **options)(*args)
    assert_close(actual, reference.per_sample_grad_and_value(fn, 0, in_dims, **options)(*args))
    assert_close(actual[0], loop(loss, (0,), in_dims)(*args)[0])


@pytest.mark.parametrize(
    ("tree", "unpack"),
    [
        ({"b": B, "w": W}, lambda p: (p["w"], p["b"])),
        (OrderedDict(w=W, b=B), lambda p: (p["w"], p["b"])),
        ([W, B], tuple),
        ((W, (B, None)), lambda p: (p[0], p[1][0])),
        (Pair(W, B), tuple),
        (Params(W, B), lambda p: (p.w, p.b)),
        ({"z": [W], "a": {"b": B}, "empty": {}, "none": None}, lambda p: (p["z"][0], p["a"]["b"])),
    ],
    ids=["dict", "OrderedDict", "list", "nested tuple with None", "namedtuple", "dataclass", "mixed"],
)
def test_pytrees(tree, unpack):
    grads = per_sample_grad(lambda p, x, y: two(*unpack(p), x, y))(tree, X, Y)
    assert type(grads) is type(tree)
    assert optree.tree_structure(grads) == optree.tree_structure(tree)
    if isinstance(tree, dict):
        assert list(grads) == list(tree)
    assert_close(unpack(grads), loop(two, (0, 1), (None, None, 0, 0))(W, B, X, Y))
    expected = reference.per_sample_grad(lambda p, x, y: two(*unpack(p), x, y))(tree, X, Y)
    assert_close(unpack(grads), unpack(expected))


def test_batched_arguments_are_pytrees_too():
    fn = lambda p, batch: loss(p, batch["x"], batch["more"][0])  # noqa: E731
    grads = per_sample_grad(fn)(P, {"x": X, "more": [Y], "note": "no tensor", "flag": True})
    assert_close(grads, per_sample_grad(loss)(P, X, Y))


def test_keyword_arguments_are_shared():
    fn = lambda p, x, y, *, scale, options: scale * options["c"] * loss(p, x, y)  # noqa: E731
    grads = per_sample_grad(fn)(P, X, Y, scale=torch.tensor(2.0, dtype=D), options={"c": 3.0})
    assert_close(grads, {k: 6 * v for k, v in per_sample_grad(loss)(P, X, Y).items()})


def test_values_and_aux_as_grad_and_value_returns_them():
    def fn(p, x, y):
        return loss(p, x, y), {"sum": x.sum(), "shared": p["b"] * 2, "pair": (y, x[0])}

    grads, (values, aux) = per_sample_grad_and_value(fn, has_aux=True)(P, X, Y)
    assert_close((grads, (values, aux)), reference.per_sample_grad_and_value(fn, has_aux=True)(P, X, Y))
    assert_close(per_sample_grad(fn, has_aux=True)(P, X, Y), (grads, aux))
    assert not any(isinstance(t, Batched) for t in optree.tree_leaves((grads, values, aux)))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 9])
def test_chunks_give_the_same(chunk_size):
    def fn(p, x, y):
        return loss(p, x, y), x * 2

    actual = per_sample_grad_and_value(fn, has_aux=True, chunk_size=chunk_size)(P, X, Y)
    assert_close(actual, per_sample_grad_and_value(fn, has_aux=True)(P, X, Y))


def test_at_most_chunk_size_samples_at_once():
    seen = []

    def fn(p, x, y):
        seen.append(x.n)
        return loss(p, x, y)

    per_sample_grad(fn, chunk_size=3)(P, X, Y)
    assert seen == [3, 1]


def test_fn_runs_once_for_the_whole_batch():
    calls = []
    per_sample_grad(lambda p, x, y: (calls.append(1), loss(p, x, y))[1])(P, X, Y)
    assert calls == [1]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_an_empty_batch(chunk_size):
    fn = lambda p, x, y: (loss(p, x, y), x * 2)  # noqa: E731
    grads, (values, aux) = per_sample_grad_and_value(fn, has_aux=True, chunk_size=chunk_size)(P, X[:0], Y[:0])
    assert {k: v.shape for k, v in grads.items()} == {"w": (0, 2, 3), "b": (0, 2)}
    assert values.shape == (0,)
    assert aux.shape == (0, 3)
    assert {t.dtype for t in (*grads.values(), values, aux)} == {D}


def test_an_unused_parameter_gets_zeros():
    grads = per_sample_grad(lambda p, x: (p["w"] @ x).sum())({"w": W, "b": B}, X)
    torch.testing.assert_close(grads["b"], torch.zeros(N, 2, dtype=D))


def test_a_loss_that_depends_on_no_sample():
    grads, values = per_sample_grad_and_value(lambda w, x: w.square().sum())(W, X)
    torch.testing.assert_close(grads, (2 * W).expand(N, 2, 3))
    torch.testing.assert_close(values, W.square().sum().expand(N))


def test_a_loss_that_depends_on_no_parameter():
    torch.testing.assert_close(per_sample_grad(lambda w, x: x.sum())(W, X), torch.zeros(N, 2, 3, dtype=D))


def test_module_with_keep_batch_dim():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten(), torch.nn.Linear(18, 5)).to(D)
    p = {k: v.detach() for k, v in net.named_parameters()}
    x, y = torch.randn(3, 1, 5, 5, dtype=D), torch.tensor([0, 3, 4])

    def fn(p, x, y):
        return F.cross_entropy(torch.func.functional_call(net, p, (x,)), y)

    actual = per_sample_grad(fn, keep_batch_dim=True)(p, x, y)
    assert_close(actual, loop(lambda p, x, y: fn(p, x[None], y[None]), (0,), (None, 0, 0))(p, x, y)[0])


@pytest.mark.parametrize("write", [lambda x: x.mul_(2), lambda x: x[1:].mul_(2), lambda x: F.relu_(x.view(-1)), lambda x: x.zero_()])
@pytest.mark.parametrize("recorded", [False, True])
def test_writing_into_a_batched_argument_writes_into_a_copy(write, recorded):
    def fn(w, x):
        before = x.sum()
        write(x)
        return ((w @ x).square() + before).sum()

    x, w = X.clone(), W.clone().requires_grad_(recorded)
    actual = per_sample_grad(fn)(w, x)
    torch.testing.assert_close(x, X)
    assert_close(actual, loop(fn, (0,), (None, 0))(W, X.clone())[0])


def test_writing_a_per_sample_value_into_a_shared_value_of_the_functions_own():
    def fn(p, x):
        h = torch.ones(1, 2, dtype=D) @ p["w"]  # shared until the next line
        h.add_(x)
        h[0, 1:] *= x[0]
        return h.tanh().sum() + h.square().sum()

    assert_close(per_sample_grad(fn)(P, X), loop(fn, (0,), (None, 0))(P, X)[0])


@pytest.mark.parametrize("look", [lambda h: h.view(-1), lambda h: h.detach(), lambda h: h[0], lambda h: h.t(), lambda h: h.expand(2, 3)])
@pytest.mark.parametrize("make", [lambda p: torch.ones(1, 2, dtype=D) @ p["w"], lambda p: p["w"][:1] * 2])
def test_a_write_into_a_shared_value_shows_in_its_views(look, make):
    def fn(p, x):
        h = make(p)
        v = look(h)
        h.add_(x)
        return v.square().sum() + h.sum()

    assert_close(per_sample_grad(fn)(P, X), loop(fn, (0,), (None, 0))(P, X)[0])


def test_writing_per_sample_values_into_fresh_tensors():
    def fn(p, x):
        out = torch.zeros(2, 3, dtype=D)
        for i in range(2):
            out[i] = p["w"][i] * x
        total = torch.tensor(0.0, dtype=D)
        total += out.square().sum()
        counts = torch.zeros(3, dtype=torch.int64)
        counts[(x > 0).long()] += 1
        return total + (counts * p["w"]).sum()

    assert_close(per_sample_grad(fn)(P, X), loop(fn, (0,), (None, 0))(P, X)[0])


def test_inputs_and_grad_fields_are_untouched():
    p = {k: v.clone().requires_grad_() for k, v in P.items()}
    before = [t.clone() for t in (*p.values(), X, Y)]
    per_sample_grad(loss)(p, X, Y)
    torch.testing.assert_close([t.detach() for t in (*p.values(), X, Y)], [t.detach() for t in before])
    assert all(t.grad is None for t in p.values())
    assert all(t.is_leaf for t in p.values())


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "negated"])
def test_layouts_of_inputs(layout):
    base = torch.randn(3, N, 8, dtype=D)
    x = {
        "transposed": base[..., 0].T,
        "strided": torch.randn(N, 6, dtype=D)[:, ::2],
        "expanded": torch.randn(3, dtype=D).expand(N, 3),
        "negated": torch.randn(N, 3, dtype=torch.complex128).conj().imag,
    }[layout]
    assert_close(per_sample_grad(loss)(P, x, Y), loop(loss, (0,), (None, 0, 0))(P, x, Y)[0])


def test_complex_parameters_and_conjugated_inputs():
    w = torch.randn(2, 3, dtype=torch.complex128)
    x = torch.randn(N, 3, dtype=torch.complex128).conj()

    def fn(w, x):
        return (w.conj() @ x * (w @ x.conj())).abs().sum()

    assert_close(per_sample_grad(fn)(w, x), loop(fn, (0,), (None, 0))(w, x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_parameters_dtype(dtype):
    p = {k: v.to(dtype) for k, v in P.items()}
    grads = per_sample_grad(loss)(p, X.to(dtype), Y.to(dtype))
    assert {g.dtype for g in grads.values()} == {dtype}
    mixed = per_sample_grad(lambda p, x, y: loss({k: v.float() for k, v in p.items()}, x, y))(p, X.float(), Y.float())
    assert {g.dtype for g in mixed.values()} == {dtype}


def test_a_zero_dim_per_sample_value_keeps_its_place_in_type_promotion():
    s = torch.randn(N, dtype=D)

    def fn(w, x, s):
        scaled = w * s  # float32 times a 0-dim float64 is float32
        assert scaled.dtype == torch.float32
        assert (s * torch.ones((), dtype=torch.float32)).dtype == D
        return (scaled @ x).sum()

    w, x = W.float(), X.float()
    torch.testing.assert_close(per_sample_grad(fn)(w, x, s)[1], torch.func.grad(fn)(w, x[1], s[1]))


def test_eight_threads_at_once():
    expected = per_sample_grad(loss)(P, X, Y)
    failures = []

    def work(i):
        try:
            for _ in range(10):
                scaled = per_sample_grad(lambda p, x, y: (i + 1) * loss(p, x, y))(P, X, Y)
                torch.testing.assert_close(scaled["w"], (i + 1) * expected["w"])
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def _live():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_nothing_is_kept_over_200_calls():
    def call():
        per_sample_grad(loss)(P, X, Y)
        with pytest.raises(ZeroDivisionError):
            per_sample_grad(lambda p, x, y: loss(p, x, y) / (1 // 0))(P, X, Y)

    call()
    before = _live()
    for _ in range(100):
        call()
    assert _live() <= before


def test_no_reference_cycle_keeps_memory_until_the_collector_runs():
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        for _ in range(5):
            per_sample_grad(loss)(P, X, Y)
        assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) <= before
    finally:
        gc.enable()


def test_dataclasses_unknown_to_optree_are_left_alone():
    @dataclasses.dataclass
    class Config:
        scale: float

    grads = per_sample_grad(lambda p, x, y, c: c.scale * loss(p, x, y))(P, X, Y, Config(2.0))
    assert_close(grads, {k: 2 * v for k, v in per_sample_grad(loss)(P, X, Y).items()})
