"""A module that runs on other tensors: also where parts of it run again in the backward pass, and with nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from per_sample import (
    NotScalarError,
    SharedWriteError,
    clipped_grad,
    functional,
    per_sample_grad,
    per_sample_grad_norm,
)

N, D = 5, torch.float64


class Blocks(nn.Module):
    """Two blocks, checkpointed or not."""

    def __init__(self, kind: bool | None, block: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([block, nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sin()
        for block in self.blocks:
            h = block(h) if self.kind is None else checkpoint(block, h, use_reentrant=self.kind)
        return h


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w * self.w


BLOCKS = {
    "scale": Scaled,
    "linears": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)),
    "norm": lambda: nn.LayerNorm(4),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
}
TRANSFORMS = {
    "gradients": per_sample_grad,
    "norms": per_sample_grad_norm,
    "clipped": lambda loss, **options: clipped_grad(loss, max_norm=0.5, **options),
    "clipped, low": lambda loss, **options: clipped_grad(loss, max_norm=0.5, memory="low", **options),
}


def pair(block: str, kind: bool) -> tuple[Blocks, Blocks]:
    torch.manual_seed(0)
    plain = Blocks(None, BLOCKS[block]()).to(D)
    checkpointed = copy.deepcopy(plain)
    checkpointed.kind = kind
    return plain, checkpointed


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 2, 3, dtype=D, generator=generator), torch.randn(N, 2, 4, dtype=D, generator=generator)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every module made by a test holds plain tensors afterwards."""
    made: list[nn.Module] = []
    init = nn.Module.__init__

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__init__", recorded)
        yield
    for module in made:
        for table in (module._parameters, module._buffers):
            assert all(type(x) in (Tensor, nn.Parameter, type(None)) for x in table.values()), type(module)


@pytest.mark.parametrize("moved", [0.0, 1.0], ids=["own parameters", "other parameters"])
@pytest.mark.parametrize("kind", [False, True], ids=["without reentrance", "reentrant"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("block", BLOCKS)
def test_checkpointed_parts_run_again_on_the_same_parameters(block: str, transform: str, kind: bool, moved: float) -> None:
    plain, checkpointed = pair(block, kind)
    params = {name: p + moved for name, p in functional(plain, F.mse_loss).params.items()}
    expected = TRANSFORMS[transform](functional(plain, F.mse_loss))(params, *batch())
    for chunk_size in (None, 2):
        found = TRANSFORMS[transform](functional(checkpointed, F.mse_loss), chunk_size=chunk_size)(params, *batch())
        torch.testing.assert_close(found, expected)


def test_checkpointed_parts_run_again_on_what_is_bound() -> None:
    plain, checkpointed = pair("linears", False)
    found = []
    for model in (plain, checkpointed):
        model.blocks.requires_grad_(False)
        loss = functional(model, F.mse_loss).bind({"blocks.0.0.weight": torch.ones(6, 4, dtype=D)})
        found.append(per_sample_grad(loss)(loss.params, *batch()))
    torch.testing.assert_close(found[1], found[0])


def test_a_module_used_twice_with_other_parameters() -> None:
    model, _ = pair("linears", False)
    loss = functional(model, F.mse_loss)
    x, y = batch()

    def both(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        other = {name: 2 * p for name, p in params.items()}
        return loss(params, x, y) + 3 * loss(other, x, y) + loss(params, 2 * x, y)

    expected = torch.func.vmap(torch.func.grad(both), (None, 0, 0))(loss.params, x, y)
    torch.testing.assert_close(per_sample_grad(both)(loss.params, x, y), expected)


def test_an_error_half_way_leaves_the_module_as_it_was() -> None:
    model, _ = pair("linears", False)
    before = copy.deepcopy(model.state_dict())
    loss = functional(model, forward=lambda model, x: model(x))
    with pytest.raises(NotScalarError):
        per_sample_grad(loss)({name: p + 1 for name, p in loss.params.items()}, batch()[0])
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    model(batch()[0]).sum().backward()


class Averaging(nn.Module):
    """Assigns to its buffers instead of writing into them."""

    mean: Tensor
    steps: Tensor

    def __init__(self, per_sample: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.per_sample = per_sample
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.steps = self.steps + 1
        if self.per_sample:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean((0, 1))
        return h


def test_what_a_module_assigns_to_its_buffers_is_undone_or_refused() -> None:
    x, y = batch()
    model = Averaging(per_sample=False).to(D)
    loss = functional(model, F.mse_loss)
    found = per_sample_grad(loss)(loss.params, x, y)
    plain = functional(model.layer, F.mse_loss)
    expected = per_sample_grad(plain)(plain.params, x, y)
    torch.testing.assert_close(found["layer.weight"], expected["weight"])
    assert model.steps == 0
    model.per_sample = True
    with pytest.raises(SharedWriteError, match="to its buffer 'mean'"):
        per_sample_grad(loss)(loss.params, x, y)
    assert (model.steps, model.mean.sum()) == (0, 0)
    model(x)
