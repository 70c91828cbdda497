"""Model families of ``transformers``, unchanged and small, against a loop of plain autograd over the samples."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from per_sample import PerSampleError, explain, options, per_sample_grad, reference

from .families_decoders import DECODERS
from .families_detection import DETECTION
from .families_encoders import BOTH, ENCODERS
from .families_experts import EXPERTS
from .families_images import IMAGES, VIDEO
from .families_senses import PAIRS, SERIES, SOUND
from .tally import Case, Finding, routes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from .families_model import Config, Family, Inputs

FAMILIES = (*DECODERS, *EXPERTS, *ENCODERS, *BOTH, *IMAGES, *DETECTION, *VIDEO, *SOUND, *PAIRS, *SERIES)
N = 3
# The largest error relative to a leaf's scale, and the smallest scale relative to the whole model's.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
FLOOR = {torch.float64: 1e-5, torch.float32: 1e-3}
# A quick choice that meets every kind of model.
FEW = ("bert", "llama", "mixtral", "t5", "vit", "resnet", "mamba", "wav2vec2")


class Float64(TorchFunctionMode):
    """Models that compute in float32 inside, for the range of half precision, compute in float64: rounding would hide mistakes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


class WrittenOut(TorchFunctionMode):
    """Batch norm in eval mode, for the loop only: its gradient in torch 2.13 is wrong for one image and a gradient of permuted strides."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and not (args[5:6] or ((kwargs or {})["training"],))[0]:
            return batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def batch_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool, momentum: float, eps: float) -> Tensor:
    """Batch norm with fixed statistics."""
    shape = (-1, *(1,) * (x.dim() - 2))
    return (x - mean.view(shape)) * (weight / (var + eps).sqrt()).view(shape) + bias.view(shape)


@contextmanager
def float64() -> Iterator[None]:
    """Everything in float64, also what the model makes in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def score(x: Tensor) -> Tensor:
    """A scalar that depends on every element, each in its own way."""
    weights = torch.arange(1, x.numel() + 1, dtype=x.dtype).cos().reshape(x.shape)
    return (x.sin() * (1 + weights / 2)).mean()


def loss_of(family: Family, model: nn.Module, names: list[str]) -> Callable[..., Tensor]:
    """The loss of one sample: the model's own, or a score of its outputs."""

    def loss(params: Any, buffers: Any, *values: Tensor) -> Tensor:
        out = functional_call(model, (params, buffers), kwargs=dict(zip(names, values, strict=True)))
        if getattr(out, "loss", None) is not None:
            return out.loss
        outputs = family.outputs or [k for k, x in out.items() if isinstance(x, Tensor) and x.requires_grad]
        return torch.stack([score(out[k]).double() for k in outputs]).sum()

    return loss


def loop(loss: Callable[..., Tensor], params: dict[str, Tensor], buffers: Any, values: list[Tensor]) -> dict[str, Tensor]:
    """Every sample's gradients by plain autograd, one sample after the other."""
    rows = []
    for i in range(N):
        leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
        copies = {k: b.clone() for k, b in buffers.items()}
        with WrittenOut():
            value = loss(leaves, copies, *(v[i : i + 1] for v in values))
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), found, strict=True)])
    return {k: torch.stack(column) for k, column in zip(params, zip(*rows, strict=True), strict=True)}


