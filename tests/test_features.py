"""What programs do with layers and with autograd itself, against a loop of plain autograd."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from checked import call, check, score, state_of
from per_sample import BatchNormError, explain, per_sample_grad

if TYPE_CHECKING:
    from collections.abc import Callable

D = torch.float64
N = 3


def draw(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=D)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


# Attention --------------------------------------------------------------------------------------------------------------------

T, S = 5, 7
_CAUSAL = torch.ones(T, S, dtype=torch.bool).triu(1)
_BIAS = torch.linspace(-1, 1, 4 * T * S, dtype=D).sin().reshape(4, T, S)
MHA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no weights": ({}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "no bias": ({"bias": False}, {}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "bias_kv, no weights": ({"add_bias_kv": True}, {"need_weights": False}),
    "zero_attn": ({"add_zero_attn": True}, {}),
    "kdim and vdim": ({"kdim": 6, "vdim": 3}, {}),
    "kdim and vdim, no weights": ({"kdim": 6, "vdim": 3}, {"need_weights": False}),
    "boolean mask": ({}, {"attn_mask": _CAUSAL}),
    "boolean mask, no weights": ({}, {"attn_mask": _CAUSAL, "need_weights": False}),
    "causal": ({}, {"attn_mask": _CAUSAL, "is_causal": True, "need_weights": False}),
    "added mask": ({}, {"attn_mask": _BIAS[0]}),
    "added mask, no weights": ({}, {"attn_mask": _BIAS[0], "need_weights": False}),
    "everything": ({"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 3}, {"attn_mask": _BIAS[0]}),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch", [None, "first", "second"])
@pytest.mark.parametrize("name", MHA)
def test_multihead_attention(name: str, batch: str | None, training: bool) -> None:
    options, arguments = MHA[name]
    module = nn.MultiheadAttention(8, 2, batch_first=batch == "first", dtype=D, **options).train(training)
    lead = {None: lambda t: (t,), "first": lambda t: (2, t), "second": lambda t: (t, 2)}[batch]
    inputs = draw(*lead(T), 8), draw(*lead(S), options.get("kdim", 8)), draw(*lead(S), options.get("vdim", 8))
    check(lambda p, q, k, v: score(call(module, p, q, k, v, **arguments)), state_of(module), *inputs)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("own_mask", [True, False], ids=["mask for each head", "no mask"])
def test_multihead_attention_with_padding(own_mask: bool, need_weights: bool) -> None:
    """A different number of keys in each sample."""
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=D)
    padding = torch.arange(S) >= torch.tensor([[[4], [6]], [[7], [1]], [[2], [3]]])
    options = {"need_weights": need_weights, "attn_mask": _BIAS.clone() if own_mask else None}

    def loss(p: Any, q: Tensor, k: Tensor, padding: Tensor) -> Tensor:
        padding = torch.zeros_like(padding, dtype=D).masked_fill(padding, -math.inf) if own_mask else padding
        return score(call(module, p, q, k, k, key_padding_mask=padding, **options))

    check(loss, state_of(module), draw(2, T, 8), draw(2, S, 8), padding)


FROZEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), "aten._native_multi_head_attention.default"),
    "layer": (lambda: nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), "aten._transformer_encoder_layer_fwd.default"),
}


@pytest.mark.parametrize("mask", [None, "padding", "positions"])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_transformer_in_evaluation(name: str, mask: str | None) -> None:
    """Torch takes fused kernels where nothing in the module is differentiated, and nobody wants to see what it calls."""
    make, op = FROZEN[name]
    module = make().double().eval().requires_grad_(False)
    padding = torch.arange(T) >= torch.tensor([[[4], [2]], [[5], [1]], [[2], [3]]])

    def loss(p: Any, x: Tensor, padding: Tensor) -> Tensor:
        masks: dict[str, Tensor] = {}
        if mask == "padding":
            masks = {"key_padding_mask" if name == "attention" else "src_key_padding_mask": padding}
        elif mask == "positions":
            masks = {"attn_mask" if name == "attention" else "src_mask": _CAUSAL[:, :T]}
        with torch._C.DisableTorchFunction():
            out = module(x, x, x, **masks) if name == "attention" else module(x, **masks)
        return score(out) * p["scale"].sin()

    params = {"scale": torch.ones((), dtype=D)}
    samples = draw(2, T, 8), padding
    check(loss, params, *samples)
    assert (op, "rule") in {(row.op, row.route) for row in explain(loss)(params, *samples).rows}


# Each mask is made from a sample's own numbers `[2, 4, T, S]`, or is the same for all.
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "boolean, shared": lambda m: ~_CAUSAL,
    "boolean": lambda m: m > -0.5,
    "boolean, for all heads": lambda m: m[:, :1] > -0.5,
    "boolean, for all queries": lambda m: m[:, :1, :1] > -0.5,
    "boolean, a row with no key": lambda m: (m > -0.5) & (torch.arange(T) != 2)[:, None],
    "added": lambda m: m,
    "added, for one head's shape": lambda m: m[0, 0],
    "added, for all of the batch": lambda m: m[:1],
    "added, for three axes": lambda m: m[0],
    "added, shared": lambda m: _BIAS,
}


@pytest.mark.parametrize("lead", [(2,), ()], ids=["batch", "one"])
@pytest.mark.parametrize("name", MASKS)
def test_scaled_dot_product_attention_with_masks(name: str, lead: tuple[int, ...]) -> None:
    params = {k: torch.randn(3, 3, dtype=D) for k in "qkv"}

    def loss(p: Any, q: Tensor, k: Tensor, m: Tensor) -> Tensor:
        mask = MASKS[name](m)
        mask = mask[0] if mask.dim() == 4 and not lead else mask
        return score(F.scaled_dot_product_attention(q @ p["q"], k @ p["k"], k @ p["v"], mask))

    check(loss, params, draw(*lead, 4, T, 3), draw(*lead, 4, S, 3), draw(2, 4, T, S))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_grouped_query_attention(options: dict[str, Any]) -> None:
    params = {k: torch.randn(3, 3, dtype=D) for k in "qkv"}

    def loss(p: Any, q: Tensor, k: Tensor) -> Tensor:
        return score(F.scaled_dot_product_attention(q @ p["q"], k @ p["k"], k @ p["v"], enable_gqa=True, **options))

    check(loss, params, draw(2, 4, T, 3), draw(2, 2, S, 3))


# Weights that are functions of other parameters -------------------------------------------------------------------------------

REPARAMETRISED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
    "weight_norm of a convolution": lambda: parametrizations.weight_norm(nn.Conv1d(6, 5, 2)),
    "weight_norm, the whole": lambda: parametrizations.weight_norm(nn.Linear(4, 5), dim=None),
    "weight_norm by hooks": lambda: nn.utils.weight_norm(nn.Linear(4, 5)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 5)),
    "spectral_norm by hooks": lambda: nn.utils.spectral_norm(nn.Linear(4, 5)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 5)),
    "prelu": lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(1)),
    "prelu, one for each channel": lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(6)),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm` is deprecated")
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_reparametrised_weights(name: str) -> None:
    module = REPARAMETRISED[name]().double().eval()
    check(lambda p, x: score(call(module, p, x)), state_of(module), draw(2, 6, 4))


class LowRank(nn.Module):
    """A frozen layer and its trained correction of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * F.linear(F.linear(x, self.down), self.up)


