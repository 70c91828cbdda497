"""``call_for_per_sample_grads``: the same call, ``grad_sample`` and refusals as ``torch.nn.utils`` has, and right where that is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads as of_torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from checked import score
from per_sample import BatchNormError, ModuleCallError, call_for_per_sample_grads

D = torch.float64
N = 5


def images(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=D)


# Module, arguments, axis of the samples in each, options.
MODULES: dict[str, tuple[Any, Any, tuple[int, ...], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(4, 3), lambda: [images(4)], (0,), {}),
    "linear-of-rank-4": (lambda: nn.Linear(4, 3), lambda: [images(2, 6, 4)], (0,), {}),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding="same", groups=2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten()),
        lambda: [images(2, 6, 7)],
        (0,),
        {},
    ),
    "norms": (lambda: nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.LayerNorm(7)), lambda: [images(3, 7)], (0,), {}),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda: [images(6, 4), images(7, 4), images(7, 4)], (0, 0, 0), {}),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, batch_first=True), lambda: [images(6, 4)], (0,), {}),
    "lstm-time-first": (lambda: nn.LSTM(4, 3), lambda: [torch.randn(6, N, 4, dtype=D)], (1,), {"batch_first": False}),
    "gru-as-many-layers-as-samples": (
        lambda: nn.GRU(4, 3, num_layers=N),
        lambda: [torch.randn(6, N, 4, dtype=D), torch.randn(N, N, 3, dtype=D)],
        (1, 1),
        {"batch_first": False, "batch_size": N},
    ),
    "complex": (lambda: nn.Linear(4, 3, dtype=torch.complex128), lambda: [torch.randn(N, 4, dtype=torch.complex128)], (0,), {}),
}


def looped(module: nn.Module, args: list[Tensor], dims: tuple[int, ...], loss: Any) -> list[Tensor]:
    """Every sample's gradients by plain autograd."""
    leaves = [p for p in module.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(loss(module(*(x.narrow(d, i, 1) for x, d in zip(args, dims, strict=True)))), leaves) for i in range(N)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    torch.manual_seed(0)
    make, draw, dims, options = MODULES[name]
    module, args = make(), draw()
    module = module if name == "complex" else module.double()
    given = [x.clone().requires_grad_() for x in args]
    out = call_for_per_sample_grads(module, **options)(*given)
    torch.testing.assert_close(out, module(*args))
    weights = torch.linspace(1, 2, N, dtype=D)
    total = _weighed(out, weights, dims[0])
    total.backward()
    for p, rows in zip(
        module.parameters(), looped(module, args, dims, lambda o: _weighed(o, torch.ones(1, dtype=D), dims[0])), strict=True
    ):
        torch.testing.assert_close(p.grad_sample, torch.stack([w * g for w, g in zip(weights, rows, strict=True)]))
        assert p.grad is None
    plain = [x.clone().requires_grad_() for x in args]
    expected = torch.autograd.grad(_weighed(module(*plain), weights, dims[0]), plain)
    torch.testing.assert_close([x.grad for x in given], list(expected))


def _weighed(out: Any, weights: Tensor, axis: int) -> Tensor:
    """A loss to which each sample contributes on its own."""
    first, *states = out if isinstance(out, tuple) else (out,)
    rows = _rows(first, axis)
    rows = rows + sum((_rows(s, 1) for s in states if isinstance(s, Tensor) and s.dim() == 3 and s.shape[1] == len(weights)), rows * 0)
    return (rows * weights).sum()


def _rows(x: Tensor, axis: int) -> Tensor:
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.movedim(axis, 0).flatten(1).sin().sum(1)


@pytest.mark.parametrize("name", ["linear", "conv", "norms"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_numbers_of_torchs_own(name, reduction):
    torch.manual_seed(0)
    make, draw, _, _ = MODULES[name]
    module, args = make().double(), draw()
    reduce = torch.sum if reduction == "sum" else torch.mean
    found = []
    for function in (of_torch, call_for_per_sample_grads):
        reduce(function(module, loss_reduction=reduction)(*args).flatten(1).sin().sum(1)).backward()
        found.append([p.grad_sample for p in module.parameters()])
        for p in module.parameters():
            p.grad_sample = None
    torch.testing.assert_close(*found)


def test_packed_sequences():
    torch.manual_seed(0)
    layer = nn.LSTM(4, 3, bidirectional=True).double()
    sequences = [torch.randn(n, 4, dtype=D) for n in (3, 6, 1, 6)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    out, (h, c) = call_for_per_sample_grads(layer)(packed)
    torch.testing.assert_close((out.data, h, c), (lambda o, s: (o.data, *s))(*layer(packed)))
    (out.data.sin().sum() + h.square().sum()).backward()
    for i, sequence in enumerate(sequences):
        one, (last, _) = layer(pack_sequence([sequence]))
        expected = torch.autograd.grad(one.data.sin().sum() + last.square().sum(), list(layer.parameters()))
        torch.testing.assert_close([p.grad_sample[i] for p in layer.parameters()], list(expected))


def test_dropout_meets_the_same_numbers_in_both_passes():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.5)).double()
    out = call_for_per_sample_grads(module)(images(4))
    state = torch.get_rng_state()
    (out.square().sum() / 2).backward()
    assert torch.equal(state, torch.get_rng_state())
    kept = out != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(module[2].bias.grad_sample, out * 2)


def test_frozen_parameters_and_several_backward_passes():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    module[0].requires_grad_(False)
    x = images(4)
    call = call_for_per_sample_grads(module)
    call(x).sum().backward()
    first = module[1].weight.grad_sample.clone()
    assert not hasattr(module[0].weight, "grad_sample")
    call(x).sum().backward()
    torch.testing.assert_close(module[1].weight.grad_sample, 2 * first)


def test_keyword_arguments():
    module = nn.Linear(4, 3).double()
    x = images(4)
    score(call_for_per_sample_grads(module)(input=x)).backward()
    assert module.weight.grad_sample.shape == (N, 3, 4)


def _used() -> nn.Module:
    module = nn.Linear(4, 3)
    module.weight.grad_sample = torch.zeros(1)
    return module


@pytest.mark.parametrize(
    ("make", "options", "pattern"),
    [
        (lambda: nn.Linear(4, 3), {"loss_reduction": ""}, "loss_reduction argument to be sum or mean"),
        (lambda: "fail", {}, "Module passed must be nn.Module"),
        (lambda: nn.Linear(4, 3), {"batch_size": 6.4}, "Batch size passed must be None or an integer"),
        (lambda: nn.Linear(4, 3), {"batch_size": -2}, "Batch size must be positive"),
        (_used, {}, r"clear out the\s+grad_sample parameter"),
    ],
)
def test_misuse_is_refused_in_the_same_words(make, options, pattern):
    for function in (of_torch, call_for_per_sample_grads):
        with pytest.raises(RuntimeError, match=pattern) as caught:
            function(make(), **options)
    assert isinstance(caught.value, ModuleCallError)


@pytest.mark.parametrize(
    ("args", "pattern"),
    [((), "Unable to find a tensor"), ((torch.randn(5, 4), torch.randn(4, 4)), "batch size 5 and one with batch size 4")],
)
def test_a_batch_size_that_cannot_be_told(args, pattern):
    for function in (of_torch, call_for_per_sample_grads):
        with pytest.raises(RuntimeError, match=pattern):
            function(nn.Bilinear(4, 4, 2))(*args)


class Sums(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum()


class Swaps(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(0, 1)


@pytest.mark.parametrize(("module", "width"), [(Sums, 3), (Swaps, N)])
def test_results_without_an_axis_for_the_samples(module, width):
    with pytest.raises(ModuleCallError, match="axis"):
        call_for_per_sample_grads(module(4, width).double())(images(4)).sum().backward()


class Mixes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h - h.mean(0)


class Positions(nn.Linear):
    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return super().forward(x + position)


class Counts(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize(
    ("make", "args"),
    [(lambda: Mixes(4, 3), [(N, 4)]), (lambda: Positions(4, 3), [(N, N, 4), (N, 4)]), (lambda: Counts(4, 3), [(N, 4)])],
)
def test_a_sample_that_gives_something_else_alone_is_refused(make, args):
    out = call_for_per_sample_grads(make().double())(*(torch.randn(shape, dtype=D) for shape in args))
    with pytest.raises(ModuleCallError, match="One sample alone gives another result"):
        out.sum().backward()


class Repacks(nn.Module):
    """Pads to the longest sequence that it sees, or to what the input has."""

    whole = False

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1] if self.whole else None)[0]


def test_a_sample_that_gives_another_shape_alone_is_refused():
    x, lengths = torch.randn(3, 5, 4, dtype=D), torch.tensor([5, 2, 4])
    model = Repacks().double()
    with pytest.raises(ModuleCallError, match=r"\[1, 2, 6\] for one sample.*\[1, 5, 6\].*total_length"):
        call_for_per_sample_grads(model)(x, lengths).sum().backward()
    model.whole = True
    call_for_per_sample_grads(model, loss_reduction="sum")(x, lengths).sum().backward()
    for i in range(3):
        expected = torch.autograd.grad(model(x[i : i + 1], lengths[i : i + 1]).sum(), list(model.parameters()))
        torch.testing.assert_close([p.grad_sample[i] for p in model.parameters()], list(expected))


@pytest.mark.parametrize("change", ["input", "parameter", "mode"])
def test_changes_between_the_passes_are_refused(change):
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double(), images(4)
    out = call_for_per_sample_grads(module)(x)
    with torch.no_grad():
        {"input": lambda: x.zero_(), "parameter": lambda: module[0].weight.add_(1), "mode": module.eval}[change]()
    with pytest.raises(ModuleCallError, match="between the forward and the backward pass"):
        out.sum().backward()


def test_a_submodule_at_two_places():
    shared = nn.Linear(4, 4).double()
    module, x = nn.Sequential(shared, nn.Tanh(), shared), images(4)
    call_for_per_sample_grads(module)(x).sum().backward()
    assert type(shared.weight) is nn.Parameter
    torch.testing.assert_close([p.grad_sample for p in shared.parameters()], looped(module, [x], (0,), lambda o: o.sum()))


def test_numbers_are_shared_and_batches_of_two_sizes_do_not_add_up():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x) * scale

    module = Scaled(4, 3).double()
    call = call_for_per_sample_grads(module)
    first, second = call(images(4), torch.tensor(2.0, dtype=D)), call(images(4)[:2], torch.tensor(2.0, dtype=D))
    first.sum().backward()
    torch.testing.assert_close(module.bias.grad_sample, torch.full((N, 3), 2.0, dtype=D))
    with pytest.raises(ModuleCallError, match=r"2 samples .* of 5 .*`weight`"):
        second.sum().backward()


def test_no_second_derivative():
    module = nn.Linear(4, 3).double()
    call_for_per_sample_grads(module)(images(4)).square().sum().backward()
    assert not module.weight.grad_sample.requires_grad


def test_batch_norm_in_training_is_refused():
    with pytest.raises(BatchNormError):
        call_for_per_sample_grads(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double())(images(4)).sum().backward()


def test_autocast_around_the_forward_pass_holds_in_the_backward_pass():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(N, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = call_for_per_sample_grads(module)(x)
        expected = [torch.autograd.grad(module(x[i : i + 1]).float().sum(), list(module.parameters())) for i in range(N)]
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    for p, *rows in zip(module.parameters(), *expected, strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(rows), rtol=0.02, atol=0.02)
