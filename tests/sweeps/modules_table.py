"""The modules: torch's own table of them, and those which it lacks."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

F64 = torch.float64


@dataclass(frozen=True)
class Entry:
    """One input of one module, which is in training or in evaluation mode."""

    module: str
    training: bool
    index: int
    build: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = F64

    @property
    def name(self) -> str:
        precision = "" if self.dtype == F64 else "-float32"
        return f"{self.module}{precision}/{'train' if self.training else 'eval'}/{self.index}"

    def make(self) -> nn.Module:
        """The module; a lazy one has seen its input."""
        module = self.build().to(self.dtype)
        if any(isinstance(p, nn.UninitializedParameter | nn.UninitializedBuffer) for p in (*module.parameters(), *module.buffers())):
            with torch.no_grad():
                module.eval()(*self.args, **self.kwargs)
        return module.train(self.training)


def listed() -> Iterator[Entry]:
    """Every entry: torch's in double precision, its LSTM also in single, where it takes another way, and ours."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        for training in (True, False):
            yield from _of_torch(info, training, F64)
            if info.module_cls is nn.LSTM:
                yield from _of_torch(info, training, torch.float32)
    for name, build, *shapes in MISSING:
        for training in (True, False):
            torch.manual_seed(1)
            args = tuple(s if isinstance(s, Tensor) else torch.randn(s, dtype=F64) for s in shapes)
            yield Entry(name, training, 0, build, args)


def _of_torch(info: Any, training: bool, dtype: torch.dtype) -> Iterator[Entry]:
    torch.manual_seed(0)
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    for index, one in enumerate(inputs):
        made, given = one.constructor_input, one.forward_input
        build = functools.partial(info.module_cls, *made.args, **made.kwargs)
        yield Entry(info.name, training, index, build, given.args, given.kwargs, dtype)