def worst(got: dict[str, Tensor], want: dict[str, Tensor], floor: float) -> tuple[float, str]:
    """The largest error of a leaf, relative to its scale, and its name.

    A leaf whose gradient is zero but for rounding, such as the bias of keys in attention, is measured by the whole model's scale.
    """
    whole = max(w.abs().max().item() for w in want.values() if w.numel())
    errors = {}
    for k, w in want.items():
        if w.numel():
            error = (got[k] - w).abs().max().item() / max(w.abs().max().item(), floor * whole)
            errors[k] = error if error == error else float("inf")
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a family."""

    suffix: str
    inputs: Callable[[int], Inputs]
    config: Config = dataclasses.field(default_factory=dict)
    train: bool = False
    # Whether samples may go different ways through the model.
    split: bool = False
    dropout: bool = False
    experts: str | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)


def variants(family: Family) -> list[Variant]:
    """The ways that a family is run."""
    found = [Variant("", family.inputs)]
    if family.train:
        found.append(Variant("-train", family.inputs, train=True))
    if family.with_dropout is not None:
        found.append(Variant("-dropout", family.inputs, family.with_dropout, train=True, dropout=True))
    if family.padded is not None:
        found.append(Variant("-padded", functools.partial(family.padded, least=2)))
        # Some samples have padding and some have none, and models ask.
        found.append(Variant("-ragged", functools.partial(family.padded, least=0), split=True))
    if family.experts:
        found = [dataclasses.replace(v, experts="batched_mm") for v in found]
        found.append(Variant("-loop", family.inputs, experts="eager", split=True))
        found.append(Variant("-grouped", family.inputs, experts="grouped_mm", dtypes=(torch.float32,)))
    return found


def check(family: Family, variant: Variant) -> Finding:
    """One family, run one way, in float64 throughout and in the dtypes that people use."""
    name = f"families/{family.name}{variant.suffix}"
    routes: frozenset[tuple[str, str]] = frozenset()
    for dtype in variant.dtypes:
        with float64() if dtype is torch.float64 else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity_error()
            try:
                run = Run(family, variant, dtype)
                want = run.expected()
            except Exception as err:
                return Finding(name, "void", described(err))
            if not any(w.count_nonzero() for w in want.values()):
                return Finding(name, "void", "all gradients are zero")
            try:
                with options(split_batch=variant.split or family.split):
                    got, routes = run.ours()
            except PerSampleError as err:
                return Finding(name, "refused", described(err))
            except Exception as err:
                return Finding(name, "raw", described(err))
        error, leaf = worst(got, want, FLOOR[dtype])
        if error > TOLERANCE[dtype]:
            return Finding(name, "wrong", f"{leaf}: relative error {error:.1e} in {dtype}", routes)
    return Finding(name, "right", routes=routes)


def described(err: Exception) -> str:
    """An error in one line."""
    return f"{type(err).__name__}: {(str(err).splitlines() or [''])[0]}"


class Run:
    """A model with one batch of inputs."""

    def __init__(self, family: Family, variant: Variant, dtype: torch.dtype) -> None:
        self.variant = variant
        self.randomness = "different" if variant.dropout else family.randomness
        model = family.build(variant.config, variant.experts).to(dtype).train(variant.train)
        self.params = {k: p.detach() for k, p in model.named_parameters()}
        self.buffers = dict(model.named_buffers())
        torch.manual_seed(1)
        batch = {k: x.to(dtype) if x.is_floating_point() else x for k, x in variant.inputs(N).items()}
        self.samples = list(batch.values())
        self.dims = (None, None, *(0 for _ in batch))
        self.loss = loss_of(family, model, list(batch))

    def expected(self) -> dict[str, Tensor]:
        """Every sample's gradients by a loop; with dropout by ``vmap``, which draws the same numbers."""
        if self.variant.dropout:
            torch.manual_seed(2)
            return reference.per_sample_grad(self.loss, in_dims=self.dims, keep_batch_dim=True, randomness=self.randomness)(
                self.params, self.buffers, *self.samples
            )
        return loop(self.loss, self.params, self.buffers, self.samples)

    def ours(self) -> tuple[dict[str, Tensor], frozenset[tuple[str, str]]]:
        """The same by this library, and the ops that ran."""
        settings = {"in_dims": self.dims, "keep_batch_dim": True, "randomness": self.randomness}
        arguments = (self.params, self.buffers, *self.samples)
        torch.manual_seed(2)
        got = per_sample_grad(self.loss, **settings)(*arguments)
        return got, routes_of(explain(self.loss, **settings)(*arguments))


def cases(*, whole: bool) -> list[Case]:
    """Every family in every variant, or a few families in those that differ most."""
    return [
        Case(f"families/{family.name}{variant.suffix}", functools.partial(check, family, variant))
        for family in FAMILIES
        if whole or family.name in FEW
        for variant in variants(family)
        if whole or variant.suffix != "-train"
    ]