def test_low_rank_adapters_on_a_frozen_model() -> None:
    model = nn.Sequential(LowRank(), nn.Tanh(), nn.Linear(5, 4).requires_grad_(False), LowRank()).double()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    check(lambda p, x: score(call(model, p, x)), trained, draw(6, 4))


def test_embedding_with_a_bounded_norm() -> None:
    """It rescales the rows that a sample meets, in the weight itself: in a copy for each sample."""
    module = nn.Embedding(7, 4, max_norm=0.5, dtype=D)
    weight, index = module.weight.detach().clone(), torch.randint(0, 7, (N, 5))
    grads = per_sample_grad(lambda p, i: score(call(module, p, i)))({"weight": weight}, index)
    torch.testing.assert_close(module.weight.detach(), weight)
    for g, i in zip(grads["weight"], index, strict=True):
        one = weight.clone().requires_grad_()
        torch.testing.assert_close(g, torch.autograd.grad(score(call(module, {"weight": one}, i)), one)[0])


@pytest.mark.parametrize("where", ["an argument", "the module's own"])
def test_batch_norm_in_training_says_so(where: str) -> None:
    """Its counter of batches, which goes first, is no concern."""
    module = nn.BatchNorm1d(4, dtype=D)
    buffers = {name: b.clone() for name, b in module.named_buffers()} if where == "an argument" else {}

    def loss(p: Any, x: Tensor, state: Any) -> Tensor:
        return score(call(module, p | state, x))

    with pytest.raises(BatchNormError):
        per_sample_grad(loss, in_dims=(None, 0, None))(state_of(module), draw(6, 4), buffers)
    assert not any(b.any() for name, b in buffers.items() if name != "running_var")


