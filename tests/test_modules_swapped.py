"""A module that runs on other tensors: also where parts of it run again in the backward pass, and with nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.parametrize("kind", [False, True], ids=["without reentrance", "reentrant"])
def test_frozen_checkpointed_parts_run_again_on_what_is_bound(kind: bool) -> None:
    plain, checkpointed = pair("linears", kind)
    found = []
    for model in (plain, checkpointed):
        model.blocks.requires_grad_(False)
        loss = functional(model, F.mse_loss).bind({"blocks.0.0.weight": torch.ones(6, 4, dtype=D)})
        found.append(per_sample_grad(loss)(loss.params, *batch()))
    torch.testing.assert_close(found[1], found[0])


Loss = Callable[..., Tensor]


def _twice(loss: Loss, model: Blocks, p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return loss(p, x, y) + 3 * loss({name: 2 * v for name, v in p.items()}, x, y) + loss(p, 2 * x, y)


def _near_its_own(loss: Loss, model: Blocks, p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return loss(p, x, y) + sum(((p[name] - own.detach()) ** 2).sum() for name, own in model.named_parameters())


def _with_a_teacher(loss: Loss, model: Blocks, p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return loss(p, x, y) + loss(p, x, model(x[None]).detach()[0])


def _with_a_part(loss: Loss, model: Blocks, p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    first = functional(model.first, forward=lambda module, x: module(x).square().sum())
    part = {"weight": 2 * p["first.weight"], "bias": 3 * p["first.bias"]}
    return loss(p, x, y) + first(part, x) + loss(p, x, y) + first(part, 2 * x)


def _after_a_step(loss: Loss, model: Blocks, p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    steps = torch.autograd.grad(loss(p, x, y), list(p.values()), create_graph=False)
    return loss({name: v - 0.1 * step for (name, v), step in zip(p.items(), steps, strict=True)}, x, y)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("fn", [_twice, _near_its_own, _with_a_teacher, _with_a_part, _after_a_step])
def test_what_else_a_function_does_with_the_module(fn: Any, checkpoints: bool) -> None:
    plain, checkpointed = pair("linears", False)
    model = checkpointed if checkpoints else plain
    model.requires_grad_(True)
    loss = functional(model, F.mse_loss)
    x, y = batch()
    # The oracle: a copy for each set of parameters, so that nothing is exchanged.
    params = {name: p + 0.5 for name, p in loss.params.items()}
    expected = []
    for i in range(N):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        apart = functional(copy.deepcopy(plain), F.mse_loss)
        found = torch.autograd.grad(fn(apart, copy.deepcopy(plain), leaves, x[i], y[i]), list(leaves.values()))
        expected.append(dict(zip(leaves, found, strict=True)))
    actual = per_sample_grad(lambda p, x, y: fn(loss, model, p, x, y))(params, x, y)
    for name, g in actual.items():
        torch.testing.assert_close(g, torch.stack([one[name] for one in expected]))


def test_plain_autograd_through_checkpoints_with_other_parameters() -> None:
    plain, checkpointed = pair("linears", False)
    x, y = batch()
    found = []
    for model in (plain, checkpointed):
        loss = functional(model, F.mse_loss)
        leaves = {name: (p + 1).requires_grad_() for name, p in loss.params.items()}
        found.append(torch.autograd.grad(loss(leaves, x[0], y[0]), list(leaves.values())))
    torch.testing.assert_close(found[1], found[0])


def test_threads_take_turns() -> None:
    model, _ = pair("linears", False)
    loss = functional(model, F.mse_loss)
    x, y = batch()
    shifts = [0.0, 1.0, 2.0, 3.0]
    params = [{name: p + shift for name, p in loss.params.items()} for shift in shifts]
    expected = [per_sample_grad(loss)(p, x, y) for p in params]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, wanted in zip(pool.map(lambda p: per_sample_grad(loss)(p, x, y), params), expected, strict=True):
                torch.testing.assert_close(found, wanted)


def test_a_list_of_weights_and_a_normalised_weight_are_put_back() -> None:
    lstm = nn.LSTM(3, 4).to(D)
    loss = functional(lstm, forward=lambda lstm, x: lstm(x)[0].square().sum())
    per_sample_grad(loss)(loss.params, batch()[0])
    assert all(type(w) is nn.Parameter for w in lstm._flat_weights)
    copy.deepcopy(lstm)(batch()[0])
