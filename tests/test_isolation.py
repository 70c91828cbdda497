"""One sample's data reach no other sample's gradient, loss or random numbers: the others stay equal to the last bit, also beside NaN.

What a kernel does with one sample depends on shapes, never on the others' values, so that no row of the table is equal to rounding only.
The one exception are samples that run in groups (`options(split_batch=True)`): the others' values decide how large a group is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils._pytree import tree_leaves

from case import Case
from cases import CASES
from models import GPT, convnext, resnet18
from per_sample import options, per_sample_grad, per_sample_grad_and_value, reference
from versions import skip_if_lacking

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel", "ignore:enable_nested_tensor")

N, CHANGED = 3, 1
KINDS = ("other", "nan", "inf")
SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}
# Rows that pin float64 themselves.
DOUBLE_ONLY = ("one-hot", "attention-mask-shared")


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal, NaN to NaN."""
    if actual.is_sparse:
        actual, expected = actual.to_dense(), expected.to_dense()
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def changed(samples: list[Tensor], others: list[Tensor], kind: str, j: int = CHANGED) -> list[Tensor]:
    """The batch with sample ``j`` replaced: by another one, or, where the dtype has it, by NaN or infinity."""
    out = []
    for x, other in zip(samples, others, strict=True):
        x = x.clone()
        x[j] = other[j] if kind == "other" or not x.is_floating_point() else float(kind)
        out.append(x)
    return out


def assert_others_stay(
    transform: Any, params: Any, samples: list[Tensor], others: list[Tensor], kinds: Any = KINDS, j: int = CHANGED
) -> None:
    rest = [i for i in range(samples[0].shape[0]) if i != j]
    expected = transform(params, *samples)
    for kind in kinds:
        found = transform(params, *changed(samples, others, kind, j))
        for a, e in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert_same_bits(a[rest], e[rest])