# Derivatives inside the loss --------------------------------------------------------------------------------------------------


def _net(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(torch.tanh(F.linear(x, p["a"], p["b"])), p["c"])).sum()


def _inner(p: Any, x: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(_net(p, z), z, create_graph=True)
    second = [torch.autograd.grad(first[i], z, create_graph=True)[0][i] for i in range(4)]
    return torch.stack(second).sum() + first.square().sum()


DERIVATIVES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "laplacian by hessian": lambda p, x: hessian(lambda z: _net(p, z))(x).diagonal().sum(),
    "laplacian by jacrev": lambda p, x: jacrev(grad(lambda z: _net(p, z)))(x).trace(),
    "laplacian by jacfwd": lambda p, x: jacfwd(grad(lambda z: _net(p, z)))(x).diagonal().sum(),
    "laplacian by jvp": lambda p, x: vmap(lambda e: e @ jvp(grad(lambda z: _net(p, z)), (x,), (e,))[1])(torch.eye(4, dtype=D)).sum(),
    "laplacian by vjp": lambda p, x: vmap(vjp(grad(lambda z: _net(p, z)), x)[1])(torch.eye(4, dtype=D))[0].diagonal().sum(),
    "gradient penalty": lambda p, x: (grad(lambda z: _net(p, z))(x).norm() - 1) ** 2,
    "nested gradients": lambda p, x: grad(lambda y: grad(lambda z: _net(p, z * y.sum()))(x).square().sum())(x).sum(),
    "gradient of the parameters": lambda p, x: sum(g.square().sum() for g in grad(_net)(p, x).values()),
    "vmap over points": lambda p, x: vmap(lambda z: _net(p, z))(torch.stack([x, 2 * x, x.sin()])).square().sum(),
    # Its formulas make zeros that have no memory.
    "forward over reverse of elu": lambda p, x: jvp(grad(lambda z: F.elu(p["a"] @ z).sum().sin()), (x,), (x.cos(),))[1].square().sum(),
    "autograd.grad": _inner,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_inside_the_loss(name: str) -> None:
    params = {"a": torch.randn(5, 4, dtype=D), "b": torch.randn(5, dtype=D), "c": torch.randn(2, 5, dtype=D)}
    # Questions that forward mode asks about tangents.
    questions = ("is_same_size.default", "_has_same_storage_numel.default")
    check(lambda p, x: DERIVATIVES[name](p, x).sin(), params, draw(4), fallback=questions)


def test_reentrant_checkpoint() -> None:
    """Against `backward`: by `torch.autograd.grad` it does not run in a loop either."""
    params = {"a": torch.randn(5, 4, dtype=D), "b": torch.randn(5, dtype=D)}

    def loss(p: Any, x: Tensor) -> Tensor:
        return score(checkpoint(lambda a: F.linear(x.tanh(), a, p["b"]).tanh(), p["a"], use_reentrant=True) * p["b"])

    x = draw(6, 4)
    grads = per_sample_grad(loss)(params, x)
    for i in range(N):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss(leaves, x[i]).backward()
        torch.testing.assert_close({name: g[i] for name, g in grads.items()}, {name: p.grad for name, p in leaves.items()})
