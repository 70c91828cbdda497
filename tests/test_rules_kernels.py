"""Ops that plain CPU programs do not reach: called by name, or on meta tensors for their shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from per_sample import per_sample_grad, per_sample_grad_and_value
from versions import skip_if_lacking

aten = torch.ops.aten
N = 3


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.float16)


def _bias_from(b: Tensor) -> Tensor:
    return b.expand(2, 6, 8, 8)


ATTENTION = {
    "flash": lambda q: aten._scaled_dot_product_flash_attention(q, q, q, 0.0, True),
    "efficient": lambda q: aten._scaled_dot_product_efficient_attention(q, q, q, None, True),
    "efficient-shared-bias": lambda q: aten._scaled_dot_product_efficient_attention(q, q, q, _meta(2, 6, 8, 8), True),
    "efficient-own-bias": lambda q: aten._scaled_dot_product_efficient_attention(q, q, q, _bias_from(q[:, :1, :, :8]), True),
    "cudnn": lambda q: aten._scaled_dot_product_cudnn_attention(q, q, q, None, True, 0.0, True),
    "overrideable": lambda q: aten._scaled_dot_product_fused_attention_overrideable(q, q, q),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_shapes_on_meta(name: str) -> None:
    if name == "overrideable":
        skip_if_lacking("overrideable on meta")

    def loss(p: Tensor, x: Tensor) -> Tensor:
        out = ATTENTION[name](x * p)[0]
        assert out.shape == (2, 6, 8, 16)
        return out.sum()

    grad = per_sample_grad(loss)(_meta(2, 6, 8, 16), _meta(N, 2, 6, 8, 16))
    assert grad.shape == (N, 2, 6, 8, 16)


_MEAN, _VAR = torch.linspace(-1, 1, 6).double(), torch.linspace(0.5, 2, 6).double()

BATCH_NORM = {
    "cudnn": lambda x, w, b: aten.cudnn_batch_norm(x, w, b, _MEAN, _VAR, False, 0.1, 1e-5)[0],
    "miopen": lambda x, w, b: aten.miopen_batch_norm(x, w, b, _MEAN, _VAR, False, 0.1, 1e-5)[0],
    "no_training": lambda x, w, b: aten._native_batch_norm_legit_no_training(x, w, b, _MEAN, _VAR, 0.1, 1e-5)[0],
    "no_update": lambda x, w, b: aten._batch_norm_no_update(x, w, b, _MEAN, _VAR, 0.1, 1e-5)[0],
    "no_stats": lambda x, w, b: aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5)[0],
}


@pytest.mark.parametrize("name", BATCH_NORM)
def test_batch_norm_overloads(name: str) -> None:
    torch.manual_seed(0)
    params = (torch.randn(6).double(), torch.randn(6).double())
    x = torch.randn(N, 2, 6, 4).double()

    def own(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if name == "no_stats":
            return F.batch_norm(x, None, None, w, b, training=True)
        return F.batch_norm(x, _MEAN, _VAR, w, b)

    def values_and_grads(norm: Any) -> Any:
        return per_sample_grad_and_value(lambda p, x: norm(x * p[0].view(6, 1), *p).sin().sum())(params, x)

    torch.testing.assert_close(values_and_grads(BATCH_NORM[name]), values_and_grads(own))


@pytest.mark.parametrize("functional", [False, True])
def test_cudnn_batch_norm_backward_with_own_statistics(functional: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(6).double().requires_grad_(functional)
    x, g = torch.randn(N, 2, 6, 4).double(), torch.randn(N, 2, 6, 4).double()

    def by_name(p: Tensor, x: Tensor, g: Tensor) -> Any:
        _, mean, invstd = aten.native_batch_norm(x, p, None, None, None, True, 0.1, 1e-5)
        grads = aten.cudnn_batch_norm_backward(x, g, p, None, None, mean, invstd, 1e-5, x.new_empty(0))
        return p.sum(), grads

    _, (_, got) = per_sample_grad_and_value(by_name, has_aux=True)(w, x, g)
    for i in range(N):
        leaves = (x[i].clone().requires_grad_(), w.detach().clone().requires_grad_(), torch.zeros(6).double().requires_grad_())
        out = F.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
        want = torch.autograd.grad(out, leaves, g[i])
        torch.testing.assert_close([y[i].detach() for y in got], list(want))


@pytest.mark.parametrize("functional", [False, True])
def test_fused_rms_norm_backward(functional: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(5).double().requires_grad_(functional)
    x, g = torch.randn(N, 2, 4, 5).double(), torch.randn(N, 2, 4, 5).double()

    def by_name(p: Tensor, x: Tensor, g: Tensor) -> Any:
        rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        with torch.no_grad():
            grads = aten._fused_rms_norm_backward(g, x, [5], rstd, p, [True, True])
        return p.sum(), grads

    _, (_, got) = per_sample_grad_and_value(by_name, has_aux=True)(w, x, g)
    for i in range(N):
        leaves = (x[i].clone().requires_grad_(), w.detach().clone().requires_grad_())
        want = torch.autograd.grad(F.rms_norm(leaves[0], (5,), leaves[1], 1e-6), leaves, g[i])
        torch.testing.assert_close([y[i].detach() for y in got], list(want))


def test_embedding_bag_divides_by_frequencies() -> None:
    """Compared with ``F.embedding``: torch's own kernel on a CPU divides by the counts of other rows."""
    torch.manual_seed(0)
    w, index = torch.randn(7, 4).double(), torch.randint(0, 7, (N, 2, 12))
    got = per_sample_grad(lambda p, i: F.embedding_bag(i, p, mode="sum", scale_grad_by_freq=True).sin().sum())(w, index)
    want = per_sample_grad(lambda p, i: F.embedding(i, p, scale_grad_by_freq=True).sum(-2).sin().sum())(w, index)
    torch.testing.assert_close(got, want)


def test_an_axis_out_of_range_never_reaches_the_sample_axis() -> None:
    x = torch.randn(N, 4, 5)
    for op in (
        lambda y: y.sum(-3),
        lambda y: y.transpose(0, -3),
        lambda y: y.softmax(-3),
        lambda y: y.unsqueeze(-4),
        lambda y: y.select(-3, 0),
        lambda y: torch.cat([y, y], -3),
        lambda y: y.flip(-3),
        lambda y: F.pad(y, (0, 0, 0, 0, 1, 1)),
    ):
        with pytest.raises((IndexError, RuntimeError)):
            per_sample_grad(lambda p, x, op=op: op(p * x).sum())(torch.ones(()), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mixed", [False, True])
def test_norms_keep_the_parameters_dtype(dtype: torch.dtype, mixed: bool) -> None:
    torch.manual_seed(0)
    own = torch.float32 if mixed else dtype
    w, x = torch.randn(2, 6, dtype=own), torch.randn(N, 2, 6, 6).to(dtype)
    grads = per_sample_grad(lambda p, x: F.layer_norm(x, (6,), p[0], p[1]).float().sin().sum())(w, x)
    assert grads.dtype == own
    want = per_sample_grad(lambda p, x: F.layer_norm(x, (6,), p[0], p[1]).sin().sum())(w.double(), x.double())
    torch.testing.assert_close(grads.double(), want, rtol=0.05, atol=0.1)
