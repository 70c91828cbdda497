"""Scaled-down twins of the benchmark's workloads, for tests of whole training steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from models import GPT, Block, resnet18


@dataclass(frozen=True, eq=False)
class Workload:
    """A network and what it is given: ``data(n)`` draws the inputs and targets of a batch."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    # The network wants a batch axis, so that a sample is given to it as a batch of one.
    keep_batch_dim: bool = False

    def build(self) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
        """The loss of one sample, and the parameters."""
        torch.manual_seed(0)
        model = self.model().double()

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            out = functional_call(model, params, (x,))
            return F.cross_entropy(out.flatten(0, -2), y.flatten()) if out.dim() > 1 else F.cross_entropy(out, y)

        return loss, {name: p.detach().clone() for name, p in model.named_parameters()}


class Separable(nn.Sequential):
    """A depthwise convolution, then a pointwise one."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.GroupNorm(2, inner),
            nn.ReLU(),
            nn.Conv2d(inner, outer, 1, bias=False),
            nn.GroupNorm(2, outer),
            nn.ReLU(),
        )


class UntiedGPT(GPT):
    """The same with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index) + self.positions(torch.arange(index.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Sequence(nn.Module):
    """One transformer block over a sequence longer than the network is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(3, 4), Block(4, 2), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(-2))


class Lstm(nn.Module):
    """A plain ``nn.LSTM``, its last output classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class MeanEmbedding(nn.Module):
    """The mean of a text's embeddings, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(97, 4), nn.Linear(4, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.token(tokens).mean(-2))


class Experts(nn.Module):
    """A mixture of experts in which every token takes the best two, by a grouped product of all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(3, 4), nn.Linear(3, 6)
        self.up, self.down = nn.Parameter(torch.randn(4, 3, 7) / 2), nn.Parameter(torch.randn(4, 7, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)  # [t, 2]
        hidden = torch.einsum("ti,tkio->tko", x, self.up[chosen]).relu()
        mixed = torch.einsum("tko,tkoi,tk->ti", hidden, self.down[chosen], weights)
        return self.head((x + mixed).mean(0))


def _images(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(n, *shape, dtype=torch.float64), torch.randint(6, (n,)))


def _tokens(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (n, 9)), torch.randint(11, (n, 9))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mlp", lambda: nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 6)), _images(9)),
        Workload(
            "mnist-cnn",
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 8, 2, 3),
                nn.ReLU(),
                nn.MaxPool2d(2, 1),
                nn.Conv2d(4, 3, 4, 2),
                nn.ReLU(),
                nn.MaxPool2d(2, 1),
                nn.Flatten(-3),
                nn.Linear(12, 7),
                nn.ReLU(),
                nn.Linear(7, 6),
            ),
            _images(1, 21, 21),
        ),
        Workload(
            "convnet",
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3, padding=1),
                nn.ReLU(),
                nn.AvgPool2d(2),
                nn.Conv2d(4, 7, 3, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(-3),
                nn.Linear(7, 6),
            ),
            _images(3, 10, 10),
        ),
        Workload("resnet18-gn", lambda: resnet18(4, 6), _images(3, 18, 18), keep_batch_dim=True),
        Workload(
            "separable",
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3, 2, 1), Separable(4, 6), Separable(6, 10, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(-3), nn.Linear(10, 6)
            ),
            _images(3, 12, 12),
            keep_batch_dim=True,
        ),
        Workload(
            "audio",
            lambda: nn.Sequential(
                nn.Conv1d(1, 4, 80, 4),
                nn.ReLU(),
                nn.MaxPool1d(4),
                nn.Conv1d(4, 7, 3),
                nn.ReLU(),
                nn.AdaptiveAvgPool1d(1),
                nn.Flatten(-2),
                nn.Linear(7, 6),
            ),
            _images(1, 160),
        ),
        Workload(
            "conv3d",
            lambda: nn.Sequential(
                nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 7, 2), nn.ReLU(), nn.Flatten(-4), nn.Linear(7, 6)
            ),
            _images(2, 4, 4, 4),
        ),
        Workload("gpt-tied", GPT, _tokens),
        Workload("gpt", UntiedGPT, _tokens),
        Workload("long-transformer", Sequence, _images(40, 3)),
        Workload("lstm", Lstm, _images(10, 3), keep_batch_dim=True),
        Workload("embedding", MeanEmbedding, lambda n: (torch.randint(97, (n, 12)), torch.randint(6, (n,)))),
        Workload("moe", Experts, _images(10, 3)),
    )
}
