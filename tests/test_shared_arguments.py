"""Every layer with each of its tensors once shared by the samples and once one for each, in every combination."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from checked import score
from per_sample import explain, per_sample_grad

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

D = torch.float64
N = 3
aten = torch.ops.aten


def _fixed(x: Tensor, mean: Tensor, var: Tensor, w: Any = None, b: Any = None) -> Tensor:
    return F.batch_norm(x, mean.detach(), var.detach().square() + 0.5, w, b)


def _attention(q: Tensor, k: Tensor, v: Tensor, *mask: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, *mask, **options)


Q, K = (1, 2, 5, 4), (1, 2, 7, 4)
# The function, and the shapes of its tensors; a leading axis of size 1 is folded without a copy.
LAYERS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), [(1, 4, 5), (5,), (5,)]),
    "layer_norm of a row": (lambda x, w, b: F.layer_norm(x, (5,), w, b), [(5,), (5,), (5,)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (5,), w), [(1, 4, 5), (5,)]),
    "fused rms_norm": (lambda x, w: aten._fused_rms_norm(x, [5], w, 1e-5)[0], [(1, 4, 5), (5,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(1, 6, 5), (6,), (6,)]),
    "group_norm of a batch": (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 6, 4, 5), (6,), (6,)]),
    "group_norm with one group": (lambda x, w, b: F.group_norm(x, 1, w, b), [(1, 6, 5), (6,), (6,)]),
    "group_norm with one channel": (lambda x, w, b: F.group_norm(x, 1, w, b), [(1, 1, 5), (1,), (1,)]),
    "instance_norm with one channel": (lambda x, w, b: F.instance_norm(x, None, None, w, b), [(1, 1, 5), (1,), (1,)]),
    "batch_norm with one channel": (_fixed, [(1, 1, 5), (1,), (1,), (1,), (1,)]),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, None, None, w, b), [(1, 6, 5), (6,), (6,)]),
    "batch_norm": (_fixed, [(1, 6, 5), (6,), (6,), (6,), (6,)]),
    "batch_norm without weights": (_fixed, [(2, 6, 5), (6,), (6,)]),
    "batch_norm, own statistics": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), [(2, 6, 5), (6,), (6,)]),
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), [(4, 5, 2), (4, 1, 1)]),
    "weight_norm, last axis": (lambda v, g: torch._weight_norm(v, g, 2), [(4, 5, 2), (1, 1, 2)]),
    "attention": (_attention, [Q, K, K]),
    "attention of a batch": (_attention, [(2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 4)]),
    "attention, causal": (lambda q, k, v: _attention(q, k, v, is_causal=True), [Q, K, K]),
    "attention with a mask": (lambda q, k, v, m: _attention(q, k, v, m.detach()), [Q, K, K, (5, 7)]),
    "attention with a mask for each head": (lambda q, k, v, m: _attention(q, k, v, m.detach()), [Q, K, K, (1, 2, 5, 7)]),
    "attention with a differentiated mask": (_attention, [Q, K, K, (1, 2, 5, 7)]),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1), [(1, 4, 7), (6, 4, 3), (6,)]),
    "conv2d, groups": (lambda x, w, b: F.conv2d(x, w, b, groups=2, stride=2), [(2, 4, 7, 8), (6, 2, 3, 3), (6,)]),
    "conv_transpose1d": (lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, groups=2), [(2, 4, 7), (4, 3, 5), (6,)]),
}


# Torch takes the norms for constants when it differentiates weight_norm twice.
PLAIN: dict[str, Callable[..., Tensor]] = {
    "weight_norm": lambda v, g: v * (g / v.norm(dim=(1, 2), keepdim=True)),
    "weight_norm, last axis": lambda v, g: v * (g / v.norm(dim=(0, 1), keepdim=True)),
}


def _loop(loss: Callable[..., Tensor], tensors: list[Tensor], batched: tuple[bool, ...], scale: Tensor) -> list[Tensor]:
    """By plain autograd, keeping the graph; the fused attention kernels have no second derivative."""
    rows = []
    with sdpa_kernel(SDPBackend.MATH):
        for i in range(N):
            leaves = [t[i] if own else t.clone() for t, own in zip(tensors, batched, strict=True)]
            found = torch.autograd.grad(loss(*leaves, scale[i]), leaves, create_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _close(got: Any, want: Any, batched: tuple[bool, ...]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, msg=lambda text: f"{batched}: {text}")


@pytest.mark.parametrize("name", LAYERS)
def test_shared_and_own_arguments(name: str) -> None:
    """The gradients, and what the caller gets by differentiating them once more."""
    torch.manual_seed(0)
    layer, shapes = LAYERS[name]
    scale = torch.randn(N, *layer(*(torch.randn(s, dtype=D) for s in shapes)).shape, dtype=D)

    def loss(*args: Tensor) -> Tensor:
        return score(layer(*args[:-1]) * args[-1])

    def plain(*args: Tensor) -> Tensor:
        return score(PLAIN.get(name, layer)(*args[:-1]) * args[-1])

    for batched in itertools.product([False, True], repeat=len(shapes)):
        # Samples that do not lie one after the other in memory: some kernels take it for granted.
        tensors = [torch.randn(2 * N, *s, dtype=D)[::2] if own else torch.randn(s, dtype=D) for s, own in zip(shapes, batched, strict=True)]
        inputs = [t.detach().requires_grad_() for t in tensors]
        expected = _loop(plain, inputs, batched, scale)
        options: Any = {"argnums": tuple(range(len(shapes))), "in_dims": (*(0 if own else None for own in batched), 0)}
        _close(per_sample_grad(loss, **options)(*tensors, scale), expected, batched)
        assert "loop" not in explain(loss, **options)(*tensors, scale).routes()
        recorded = per_sample_grad(loss, **options)(*inputs, scale)
        _close(recorded, expected, batched)
        twice = [torch.autograd.grad(score(g), inputs, allow_unused=True, materialize_grads=True) for g in (recorded, expected)]
        _close(*twice, batched)
