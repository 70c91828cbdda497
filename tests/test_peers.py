"""What other libraries get wrong, leave out or refuse: each of it is right here, by rules and not sample by sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checked import call, check, score, state_of
from per_sample import per_sample_grad

if TYPE_CHECKING:
    from collections.abc import Callable

D = torch.float64
N = 3


def draw(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=D)


def index(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, (N, *shape))


def check_module(make: Callable[[], nn.Module], *samples: Tensor, **options: Any) -> dict[str, Tensor]:
    """The module, in evaluation mode, on samples drawn by the caller."""
    torch.manual_seed(0)
    module = make().double().eval()
    return check(lambda p, *one: score(call(module, p, *one)), state_of(module), *samples, **options)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


# Convolutions -----------------------------------------------------------------------------------------------------------------


def test_conv_padding_same() -> None:
    check_module(lambda: nn.Conv2d(2, 4, (3, 5), padding="same", dilation=(2, 1)), draw(2, 7, 8))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate", "zeros"])
def test_conv_padding_mode(mode: str) -> None:
    check_module(lambda: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode=mode), draw(2, 7, 8))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("d", [1, 3])
def test_conv_padding_mode_in_other_ranks(d: int, mode: str) -> None:
    make = {1: nn.Conv1d, 3: nn.Conv3d}[d]
    check_module(lambda: make(2, 4, 3, padding=1, padding_mode=mode), draw(2, *(7, 8, 5)[:d]))


def test_conv_transpose_output_padding() -> None:
    check_module(lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1), draw(2, 6, 5))


@pytest.mark.parametrize("groups", [2, 6])
def test_grouped_conv_norms(groups: int) -> None:
    """The norms too, which a formula over the whole product of groups gets wrong."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, 3, groups=groups, dtype=D)
    x = draw(6, 7, 8)
    grads = check(lambda p, x: score(call(conv, p, x)), state_of(conv), x)
    for i in range(N):
        conv.zero_grad()
        score(conv(x[i])).backward()
        torch.testing.assert_close(grads["weight"][i].norm(), conv.weight.grad.norm())


# Embeddings -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 5, 4)], ids=str)
def test_embedding_index_of_any_rank(shape: tuple[int, ...]) -> None:
    check_module(lambda: nn.Embedding(7, 3), index(7, *shape))


# Twelve draws out of seven repeat some, for each sample.
@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 2},
        {"padding_idx": -1},
        {"scale_grad_by_freq": True},
        {"padding_idx": 2, "scale_grad_by_freq": True},
        {"sparse": True},
    ],
    ids=str,
)
def test_embedding_options(options: dict[str, Any]) -> None:
    grads = check_module(lambda: nn.Embedding(7, 3, **options), index(7, 12))
    assert grads["weight"].layout == torch.strided
    if "padding_idx" in options:
        assert not grads["weight"][:, options["padding_idx"]].any()


def test_embedding_bag_2d() -> None:
    check_module(lambda: nn.EmbeddingBag(7, 3, mode="sum"), index(7, 2, 5))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag_offsets_with_a_repeated_index(mode: str) -> None:
    """One index several times in a bag, and in several bags; the second bag is empty."""
    offsets = torch.tensor([0, 4, 4]).expand(N, 3)
    check_module(
        lambda: nn.EmbeddingBag(7, 5, mode=mode), torch.tensor([[3, 3, 1, 3, 1, 2], [0, 0, 6, 0, 6, 6], [4, 5, 4, 5, 4, 5]]), offsets
    )


# Normalisation ----------------------------------------------------------------------------------------------------------------


def test_rms_norm() -> None:
    check_module(lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5)), draw(2, 4))


@pytest.mark.parametrize(("make", "shape"), [(nn.BatchNorm1d, (6,)), (nn.BatchNorm2d, (6, 4, 5)), (nn.BatchNorm3d, (6, 4, 5, 2))])
def test_batch_norm_in_eval(make: Any, shape: tuple[int, ...]) -> None:
    def trained() -> nn.Module:
        norm = make(6)
        norm.running_mean += torch.linspace(-1, 1, 6)
        norm.running_var *= torch.linspace(0.5, 2, 6)
        return norm

    check_module(trained, draw(*shape), keep_batch_dim=True)


# Recurrent layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers(make: Any, options: dict[str, Any]) -> None:
    """On one sequence, and on a small batch of them: the axis of time is first, or second."""
    for shape in ((5, 4), (5, 2, 4)):
        check_module(lambda: make(4, 3, **options), draw(*shape))


@pytest.mark.parametrize("make", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells_in_a_loop(make: Any) -> None:
    cell = make(4, 3, dtype=D)

    def loss(params: Any, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = call(cell, params, step, state)
        return score(state)

    check(loss, state_of(cell), draw(5, 4))


# Other layers -----------------------------------------------------------------------------------------------------------------


def test_bilinear() -> None:
    check_module(lambda: nn.Bilinear(4, 5, 2), draw(6, 4), draw(6, 5))


def test_multihead_attention() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=D)

    def loss(params: Any, x: Tensor) -> Tensor:
        return score(call(attention, params, x, x, x))

    check(loss, state_of(attention), draw(5, 8))
    check(loss, state_of(attention), draw(5, 8), keep_batch_dim=True)


# How programs use their parameters --------------------------------------------------------------------------------------------


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)).double()
    model[1].weight = model[0].weight
    assert list(state_of(model)) == ["0.weight"]
    check(lambda p, x: score(call(model, p, x)), state_of(model), index(7, 5))


