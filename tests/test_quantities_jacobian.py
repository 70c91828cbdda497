"""Every sample's Jacobian: outputs of any shape, against a loop over samples and outputs."""

from __future__ import annotations

import dataclasses

import optree
import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap

import per_sample
from per_sample import reference
from programs import BY_NAME, PROGRAMS, ints, real
from tree_oracle import assert_close

both = pytest.mark.parametrize("package", [per_sample, reference], ids=["per_sample", "reference"])


def outputs(program, *shape):
    """The first outputs of a program, in a shape; for a sample with an axis of its own, too."""
    count = torch.Size(shape).numel()

    def fn(*args):
        out = program.fn(*args).flatten()
        out = torch.view_as_real(out).flatten() if out.is_complex() else out
        return out[:count].reshape(shape)

    return fn


def by_loop(program, fn, *shape):
    """``[N, *shape, ...]``: the gradients of one output after the other."""
    count = torch.Size(shape).numel()
    columns = []
    for k in range(count):
        one = dataclasses.replace(program)
        one.__dict__["args"] = program.args
        object.__setattr__(one, "loss", lambda *args, k=k: fn(*args).flatten()[k])
        columns.append(one.grads)
    return optree.tree_map(lambda *g: torch.stack(g, 1).reshape(len(g[0]), *shape, *g[0].shape[1:]), *columns)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_as_a_loop(program):
    fn = outputs(program, 2)
    actual = per_sample.per_sample_jacobian(fn, **program.options)(*program.args)
    assert_close(actual, by_loop(program, fn, 2))


@both
@pytest.mark.parametrize("shape", [(), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["mixed", "cnn, keep_batch_dim", "frozen", "other order", "sample differentiated too", "own parameters"])
def test_outputs_of_any_shape(name, shape, package):
    program = BY_NAME[name]
    fn = outputs(program, *shape)
    actual = package.per_sample_jacobian(fn, **program.options)(*program.args)
    assert_close(actual, by_loop(program, fn, *shape))


def test_a_gradient_is_the_jacobian_of_a_scalar():
    program = BY_NAME["mixed"]
    torch.testing.assert_close(per_sample.per_sample_jacobian(program.loss)(*program.args), program.grads)


@both
@pytest.mark.parametrize("chunk_size", [1, 2, 9])
def test_chunks_and_auxiliary_values(chunk_size, package):
    program = BY_NAME["mlp"]
    fn = lambda p, x, y: (program.fn(p, x, y), {"x": x * 2, "name": "aux"})  # noqa: E731
    found, aux = package.per_sample_jacobian(fn, has_aux=True, chunk_size=chunk_size)(*program.args)
    assert_close(found, by_loop(program, program.fn, 2))
    assert_close(aux, {"x": program.args[1] * 2, "name": "aux"})


@both
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_numbers(randomness, package):
    def fn(p, x):
        return torch.nn.functional.dropout(p @ x, 0.5) * torch.rand(4)

    p, x = real(4, 3), real(5, 3)
    torch.manual_seed(0)
    expected = vmap(jacrev(fn), (None, 0), randomness=randomness)(p, x)
    torch.manual_seed(0)
    torch.testing.assert_close(package.per_sample_jacobian(fn, randomness=randomness)(p, x), expected)


@both
def test_an_empty_batch(package):
    found = package.per_sample_jacobian(lambda p, x: p["w"] @ x)({"w": real(4, 3), "b": real(2)}, real(0, 3))
    assert {k: tuple(v.shape) for k, v in found.items()} == {"w": (0, 4, 4, 3), "b": (0, 4, 2)}


def test_groups_that_run_apart():
    def fn(p, x, i):
        return p[i.item()] * x if x.sum() > 0 else p[0] * x.square()

    p, x, i = real(4, 3), real(5, 3), ints(4, 5)
    with per_sample.options(split_batch=True):
        found = per_sample.per_sample_jacobian(fn)(p, x, i)
    expected = torch.stack([torch.autograd.functional.jacobian(lambda q, k=k: fn(q, x[k], i[k]), p) for k in range(5)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "outer",
    [
        lambda f, p: vmap(f)(torch.stack([p, 2 * p])),
        lambda f, p: grad(lambda q: f(q).pow(3).sum())(p),
        lambda f, p: jvp(f, (p,), (p.cos(),)),
        lambda f, p: jacrev(f)(p),
    ],
    ids=["vmap", "grad", "jvp", "jacrev"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_compositions(outer):
    x = real(5, 6, 3)
    fn = lambda p, x: torch.tanh(x @ p).sum(0)  # noqa: E731
    p = real(3, 2)
    actual, expected = (outer(lambda q, package=package: package.per_sample_jacobian(fn)(q, x), p) for package in (per_sample, reference))
    torch.testing.assert_close(actual, expected)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_in_the_dtype_of_the_parameters(dtype, package):
    found = package.per_sample_jacobian(lambda p, x: p @ x)(torch.ones(2, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype))
    assert found.dtype == dtype
    assert_close(found, torch.eye(2)[None, :, :, None].expand(5, 2, 2, 3).to(dtype))


def test_complex_outputs_come_in_two_parts():
    w, x = real(2, 3), real(5, 3)
    wave = lambda w, x: torch.polar((w[0] @ x).exp(), w[1] @ x)  # noqa: E731
    with pytest.raises(per_sample.NotScalarError, match=r"real floating-point numbers.*complex128.*view_as_real"):
        per_sample.per_sample_jacobian(wave)(w, x)
    parts = lambda w, x: torch.view_as_real(wave(w, x))  # noqa: E731
    expected = torch.stack([torch.autograd.functional.jacobian(lambda v, one=one: parts(v, one), w) for one in x])
    assert_close(per_sample.per_sample_jacobian(parts)(w, x), expected)


@both
def test_what_is_no_tensor_is_refused(package):
    with pytest.raises((per_sample.PerSampleError, RuntimeError, TypeError) if package is reference else per_sample.PerSampleError):
        package.per_sample_jacobian(lambda p, x: "no tensor")(real(2, 3), real(5, 3))
