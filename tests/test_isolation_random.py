"""Leak hunting: small random programs; one sample's data are changed, the others' results must not be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import loop_grads
from per_sample import per_sample_grad_and_value

if TYPE_CHECKING:
    from collections.abc import Callable

N = 4


class Parameters:
    """Hands out parameters in the order the program asks for them; the first run makes them."""

    def __init__(self, made: list[Tensor] | None = None) -> None:
        self.made = [] if made is None else made
        self.first = made is None
        self.asked = 0

    def __call__(self, *shape: int) -> Tensor:
        if self.first:
            self.made.append(torch.randn(shape, dtype=torch.float64))
        self.asked += 1
        return self.made[self.asked - 1]


def _attention(h: Tensor, p: Parameters, i: Tensor) -> Tensor:
    k = h @ p(h.shape[1], h.shape[1])
    return F.scaled_dot_product_attention(h[None, None], k[None, None], h[None, None], is_causal=True)[0, 0]


def _written(h: Tensor, p: Parameters, i: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[: len(h) // 2 + 1] = h[: len(h) // 2 + 1] * p(h.shape[1])
    return out.index_add(0, i % len(h), h[i % len(h)])


# An op of the programs: from a matrix, the parameters, and indices `[3]` below 12 to a tensor of any shape.
OPS: dict[str, Callable[[Tensor, Parameters, Tensor], Tensor]] = {
    "linear": lambda h, p, i: F.linear(h, p(5, h.shape[1]), p(5)),
    "matmul": lambda h, p, i: p(4, len(h)) @ h,
    "self product": lambda h, p, i: h @ h.t() @ h,
    "conv1d": lambda h, p, i: F.conv1d(h[None], p(3, len(h), 3), p(3), padding=1)[0],
    "depthwise": lambda h, p, i: F.conv1d(h[None], p(len(h), 1, 3), padding=1, groups=len(h))[0],
    "conv2d": lambda h, p, i: F.conv2d(h[None], p(2, 1, 3, 3), padding=1),
    "conv_transpose": lambda h, p, i: F.conv_transpose1d(h, p(len(h), 2, 3), padding=1),
    "layer norm": lambda h, p, i: F.layer_norm(h, h.shape[1:], p(h.shape[1]), p(h.shape[1])),
    "group norm": lambda h, p, i: F.group_norm(torch.stack([h, h.sin()])[None], 1, p(2), p(2)),
    "rms norm": lambda h, p, i: F.rms_norm(h, h.shape[1:], p(h.shape[1])),
    "attention": _attention,
    "softmax": lambda h, p, i: F.softmax(h * p(h.shape[1]), 1),
    "log softmax": lambda h, p, i: F.log_softmax(h, 0),
    "embedding": lambda h, p, i: h.flatten()[0] * F.embedding(i, p(12, 4)),
    "embedding bag": lambda h, p, i: F.embedding_bag(i[None], p(12, 4)) + h.sum(),
    "gather": lambda h, p, i: h.gather(0, (i[:, None] % len(h)).expand(-1, h.shape[1])),
    "index": lambda h, p, i: h[i % len(h)] * p(1),
    "take along": lambda h, p, i: torch.take_along_dim(h, h.argsort(1), 1),
    "scatter": lambda h, p, i: torch.zeros(12, h.shape[1]).to(h).scatter_add(0, i[:1, None].expand_as(h[:1]), h[:1]),
    "write": _written,
    "one-hot": lambda h, p, i: F.one_hot(i, 12).to(h).sum(0)[:, None] * h.mean(0),
    "where": lambda h, p, i: torch.where(h > 0, h * p(h.shape[1]), h.square()),
    "masked fill": lambda h, p, i: h.masked_fill(h < p(h.shape[1]), 0.0),
    "sort": lambda h, p, i: h.sort(1).values,
    "topk": lambda h, p, i: h.topk(1, 0).values * p(h.shape[1]),
    "maximum": lambda h, p, i: h.max(0).values + h.amin(1).sum(),
    "median": lambda h, p, i: h.median(1).values,
    "cumulative": lambda h, p, i: h.cumsum(1).tanh().cumprod(0),
    "logsumexp": lambda h, p, i: torch.logsumexp(h * p(1), 1, keepdim=True) * h,
    "variance": lambda h, p, i: h.var(0, correction=0) + h.std(),
    "pool": lambda h, p, i: F.max_pool1d(h[None], 2, ceil_mode=True, stride=1)[0] if h.shape[1] > 1 else h,
    "average": lambda h, p, i: F.adaptive_avg_pool2d(h[None], (2, 3))[0],
    "interpolate": lambda h, p, i: F.interpolate(h[None], size=5, mode="linear")[0],
    "roll, flip, cat": lambda h, p, i: torch.cat([h.roll(1, 0), h.flip(1)]),
    "pad, unfold": lambda h, p, i: F.pad(h, (1, 1)).unfold(1, 2, 1),
    "norm": lambda h, p, i: F.normalize(h, dim=1) * h.norm(),
    "relu in place": lambda h, p, i: F.relu_(h * p(1)),
    "split by parameter": lambda h, p, i: torch.einsum("ab,cb,c->ac", h, p(3, h.shape[1]), p(3)),
    "bilinear": lambda h, p, i: F.bilinear(h, h.cos(), p(2, h.shape[1], h.shape[1])),
    "nan to num": lambda h, p, i: torch.nan_to_num(h),
    "triu, diagonal": lambda h, p, i: (h * p(1)).triu() + h.diagonal().sum(),
}


def program(names: list[str], p: Parameters, x: Tensor, i: Tensor) -> Tensor:
    h = x * p(*x.shape)
    for name in names:
        h = OPS[name](h, p, i)
        h = h.reshape(h.shape[0], -1) if h.dim() > 1 else h.reshape(1, -1)
        if h.numel() > 150:
            h = h[:7, :9]
    scores = h.flatten()
    return F.cross_entropy(scores[None], i[:1] % len(scores)) + scores.tanh().square().mean()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(sorted(OPS)), min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    j=st.integers(0, N - 1),
    kind=st.sampled_from(["other", "nan", "inf", "-inf", "1e200", "one number"]),
    chunk_size=st.sampled_from([None, None, 3]),
    seed=st.integers(0, 999),
)
def test_random_programs(names: list[str], shape: tuple[int, int], j: int, kind: str, chunk_size: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    x, i = torch.randn(N, *shape, dtype=torch.float64), torch.randint(0, 12, (N, 3))
    first = Parameters()
    program(names, first, x[0], i[0])

    def loss(params: list[Tensor], x: Tensor, i: Tensor) -> Tensor:
        return program(names, Parameters(params), x, i)

    transform: Any = per_sample_grad_and_value(loss, chunk_size=chunk_size)
    grads, values = transform(first.made, x, i)
    expected, expected_values = loop_grads(loss, first.made, [x, i])
    torch.testing.assert_close([*grads, values], [*expected, expected_values], equal_nan=True)

    changed_x, changed_i = x.clone(), i.clone()
    changed_i[j] = torch.randint(0, 12, (3,))
    if kind == "other":
        changed_x[j] = torch.randn(shape)
    elif kind == "one number":
        changed_x[j, 0, 0] = float("nan")
    else:
        changed_x[j] = float(kind)
    again, new_values = transform(first.made, changed_x, changed_i)
    rest = [k for k in range(N) if k != j]
    torch.testing.assert_close([g[rest] for g in (*again, new_values)], [g[rest] for g in (*grads, values)], rtol=0, atol=0, equal_nan=True)