class Unpooled(nn.Module):
    """A pooling and its inverse."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[d](2, return_indices=True)
        self.unpool = {1: nn.MaxUnpool1d, 2: nn.MaxUnpool2d, 3: nn.MaxUnpool3d}[d](2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), 2, nn.LayerNorm(4))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu", norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _normed(norm: Callable[..., nn.Module], name: str = "weight", **options: Any) -> Callable[[], nn.Module]:
    return lambda: norm(nn.Linear(5, 5), name, **options)


_parametrizations = nn.utils.parametrizations
_INDEX = torch.tensor([[3, 1, 3, 0], [5, 6, 2, 2]])
_LABELS = torch.tensor([4, 0, 9])

# A name, how the module is made, and its inputs: tensors, or shapes to be drawn.
MISSING: list[Any] = [
    ("nn.Dropout", lambda: nn.Dropout(0.4), (4, 5)),
    ("nn.Dropout-inplace", lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.4, inplace=True)), (4, 5)),
    ("nn.Dropout1d", lambda: nn.Dropout1d(0.4), (2, 6, 5)),
    ("nn.Dropout2d", lambda: nn.Dropout2d(0.4), (2, 6, 5, 4)),
    ("nn.Dropout3d", lambda: nn.Dropout3d(0.4), (2, 6, 5, 4, 3)),
    ("nn.AlphaDropout", lambda: nn.AlphaDropout(0.4), (4, 5)),
    ("nn.FeatureAlphaDropout", lambda: nn.FeatureAlphaDropout(0.4), (2, 6, 5, 4)),
    ("nn.RReLU", nn.RReLU, (4, 5)),
    ("nn.RReLU-inplace", lambda: nn.Sequential(nn.Linear(5, 6), nn.RReLU(inplace=True)), (4, 5)),
    ("nn.MaxUnpool1d", lambda: Unpooled(1), (2, 3, 8)),
    ("nn.MaxUnpool2d", lambda: Unpooled(2), (2, 3, 8, 6)),
    ("nn.MaxUnpool3d", lambda: Unpooled(3), (2, 3, 4, 6, 8)),
    ("nn.EmbeddingBag", lambda: nn.EmbeddingBag(7, 5, mode="mean", padding_idx=2), _INDEX),
    ("nn.EmbeddingBag-max", lambda: nn.EmbeddingBag(7, 5, mode="max"), _INDEX),
    ("nn.Embedding-options", lambda: nn.Embedding(7, 5, padding_idx=2, scale_grad_by_freq=True), _INDEX),
    ("nn.Fold", lambda: nn.Fold((4, 5), (2, 3)), (2, 12, 9)),
    ("nn.Unfold", lambda: nn.Unfold((2, 3)), (2, 3, 4, 5)),
    ("nn.Flatten", nn.Flatten, (2, 3, 4)),
    ("nn.Unflatten", lambda: nn.Unflatten(1, (2, 3)), (2, 6, 4)),
    ("nn.ChannelShuffle", lambda: nn.ChannelShuffle(3), (2, 6, 4, 5)),
    ("nn.PixelShuffle", lambda: nn.PixelShuffle(2), (2, 8, 4, 5)),
    ("nn.PixelUnshuffle", lambda: nn.PixelUnshuffle(2), (2, 3, 4, 6)),
    ("nn.Upsample", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 4, 5)),
    ("nn.UpsamplingNearest2d", lambda: nn.UpsamplingNearest2d(scale_factor=2), (2, 3, 4, 5)),
    ("nn.CosineSimilarity", nn.CosineSimilarity, (4, 5), (4, 5)),
    ("nn.PairwiseDistance", nn.PairwiseDistance, (4, 5), (4, 5)),
    ("nn.TripletMarginLoss", lambda: nn.TripletMarginLoss(swap=True), (4, 5), (4, 5), (4, 5)),
    ("nn.TripletMarginWithDistanceLoss", nn.TripletMarginWithDistanceLoss, (4, 5), (4, 5), (4, 5)),
    ("nn.AdaptiveLogSoftmaxWithLoss", lambda: nn.AdaptiveLogSoftmaxWithLoss(5, 11, [3, 7], div_value=2.0), (3, 5), _LABELS),
    # The inputs of torch's table are no probabilities.
    ("nn.KLDivLoss-probabilities", nn.KLDivLoss, torch.linspace(-2, -0.5, 20, dtype=F64).view(4, 5), torch.full((4, 5), 0.2, dtype=F64)),
    ("nn.LazyLinear", lambda: nn.LazyLinear(6), (4, 5)),
    ("nn.LazyBatchNorm1d", nn.LazyBatchNorm1d, (4, 5)),
    ("nn.LazyInstanceNorm1d", lambda: nn.LazyInstanceNorm1d(affine=True, track_running_stats=False), (2, 3, 4)),
    ("nn.TransformerDecoder", _decoder, (2, 3, 4), (2, 5, 4)),
    ("nn.TransformerEncoder-prenorm", _encoder, (2, 3, 4)),
    ("nn.LSTM-projection", lambda: nn.LSTM(4, 5, 2, proj_size=3, bidirectional=True, batch_first=True), (2, 6, 4)),
    ("nn.LSTM-dropout", lambda: nn.LSTM(4, 5, 2, dropout=0.4), (6, 2, 4)),
    ("nn.GRU-dropout", lambda: nn.GRU(4, 5, 2, dropout=0.4), (6, 2, 4)),
    ("nn.MultiheadAttention-dropout", lambda: nn.MultiheadAttention(4, 2, dropout=0.4), (6, 2, 4), (5, 2, 4), (5, 2, 4)),
    ("weight_norm", _normed(_parametrizations.weight_norm), (4, 5)),
    ("weight_norm-last-axis", _normed(_parametrizations.weight_norm, dim=1), (4, 5)),
    ("spectral_norm", _normed(_parametrizations.spectral_norm), (4, 5)),
    ("orthogonal", _normed(_parametrizations.orthogonal), (4, 5)),
    ("orthogonal-cayley", _normed(_parametrizations.orthogonal, orthogonal_map="cayley"), (4, 5)),
    ("orthogonal-householder", _normed(_parametrizations.orthogonal, orthogonal_map="householder"), (4, 5)),
]
