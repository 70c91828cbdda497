"""Inputs of every make: layouts, views, dtypes, devices without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

import per_sample as ps
from per_sample import per_sample_grad, per_sample_grad_and_value, reference
from tree_oracle import assert_close, loop

D = torch.float64
N = 4


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x).tanh().square().sum()


def complex_loss(w: Tensor, x: Tensor) -> Tensor:
    return (w.to(x.dtype) @ x).abs().square().sum()


def scaled_loss(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).sin().sum()


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


def cplx(*shape: int) -> Tensor:
    return torch.complex(real(*shape), real(*shape[::-1]).mT.reshape(shape))


W, X = real(2, 3), real(N, 3)
BUFFER = real(100)

LAYOUTS: dict[str, tuple[Tensor, Tensor]] = {
    "transposed parameter": (real(3, 2).T, X),
    "transposed samples": (W, real(3, N).T),
    "expanded parameter": (real(3).expand(2, 3), X),
    "expanded samples": (W, real(3).expand(N, 3)),
    "expanded within a sample": (W, real(N, 1).expand(N, 3)),
    "strided": (real(4, 9)[::2, ::3], real(N, 6)[:, 1::2]),
    "flipped by indices": (W.flip(0), X.flip(0, 1)),
    "storage offsets": (BUFFER[7:13].view(2, 3), BUFFER[20 : 20 + 3 * N].view(N, 3)),
    "views of one buffer that overlap": (BUFFER[:6].view(2, 3), BUFFER[3 : 3 + 3 * N].view(N, 3)),
    "samples that overlap": (W, BUFFER.as_strided((N, 3), (1, 1))),
    "negative bit, samples": (W, cplx(N, 3).conj().imag),
    "negative bit, parameter": (cplx(2, 3).conj().imag, X),
    "no features": (W[:, :0], X[:, :0]),
    "no outputs": (W[:0], X),
    "one sample": (W, X[:1]),
    "one expanded sample": (W, X[:1].expand(N, 3)),
    "parameter is a row of the samples": (X[:2], X),
}


def check(fn: Any, w: Tensor, x: Tensor, in_dims: Any = (None, 0), **options: Any) -> None:
    grads, values = per_sample_grad_and_value(fn, 0, in_dims, **options)(w, x)
    expected, expected_values = reference.per_sample_grad_and_value(fn, 0, in_dims)(w, x)
    assert (grads.dtype, grads.shape, grads.layout, grads.device) == (expected.dtype, expected.shape, expected.layout, expected.device)
    assert (values.dtype, values.shape) == (expected_values.dtype, expected_values.shape)
    assert not grads.is_conj()
    assert not grads.is_neg()
    assert_close(grads, loop(fn, (0,), in_dims)(w, x)[0])


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, chunk_size: int | None) -> None:
    w, x = LAYOUTS[name]
    before = w.clone(), x.clone()
    check(loss, w, x, chunk_size=chunk_size)
    torch.testing.assert_close((w, x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("w", "x"),
    [
        (cplx(2, 3).conj(), cplx(N, 3)),
        (cplx(2, 3), cplx(N, 3).conj()),
        (cplx(3, 2).mH, cplx(3, N).mH),
        (cplx(2, 3).to(torch.complex64), cplx(N, 3).to(torch.complex64).conj()),
        (W, cplx(N, 3)),
        (cplx(2, 3).real, cplx(N, 3).conj()),
    ],
    ids=["conj parameter", "conj samples", "both adjoint", "complex64", "real parameter", "real part"],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_complex(w: Tensor, x: Tensor, recorded: bool) -> None:
    check(complex_loss, w.detach().requires_grad_(recorded), x)


@pytest.mark.parametrize(("w", "x"), [(W, X[:, 0]), (W[0, 0], X), (W[0, 0], X[:, 0])], ids=["sample", "parameter", "both"])
def test_tensors_without_axes(w: Tensor, x: Tensor) -> None:
    check(scaled_loss, w, x)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("axis", range(-4, 4))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_images_with_the_sample_axis_anywhere(axis: int, memory_format: torch.memory_format, chunk_size: int | None) -> None:
    w = real(5, 3, 2, 2).contiguous(memory_format=memory_format)
    x = real(N, 3, 6, 7).contiguous(memory_format=memory_format).movedim(0, axis)

    def fn(w: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1).tanh().square().sum()

    for samples in (x, x.contiguous()):
        check(fn, w, samples, (None, axis), chunk_size=chunk_size)


@pytest.mark.parametrize("axes", [(0, 0), (1, -1), (2, 1), (-1, -2)])
def test_per_sample_parameters_with_the_sample_axis_anywhere(axes: tuple[int, int]) -> None:
    check(loss, real(N, 2, 3).movedim(0, axes[0]), X.movedim(0, axes[1]), axes)


def test_one_tensor_in_several_places() -> None:
    square = real(N, N)
    check(lambda w, x: (w @ x).sin().sum(), square, square)

    def twice(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (w @ x).dot((w @ y).sin())

    assert_close(per_sample_grad(twice)(W, X, X), loop(twice, (0,), (None, 0, 0))(W, X, X)[0])

    def two(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return (w @ x).dot((v @ x).sin())

    assert_close(per_sample_grad(two, (0, 1))(W, W, X), loop(two, (0, 1), (None, None, 0))(W, W, X))

    def tree(p: Any, x: Tensor) -> Tensor:
        return two(p["a"], p["b"], x)

    assert_close(per_sample_grad(tree)({"a": W, "b": W}, X), loop(tree, (0,), (None, 0))({"a": W, "b": W}, X)[0])


@pytest.mark.parametrize("which", ["parameter", "samples", "both"])
def test_inputs_that_require_grad(which: str) -> None:
    w = W.clone().requires_grad_(which != "samples")
    x = X.clone().requires_grad_(which != "parameter")
    results = [psg(loss)(w, x) for psg in (per_sample_grad, reference.per_sample_grad)]
    leaves = [t for t in (w, x) if t.requires_grad]
    found, expected = ([*torch.autograd.grad(g.square().sum(), leaves)] for g in results)
    torch.testing.assert_close(found, expected)


HALVES = [torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, *FLOAT8], ids=str)
def test_gradients_in_the_dtype_of_the_parameter(dtype: torch.dtype) -> None:
    w = W.to(dtype)
    grads, values = per_sample_grad_and_value(lambda w, x: loss(w.double(), x))(w, X)
    expected = loop(loss, (0,), (None, 0))(w.double(), X)[0]
    assert (grads.dtype, values.dtype) == (dtype, D)
    torch.testing.assert_close(grads.double(), expected.to(dtype).double(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_throughout(dtype: torch.dtype) -> None:
    w, x = W.to(dtype), X.to(dtype)
    actual = per_sample_grad(loss)(w, x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, loop(loss, (0,), (None, 0))(w, x)[0], rtol=2e-2, atol=2e-2)


def test_meta_tensors_give_shapes() -> None:
    grads, values = per_sample_grad_and_value(loss)(W.to("meta"), X.to("meta"))
    assert (grads.device.type, grads.shape, grads.dtype) == ("meta", (N, 2, 3), D)
    assert (values.device.type, values.shape, values.dtype) == ("meta", (N,), D)


def fused(w: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, w).tanh().sum()


QUANTITIES_ON_META = {
    "norms": (ps.per_sample_grad_norm(fused), (N,)),
    "clipped": (ps.clipped_grad(fused, 1.0), (2, 3)),
    "clipped, low": (ps.clipped_grad(fused, 1.0, memory="low", chunk_size=2), (2, 3)),
    "weighted": (ps.weighted_grad(fused, lambda norms: 1 / norms), (2, 3)),
    "gram": (ps.grad_gram(fused), (N, N)),
    "variance": (ps.grad_variance(fused), (2, 3)),
    "noise scale": (ps.gradient_noise_scale(fused), ()),
    "projected": (ps.projected_grad(fused, ps.GaussianProjector(5)), (N, 5)),
    "jacobian": (ps.per_sample_jacobian(lambda w, x: torch.nn.functional.linear(x, w)), (N, 2, 2, 3)),
}


@pytest.mark.parametrize("name", QUANTITIES_ON_META)
def test_quantities_of_meta_tensors_have_shapes(name: str) -> None:
    transform, shape = QUANTITIES_ON_META[name]
    found = transform(W.to("meta"), X.to("meta"))
    assert (found.device.type, found.shape) == ("meta", shape)


@pytest.mark.parametrize("active", [False, True])
def test_fake_tensors_give_shapes(active: bool) -> None:
    mode = FakeTensorMode()
    w, x = mode.from_tensor(W), mode.from_tensor(X)
    if active:
        with mode:
            grads, values = per_sample_grad_and_value(loss)(w, x)
    else:
        grads, values = per_sample_grad_and_value(loss)(w, x)
    assert isinstance(grads, FakeTensor)
    assert (grads.shape, grads.dtype, values.shape) == ((N, 2, 3), D, (N,))


def test_functional_tensors() -> None:
    assert_close(torch.func.functionalize(per_sample_grad(loss))(W, X), loop(loss, (0,), (None, 0))(W, X)[0])
    with FunctionalTensorMode():
        grads = per_sample_grad(loss)(FunctionalTensor.to_functional(W), FunctionalTensor.to_functional(X))
    assert isinstance(grads, FunctionalTensor)
    assert grads.shape == (N, 2, 3)


def test_inference_tensors() -> None:
    expected = loop(loss, (0,), (None, 0))(W, X)[0]
    with torch.inference_mode():
        w, x = W.clone(), X.clone()
        inside = per_sample_grad(loss)(w, x)
    assert_close(inside.clone(), expected)
    assert_close(per_sample_grad(loss)(w, x), expected)
    assert_close(per_sample_grad(loss)(W, x), expected)