def test_a_module_used_twice() -> None:
    linear = nn.Linear(4, 4, dtype=D)
    check(lambda p, x: score(call(linear, p, call(linear, p, x).tanh())), state_of(linear), draw(2, 4))


FREE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda w, x: x @ w + w.sum(0),
    "masked": lambda w, x: x @ w.tril(),
    "product of two": lambda w, x: x @ (w @ w.T),
    "power": lambda w, x: x @ torch.linalg.matrix_power(w[:, :4], 2),
    "inverse": lambda w, x: x @ torch.linalg.inv(w[:, :4] + 5 * torch.eye(4, dtype=D)),
    "softmax": lambda w, x: x @ w.softmax(0),
    "normalised": lambda w, x: x @ F.normalize(w, dim=0),
    "indexed": lambda w, x: x[:, :2] @ w[torch.tensor([3, 1])],
    "in pieces": lambda w, x: torch.cat([x @ part for part in w.chunk(3, 1)], 1).sin(),
    "low rank": lambda w, x: (x @ w[:, :2]) @ w[:, :2].T,
}


@pytest.mark.parametrize("name", FREE)
def test_free_parameters_under_any_op(name: str) -> None:
    check(lambda p, x: score(FREE[name](p["w"], x)), {"w": torch.randn(4, 5, dtype=D)}, draw(6, 4))


def test_position_embedding_broadcast_over_the_batch() -> None:
    params = {"positions": torch.randn(1, 5, 4, dtype=D), "cls": torch.randn(1, 1, 4, dtype=D), "head": torch.randn(4, 7, dtype=D)}

    def loss(p: Any, x: Tensor) -> Tensor:
        x = torch.cat([p["cls"].expand(x.shape[0], -1, -1), x], 1) + p["positions"]
        return score(x.sin() @ p["head"])

    check(loss, params, draw(4, 4), keep_batch_dim=True)


def test_layer_on_flattened_positions() -> None:
    """`x.reshape(-1, d)`: the layer's batch is no longer the samples."""
    linear = nn.Linear(4, 5, dtype=D)
    check(lambda p, x: score(call(linear, p, x.reshape(-1, 4))), state_of(linear), draw(6, 2, 4))
    check(lambda p, x: score(call(linear, p, x.reshape(-1, 4))), state_of(linear), draw(6, 4), keep_batch_dim=True)


def test_unused_parameter_gets_zeros() -> None:
    params = {"w": torch.randn(4, dtype=D), "unused": torch.randn(5, 2, dtype=D)}
    grads = check(lambda p, x: score(p["w"] * x), params, draw(4))
    assert grads["unused"].shape == (N, 5, 2)
    assert not grads["unused"].any()


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(4, 5), torch.zeros(0, 6, 4, dtype=D)),
        (lambda: nn.Conv2d(2, 4, 3), torch.zeros(0, 2, 5, 6, dtype=D)),
        (lambda: nn.Embedding(7, 4), torch.zeros(0, 5, dtype=torch.int64)),
    ],
    ids=["linear", "conv", "embedding"],
)
def test_empty_batch(make: Any, x: Tensor) -> None:
    module = make().double()
    grads = per_sample_grad(lambda p, x: score(call(module, p, x)))(state_of(module), x)
    assert {name: g.shape for name, g in grads.items()} == {name: (0, *p.shape) for name, p in module.named_parameters()}


def test_relu_in_place_after_a_layer() -> None:
    check_module(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), draw(6, 4))


def test_layer_called_by_keyword() -> None:
    linear = nn.Linear(4, 5, dtype=D)
    check(lambda p, x: score(call(linear, p, input=x)), state_of(linear), draw(6, 4))


@pytest.mark.parametrize("preserve_rng_state", [True, False])
def test_non_reentrant_checkpoint(preserve_rng_state: bool) -> None:
    first, second = nn.Linear(4, 5, dtype=D), nn.Linear(5, 2, dtype=D)
    params = {**{f"0.{k}": v for k, v in state_of(first).items()}, **{f"1.{k}": v for k, v in state_of(second).items()}}

    def loss(p: Any, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            hidden = call(first, {"weight": p["0.weight"], "bias": p["0.bias"]}, x).tanh()
            return call(second, {"weight": p["1.weight"], "bias": p["1.bias"]}, hidden).tanh()

        return score(checkpoint(block, x, use_reentrant=False, preserve_rng_state=preserve_rng_state))

    check(loss, params, draw(6, 4))


def test_complex_weights_are_conjugated() -> None:
    linear = nn.Linear(4, 5, dtype=torch.complex128)
    conv = nn.Conv1d(2, 4, 3, dtype=torch.complex128)
    check(lambda p, x: score(call(linear, p, x)), state_of(linear), torch.randn(N, 6, 4, dtype=torch.complex128))
    check(lambda p, x: score(call(conv, p, x)), state_of(conv), torch.randn(N, 2, 7, dtype=torch.complex128))


def test_differentiating_through_the_result() -> None:
    """The gradient of the squared norms of all samples, against a loop that keeps its graph."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = draw(6, 4)

    def loss(p: Any, x: Tensor) -> Tensor:
        return score(call(model, p, x))

    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    total = sum(g.square().sum() for g in per_sample_grad(loss)(params, x).values())
    found = torch.autograd.grad(total, list(params.values()))
    leaves = list(params.values())
    rows = [torch.autograd.grad(loss(params, one), leaves, create_graph=True) for one in x]
    expected = torch.autograd.grad(sum(g.square().sum() for row in rows for g in row), leaves)
    torch.testing.assert_close(found, expected)
