"""One function for each family of rules: of parameters and of what differs between the samples, at two sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """`make(n, small)` gives parameters and data `[n, ...]`; `total` is the sum of the losses of a batch."""

    name: str
    n: int
    make: Callable[[int, bool], tuple[Params, tuple[Tensor, ...]]]
    total: Callable[..., Tensor]

    def loss(self, params: Params, *sample: Tensor) -> Tensor:
        """The loss of one sample."""
        return self.total(params, *(x[None] for x in sample))


def _normed(norm: Callable[[Tensor, Params], Tensor], lead: tuple[int, ...], channels: int) -> tuple[object, object]:
    """A norm with a weight and a bias; its input is `[channels, *lead]`, or `[*lead, channels]` where a layer is normalised."""

    def make(n: int, small: bool) -> tuple[Params, tuple[Tensor, ...]]:
        c, sizes = (8, (2, 3)[: len(lead)]) if small else (channels, lead)
        shape = (n, *sizes, c) if norm is _layer_norm else (n, c, *sizes)
        return {"w": torch.randn(c), "b": torch.randn(c)}, (torch.randn(shape), torch.randn(shape))

    return make, lambda p, x, g: (norm(x, p) * g).sum()


def _layer_norm(x: Tensor, p: Params) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p["w"], p["b"])


def _group_norm(x: Tensor, p: Params) -> Tensor:
    return F.group_norm(x, 4, p["w"], p["b"])


def _instance_norm(x: Tensor, p: Params) -> Tensor:
    return F.instance_norm(x, weight=p["w"], bias=p["b"])


def _attention_data(n: int, small: bool) -> tuple[Params, tuple[Tensor, ...]]:
    t, d = (3, 8) if small else (64, 256)
    return {"qkv": torch.randn(3 * d, d) / d**0.5, "out": torch.randn(d, d) / d**0.5}, (torch.randn(n, t, d), torch.randn(n, t, d))


def _attention(p: Params, x: Tensor, g: Tensor) -> Tensor:
    n, t, d = x.shape
    q, k, v = (z.view(n, t, 4, d // 4).transpose(1, 2) for z in F.linear(x, p["qkv"]).split(d, -1))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return (F.linear(mixed.transpose(1, 2).reshape(n, t, d), p["out"]) * g).sum()


def _lstm_data(n: int, small: bool) -> tuple[Params, tuple[Tensor, ...]]:
    t, inner, hidden = (3, 4, 5) if small else (32, 64, 128)
    params = {k: p.detach() for k, p in nn.LSTM(inner, hidden).named_parameters()}
    return params, (torch.randn(n, t, inner), torch.randn(n, t, hidden))


def _lstm(p: Params, x: Tensor, g: Tensor) -> Tensor:
    zeros = x.new_zeros(1, x.shape[0], g.shape[2])
    return (torch.lstm(x, (zeros, zeros), list(p.values()), True, 1, 0.0, False, False, True)[0] * g).sum()


def _matrix_data(n: int, small: bool) -> tuple[Params, tuple[Tensor, ...]]:
    t, i, o = (3, 4, 5) if small else (48, 128, 256)
    return {"w": torch.randn(i, o)}, (torch.randn(n, t, i), torch.randn(n, t, o))


def _einsum_data(n: int, small: bool) -> tuple[Params, tuple[Tensor, ...]]:
    h, t, i, o = (2, 3, 4, 5) if small else (4, 32, 64, 96)
    return {"w": torch.randn(h, i, o)}, (torch.randn(n, t, h, i), torch.randn(n, h, t, o))


def _pointwise_data(n: int, small: bool) -> tuple[Params, tuple[Tensor, ...]]:
    shape = (3, 4) if small else (64, 256)
    return {"w": torch.randn(shape), "b": torch.randn(shape[1])}, (torch.randn(n, *shape), torch.randn(n, shape[0]))


def _pointwise(p: Params, x: Tensor, g: Tensor) -> Tensor:
    h = torch.tanh(x * p["w"] + p["b"]) * torch.sigmoid(x)
    return (h.softmax(-1).square().mean(-1) * g).sum() + h.logsumexp(-1).sum()


FAMILIES = (
    Family("layer norm", 16, *_normed(_layer_norm, (64,), 256)),  # type: ignore[arg-type]
    Family("group norm", 8, *_normed(_group_norm, (16, 16), 128)),  # type: ignore[arg-type]
    Family("instance norm", 8, *_normed(_instance_norm, (16, 16), 64)),  # type: ignore[arg-type]
    Family("attention", 16, _attention_data, _attention),
    Family("lstm", 32, _lstm_data, _lstm),
    Family("matmul", 32, _matrix_data, lambda p, x, g: ((x @ p["w"]) * g).sum()),
    Family("einsum", 16, _einsum_data, lambda p, x, g: (torch.einsum("nthi,hio->nhto", x, p["w"]) * g).sum()),
    Family("pointwise and reductions", 32, _pointwise_data, _pointwise),
)
