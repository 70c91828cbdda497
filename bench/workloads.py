"""The table of workloads. To add one: a row in `WORKLOADS`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.models import Audio, Clips, Convnet, Experts, Gpt, Lstm, MeanEmbedding, Mlp, MnistCnn, ResNet18, Separable

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A network, its data, and its loss summed over the batch."""

    name: str
    n: int
    width: int
    model: Callable[[int], nn.Module]  # of a width: how many units or channels its layers have
    data: Callable[[int], tuple[Tensor, Tensor]]
    # (output, target) -> the SUM over samples, so that a method's answer needs no factor of n; with reduction="none" each sample's
    loss: Callable[..., Tensor]
    # whether the model needs a batch axis, so that a sample is given to it as a batch of one
    keep_batch_dim: bool

    def build(self, seed: int = 0) -> Task:
        """The same network and data for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model(self.width)
            x, y = self.data(self.n)
        return Task(self, model, x, y)


@dataclass(frozen=True)
class Task:
    """A workload with its weights and its data."""

    workload: Workload
    model: nn.Module
    x: Tensor
    y: Tensor
    # what `clipped` clips at: the median norm of the samples' gradients, once that is known
    max_norm: float = 1.0
    params: Params = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", {k: p.detach() for k, p in self.model.named_parameters()})

    def fn(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The loss: of one sample (with a batch axis of 1 where `keep_batch_dim`), or summed over a batch."""
        return self.workload.loss(functional_call(self.model, params, (x,)), y)

    def double(self) -> Task:
        """The same in float64."""
        x = self.x.double() if self.x.is_floating_point() else self.x
        return replace(self, model=self.copy_model().double(), x=x)

    def copy_model(self) -> nn.Module:
        """A model of its own for a method that hangs something on modules or parameters."""
        return copy.deepcopy(self.model)


def _floats(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(n, *shape), torch.randint(10, (n,)))


def _tokens(length: int, vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def make(n: int) -> tuple[Tensor, Tensor]:
        text = torch.randint(vocabulary, (n, length + 1))
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return make


def _labelled_tokens(length: int, vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randint(vocabulary, (n, length)), torch.randint(10, (n,)))


def _classify(logits: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(logits, y, reduction=reduction)


def _next_token(logits: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
    """The mean over positions, summed over samples or not."""
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=reduction)
    return (loss if reduction == "sum" else loss.view(y.shape).sum(-1)) / y.shape[-1]


_TABLE = (
    Workload("mlp", 128, 1024, lambda width: Mlp(784, width, width, 10), _floats(784), _classify, keep_batch_dim=False),
    Workload("mlp-tiny", 8, 32, lambda width: Mlp(16, width, width, 10), _floats(16), _classify, keep_batch_dim=False),
    Workload("mnist-cnn", 256, 16, MnistCnn, _floats(1, 28, 28), _classify, keep_batch_dim=True),
    Workload("convnet", 64, 32, Convnet, _floats(3, 28, 28), _classify, keep_batch_dim=True),
    Workload("resnet18-gn", 8, 64, ResNet18, _floats(3, 32, 32), _classify, keep_batch_dim=True),
    Workload("resnet18-gn-32", 32, 64, ResNet18, _floats(3, 32, 32), _classify, keep_batch_dim=True),
    Workload("separable", 32, 32, Separable, _floats(3, 32, 32), _classify, keep_batch_dim=True),
    Workload("audio", 16, 32, Audio, _floats(1, 8000), _classify, keep_batch_dim=True),
    Workload("conv3d", 16, 16, Clips, _floats(3, 8, 32, 32), _classify, keep_batch_dim=True),
    Workload("gpt", 16, 256, Gpt, _tokens(64, 1000), _next_token, keep_batch_dim=True),
    Workload("gpt-tied", 16, 256, partial(Gpt, tied=True), _tokens(64, 1000), _next_token, keep_batch_dim=True),
    Workload("gpt-long", 4, 64, partial(Gpt, length=1024, vocabulary=256, blocks=2), _tokens(1024, 256), _next_token, keep_batch_dim=True),
    Workload("lstm", 32, 128, Lstm, _floats(32, 64), _classify, keep_batch_dim=True),
    Workload("experts", 64, 64, Experts, _labelled_tokens(32, 1000), _classify, keep_batch_dim=True),
    Workload("embedding", 64, 128, MeanEmbedding, _labelled_tokens(64, 20000), _classify, keep_batch_dim=True),
)
WORKLOADS: dict[str, Workload] = {w.name: w for w in _TABLE}

# Not in the report: its kernels cost next to nothing, so that its time is that of the Python around them (`overhead`).
RESNET_TINY = Workload("resnet18-gn-tiny", 2, 4, ResNet18, _floats(3, 8, 8), _classify, keep_batch_dim=True)