def drawn(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params, samples = case.draw(N)
    others = [s.draw(N) for s in case.samples]
    if dtype is torch.float32:
        params, samples, others = ([x.to(SINGLE.get(x.dtype, x.dtype)) for x in xs] for xs in (params, samples, others))
    return params, samples, others


def _kinds(case: Case, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    # Binary cross entropy refuses what is not between 0 and 1, in plain torch too.
    if case.name.startswith("bce-"):
        return ("other",)
    return KINDS if dtype is torch.float64 else ("nan",)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_row_of_the_table(case: Case, dtype: torch.dtype) -> None:
    if dtype is torch.float32 and case.name in DOUBLE_ONLY:
        pytest.skip("the row mixes in float64 tensors of its own")
    transform = per_sample_grad_and_value(case.loss, keep_batch_dim=case.keep_batch_dim)
    assert_others_stay(transform, *drawn(case, dtype), _kinds(case, dtype))


def outer_derivative(case: Case, samples: list[Tensor], shared: bool) -> list[Tensor]:
    """The derivative of what sample 0 alone is about, its loss and its gradients squared, taken by the caller.

    With respect to shared parameters, or to each sample and parameters of its own.
    """
    params = [(p.clone() if shared else torch.stack([p] * N)).requires_grad_() for p in case.draw(N)[0]]
    leaves = params
    if not shared:
        # The targets of a soft margin loss cannot be differentiated.
        inexact = [s.is_floating_point() or s.is_complex() for s in samples]
        inexact[1:] = [] if case.name.startswith("soft_margin") else inexact[1:]
        samples = [s.clone().requires_grad_(i < len(inexact) and inexact[i]) for i, s in enumerate(samples)]
        leaves = [*params, *(s for s in samples if s.requires_grad)]
    grads, values = per_sample_grad_and_value(case.loss, 0, None if shared else 0)(params, *samples)
    own = values[0] + sum(g[0].abs().square().sum() for g in grads)
    if not leaves or not own.requires_grad:
        return []
    return [g.to_dense() for g in torch.autograd.grad(own, leaves, allow_unused=True, materialize_grads=True)]


# Torch has no second derivative of these two.
TWICE = [c for c in CASES if c.name not in ("embedding_bag-max", "pointwise-hardsigmoid") and not c.keep_batch_dim]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", TWICE, ids=lambda c: c.name)
def test_every_row_differentiated_once_more(case: Case, shared: bool) -> None:
    """Zero times NaN is NaN where a batched reverse mode sums over the samples, for shared parameters: there only finite numbers."""
    if case.name.startswith("grid_sample"):
        skip_if_lacking("grid_sample twice")
    _, samples, others = drawn(case)
    expected = outer_derivative(case, samples, shared)
    for kind in ("other",) if shared else _kinds(case):
        found = outer_derivative(case, changed(samples, others, kind), shared)
        for a, e in zip(found, expected, strict=True):
            assert_same_bits(a if shared else a[[0, 2]], e if shared else e[[0, 2]])


class Recurrent(nn.Module):
    """A two-layer bidirectional recurrent net and a head on its last state."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn, self.head = kind(6, 8, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][..., -1, :])


class Attentive(nn.Module):
    """An encoder layer as torch has it, and a head on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(-2))


MODELS = {
    "ResNet": (resnet18, (3, 32, 40)),
    "ConvNeXt": (convnext, (3, 32, 40)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (5, 6)),
    "GRU": (lambda: Recurrent(nn.GRU), (5, 6)),
    "transformer": (Attentive, (5, 8)),
    "MLP": (lambda: nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 7)), (100,)),
    "GPT": (GPT, (9,)),
}


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(dtype)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        scores = functional_call(model, params, (x,)).flatten(0, -2)
        return F.cross_entropy(scores, y.flatten().expand(len(scores)))

    def batch() -> list[Tensor]:
        x = torch.randint(0, 11, (5, *shape)) if name == "GPT" else torch.randn(5, *shape, dtype=dtype)
        return [x, torch.randint(0, 7, (5, 1))]

    params = {k: v.detach() for k, v in model.named_parameters()}
    transform = per_sample_grad_and_value(loss, keep_batch_dim=True, chunk_size=chunk_size)
    assert_others_stay(transform, params, batch(), batch(), j=2)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_random_numbers_do_not_depend_on_the_data(chunk_size: int | None) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        h = F.dropout(x @ w, 0.4) + torch.randn(5) * torch.rand_like(x[:5])
        h = h + torch.bernoulli(torch.full((5,), 0.3)) + torch.randint(0, 9, (5,))
        return (F.alpha_dropout(h, 0.3) * h[torch.randperm(5)]).sum()

    def transform(w: Tensor, x: Tensor) -> Any:
        torch.manual_seed(7)
        return per_sample_grad_and_value(loss, randomness="different", chunk_size=chunk_size)(w, x)

    w, x, other = torch.randn(6, 5), torch.randn(5, 6), torch.randn(5, 6)
    assert_others_stay(transform, w, [x], [other], j=2)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_samples_that_run_in_groups_are_equal_to_rounding(chunk_size: int | None) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (w @ x).tanh().sum() if x.sum() > 0 else (w @ x[x > 0].sum().expand(6)).sin().sum()

    w, x = torch.randn(5, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    x[2] = 1.0
    other = x.clone()
    other[2] = -x[2]
    transform = per_sample_grad_and_value(loss, chunk_size=chunk_size)
    with options(split_batch=True):
        (grads, values), (again, new_values) = transform(w, x), transform(w, other)
    rest = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close((again[rest], new_values[rest]), (grads[rest], values[rest]))
    assert not torch.allclose(again[2], grads[2])


def test_frequencies_of_an_embedding_are_counted_within_one_sample_by_the_caller_too() -> None:
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1, 1, 2], [1, 3, 1], [2, 2, 2]])

    def loss(w: Tensor, i: Tensor) -> Tensor:
        return F.embedding(i, w, scale_grad_by_freq=True).sin().sum()

    _, values = per_sample_grad_and_value(loss)(weight, index)
    for i in range(3):
        got = torch.autograd.grad(values[i], weight, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(loss(weight, index[i]), weight))


@pytest.mark.parametrize(
    "flags", [{"padding_idx": 1}, {"scale_grad_by_freq": True}, {"padding_idx": 1, "scale_grad_by_freq": True}], ids=str
)
def test_flags_of_an_embedding_of_per_sample_weights_hold_for_the_caller_too(flags: dict[str, Any]) -> None:
    weight = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1, 1, 2], [1, 3, 1], [2, 2, 2]])

    def loss(w: Tensor, i: Tensor) -> Tensor:
        return F.embedding(i, w, **flags).sin().sum()

    _, values = per_sample_grad_and_value(loss, 0, 0)(weight, index)
    got = torch.autograd.grad(values[0], weight)[0]
    assert not got[1:].any()
    torch.testing.assert_close(got[0], torch.autograd.grad(loss(weight[0], index[0]), weight)[0][0])


@pytest.mark.parametrize("psg", [per_sample_grad, reference.per_sample_grad], ids=["per_sample", "reference"])
def test_torch_func_around_one_samples_own_result(psg: Any) -> None:
    """The derivative of sample 0's gradient with respect to the batch has exact zeros elsewhere, whatever the others hold."""

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return F.softmax(w @ x.tanh(), 0).log().square().sum()

    w, x = torch.randn(5, 4, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)

    def own(x: Tensor) -> Tensor:
        return psg(loss)(w, x)[0].square().sum()

    expected = grad(own)(x)
    assert expected[0].all()
    assert not expected[1:].any()
    broken = x.clone()
    broken[2] = float("nan")
    assert_same_bits(grad(own)(broken)[:2], expected[:2])
