"""Recurrent layers: every option of torch's, packed sequences, cells, and the kernels that the GPU would use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from checked import call, check, score, state_of
from per_sample import ArgumentError, explain, per_sample_grad
from tree_oracle import assert_close, loop

D = torch.float64
N, T, B, WIDTH, HIDDEN = 4, 5, 2, 3, 6
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "both": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no-bias": {"bias": False, "bidirectional": True},
    "relu": {"nonlinearity": "relu"},
    "projected": {"proj_size": 4, "num_layers": 2, "bidirectional": True},
}


def _layer(kind: str, options: dict[str, Any], dtype: torch.dtype) -> nn.RNNBase:
    only = {"relu": "rnn", "projected": "lstm"}
    if any(option in options and kind != only[name] for name, option in (("relu", "nonlinearity"), ("projected", "proj_size"))):
        pytest.skip("not an option of this layer")
    torch.manual_seed(0)
    return LAYERS[kind](WIDTH, HIDDEN, **options).to(dtype)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, name, states):
    layer = _layer(kind, OPTIONS[name], D)
    one = [torch.randn(N, *((B, T) if layer.batch_first else (T, B)), WIDTH, dtype=D)]
    if states:
        count = layer.num_layers * (1 + layer.bidirectional)
        one.append(torch.randn(N, count, B, layer.proj_size or HIDDEN, dtype=D))
        if kind == "lstm":
            one.append(torch.randn(N, count, B, HIDDEN, dtype=D))

    def loss(p: Any, x: Tensor, *state: Tensor) -> Tensor:
        return score(call(layer, p, x, *((state if kind == "lstm" else state[0],) if state else ())))

    check(loss, state_of(layer), *one)


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("name", ["plain", "stacked", "both", "no-bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_fused_lstm_of_the_cpu(name, unbatched, dtype, tolerance):
    """Single precision goes through one kernel a layer. bfloat16 keeps 8 bits, and a gradient adds tens of rounded numbers."""
    layer = _layer("lstm", OPTIONS[name], dtype)
    shape = (T,) if unbatched else (B, T) if layer.batch_first else (T, B)
    x = torch.randn(N, *shape, WIDTH, dtype=dtype)

    def loss(p: Any, x: Tensor) -> Tensor:
        out, (h, c) = call(layer, p, x)
        weights = torch.arange(out.numel(), dtype=dtype).reshape(out.shape).cos()
        return (out * weights).sum() + h[0].sin().sum() + c.square().sum()

    grads = per_sample_grad(loss)(state_of(layer), x)
    expected = loop(loss, (0,), (None, 0))(state_of(layer), x)[0]
    for key, g in grads.items():
        torch.testing.assert_close(g, expected[key], rtol=tolerance, atol=tolerance * float(expected[key].abs().max()))
    report = explain(loss)(state_of(layer), x)
    assert not {"fallback", "loop"} & set(report.routes())
    assert {row.route for row in report.rows if "mkldnn" in row.op} == {"rule"}
    assert {report.factors[key] for key in grads if "weight" in key} == {"Outer"}


ARGNUMS = (0, 1, 2)


@pytest.mark.parametrize("dims", [(None, 0, 0), (0, 0, 0), (0, None, 0), (None, None, 0), (0, None, None)])
def test_the_fused_lstm_with_weights_of_the_samples_own(dims):
    layer = _layer("lstm", {"num_layers": 2, "bidirectional": True}, torch.float32)
    lead = [(N,) if d == 0 else () for d in dims]
    params = {k: (v + 0.1 * torch.randn(*lead[0], *v.shape)).detach() for k, v in layer.named_parameters()}
    x, state = torch.randn(*lead[1], T, B, WIDTH), torch.randn(*lead[2], 4, B, HIDDEN)

    def loss(p: Any, x: Tensor, h: Tensor) -> Tensor:
        out, (last, c) = call(layer, p, x, (h, h.cos()))
        return out.sin().sum() + last[1].square().sum() + c.sum()

    grads = per_sample_grad(loss, ARGNUMS, dims)(params, x, state)
    expected = loop(loss, ARGNUMS, dims)(params, x, state)
    for got, want in zip(grads, expected, strict=True):
        assert_close(got, want)


def test_an_lstm_of_a_shared_input():
    layer = _layer("lstm", {}, torch.float32)
    x, y = torch.randn(T, B, WIDTH), torch.randn(N, T, B, HIDDEN)

    def loss(p: Any, x: Tensor, y: Tensor) -> Tensor:
        return (call(layer, p, x)[0] * y).sum()

    assert_close(
        per_sample_grad(loss, 0, (None, None, 0))(state_of(layer), x, y), loop(loss, (0,), (None, None, 0))(state_of(layer), x, y)[0]
    )


def test_an_outer_derivative_goes_through_the_fused_lstm():
    layer, twin = _layer("lstm", {}, torch.float32), _layer("lstm", {}, D)
    x = torch.randn(N, T, B, WIDTH)

    def size(layer: nn.Module, x: Tensor, p: Any) -> Tensor:
        grads = per_sample_grad(lambda p, x: call(layer, p, x)[0].square().sum())(p, x)
        return sum(g.square().sum() for g in grads.values())

    # Double precision takes torch's own steps instead.
    p = state_of(layer)
    found = torch.func.grad(lambda p: size(layer, x, p))(p)
    expected = torch.func.grad(lambda p: size(twin, x.double(), p))({k: v.double() for k, v in p.items()})
    for key, g in found.items():
        torch.testing.assert_close(g.double(), expected[key], rtol=1e-4, atol=1e-4 * float(expected[key].abs().max()))


def test_dropout_between_layers():
    layer = nn.LSTM(WIDTH, HIDDEN, 2, dropout=0.5)
    p, x = state_of(layer), torch.randn(1, T, B, WIDTH).expand(40, T, B, WIDTH)
    grads = per_sample_grad(lambda p, x: call(layer, p, x)[0].sum(), randomness="different")(p, x)
    rows = grads["weight_ih_l1"].flatten(1)
    assert len({tuple(row) for row in rows.tolist()}) == 40
    # A dropped unit of the first layer has no gradient into it in any step: over time and batch that is rare, never the rule.
    assert rows.isfinite().all()
    same = per_sample_grad(lambda p, x: call(layer.eval(), p, x)[0].sum(), randomness="different")(p, x)
    assert_close(same["weight_ih_l1"], same["weight_ih_l1"][:1].expand(40, -1, -1))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop(cell):
    torch.manual_seed(0)
    cell = cell(WIDTH, HIDDEN).double()

    def loss(p: Any, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = call(cell, p, step, state)
        return score(state)

    check(loss, state_of(cell), torch.randn(N, T, B, WIDTH, dtype=D))


LENGTHS = torch.tensor([3, 7, 1, 7, 5])


def _padded_loss(layer: nn.Module) -> Any:
    def loss(p: Any, x: Tensor, length: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False)
        out, state = call(layer, p, packed)
        padded, lengths = pad_packed_sequence(out, batch_first=True, total_length=7)
        return score((padded, state)) + out.data.square().mean() + lengths.sum()

    return loss


@pytest.mark.parametrize("name", ["plain", "both", "projected"])
@pytest.mark.parametrize("kind", LAYERS)
def test_padded_tensors_with_lengths(kind, name):
    layer = _layer(kind, OPTIONS[name] | {"batch_first": True}, D)
    loss = _padded_loss(layer)
    x = torch.randn(5, 7, WIDTH, dtype=D)
    actual = per_sample_grad(loss, keep_batch_dim=True)(state_of(layer), x, LENGTHS)
    expected = loop(lambda p, x, n: loss(p, x[None], n[None]), (0,), (None, 0, 0))(state_of(layer), x, LENGTHS)[0]
    assert_close(actual, expected)
    report = explain(loss, keep_batch_dim=True)(state_of(layer), x, LENGTHS)
    assert report.runs == 4  # one for each length
    assert not {"fallback", "loop"} & set(report.routes())


@pytest.mark.parametrize("options", [{}, {"keep_batch_dim": True}, {"chunk_size": 2}, {"in_dims": (None, 0, 0)}])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_arguments(kind, options):
    layer = _layer(kind, {"bidirectional": True}, D)
    sequences = [torch.randn(int(n), WIDTH, dtype=D) for n in LENGTHS]
    y = torch.randn(5, dtype=D)

    def loss(p: Any, packed: PackedSequence, y: Tensor) -> Tensor:
        assert isinstance(packed, PackedSequence)
        out, state = call(layer, p, PackedSequence(packed.data * p["bias_hh_l0"][0], *packed[1:]))
        return (score(state) * y).sum() + out.data.mean()

    grads = per_sample_grad(loss, **options)(state_of(layer), pack_sequence(sequences, enforce_sorted=False), y)
    for i, sequence in enumerate(sequences):
        leaves = {k: v.requires_grad_() for k, v in state_of(layer).items()}
        expected = torch.autograd.grad(loss(leaves, pack_sequence([sequence]), y[i]), list(leaves.values()))
        assert_close([g[i] for g in grads.values()], list(expected))


def test_a_packed_argument_that_the_samples_share():
    layer = _layer("gru", {}, D)
    packed = pack_sequence([torch.randn(int(n), WIDTH, dtype=D) for n in LENGTHS], enforce_sorted=False)
    y = torch.randn(N, dtype=D)

    def loss(p: Any, packed: PackedSequence, y: Tensor) -> Tensor:
        return score(call(layer, p, packed)[1]) * y

    grads = per_sample_grad(loss, 0, (None, None, 0))(state_of(layer), packed, y)
    assert_close(grads, loop(lambda p, y: loss(p, packed, y), (0,), (None, 0))(state_of(layer), y)[0])


def test_a_packed_argument_is_not_differentiated():
    packed = pack_sequence([torch.randn(2, WIDTH), torch.randn(1, WIDTH)])
    with pytest.raises(ArgumentError, match=r"Argument 1 .*PackedSequence.*padded"):
        per_sample_grad(lambda w, packed: packed.data.sum() * w, (0, 1), (None, 0))(torch.ones(()), packed)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=6), kind=st.sampled_from(sorted(LAYERS)), first=st.booleans())
def test_lengths_of_any_kind(lengths: list[int], kind: str, first: bool) -> None:
    layer = LAYERS[kind](WIDTH, HIDDEN, batch_first=first).double()
    sequences = [torch.randn(n, WIDTH, dtype=D) for n in lengths]

    def loss(p: Any, packed: PackedSequence) -> Tensor:
        out, _ = call(layer, p, packed)
        return score(pad_packed_sequence(out, batch_first=first)[0])

    grads = per_sample_grad(loss)(state_of(layer), pack_sequence(sequences, enforce_sorted=False))
    for i, sequence in enumerate(sequences):
        leaves = {k: v.requires_grad_() for k, v in state_of(layer).items()}
        expected = torch.autograd.grad(loss(leaves, pack_sequence([sequence])), list(leaves.values()))
        assert_close([g[i] for g in grads.values()], list(expected))


aten = torch.ops.aten


def _gates(count: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"w_ih": (count * HIDDEN, WIDTH), "w_hh": (count * HIDDEN, HIDDEN), "b_ih": (count * HIDDEN,), "b_hh": (count * HIDDEN,)}
    return {name: torch.randn(shape, dtype=D) for name, shape in shapes.items()}


def _lstm_step(p: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
    return aten._thnn_fused_lstm_cell(x @ p["w_ih"].t(), h @ p["w_hh"].t(), c, p["b_ih"], p["b_hh"])[:2]


def _gru_step(p: Any, x: Tensor, h: Tensor, c: Tensor) -> Any:
    return (aten._thnn_fused_gru_cell(x @ p["w_ih"].t(), h @ p["w_hh"].t(), h, p["b_ih"], p["b_hh"])[0] * c,)


FUSED = {
    "lstm": (4, _lstm_step, lambda p, x, h, c: torch.lstm_cell(x, (h, c), p["w_ih"], p["w_hh"], p["b_ih"], p["b_hh"])),
    "gru": (3, _gru_step, lambda p, x, h, c: (torch.gru_cell(x, h, p["w_ih"], p["w_hh"], p["b_ih"], p["b_hh"]) * c,)),
}


@pytest.mark.parametrize("dims", [(None, 0, 0, 0), (0, 0, None, 0), (None, None, None, 0)])
@pytest.mark.parametrize("kind", FUSED)
def test_the_fused_cells_of_the_gpu(kind, dims):
    """The CPU has no such kernels; the rules have no need of them."""
    count, fused, plain = FUSED[kind]
    params = {k: v if dims[0] is None else torch.stack([v * (i + 1) for i in range(N)]) for k, v in _gates(count).items()}
    args = [torch.randn(*(() if d is None else (N,)), B, w, dtype=D) for d, w in zip(dims[1:], (WIDTH, HIDDEN, HIDDEN), strict=True)]
    if dims[1] is None:
        # Something must differ between samples before the op, or the CPU would look for its kernel.
        args[0], dims = torch.randn(N, B, WIDTH, dtype=D), (None, 0, None, 0)
    argnums = (0, 1, 2, 3)
    got = per_sample_grad(lambda *a: score(fused(*a)), argnums, dims)(params, *args)
    want = loop(lambda *a: score(plain(*a)), argnums, dims)(params, *args)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def test_layers_that_cudnn_would_run_as_one_op_run_in_steps():
    seen: list[bool] = []
    x = torch.randn(N, T, B, WIDTH, dtype=D)
    layer = _layer("gru", {}, D)

    def loss(p: Any, x: Tensor) -> Tensor:
        if not seen:
            seen.append(torch.backends.cudnn.enabled)
            weights = list(p.values())
            aten._cudnn_rnn(x, weights, 4, None, x.new_zeros(1, B, HIDDEN), None, 3, HIDDEN, 0, 1, False, 0.0, True, False, [], None)
        return score(call(layer, p, x)[0])

    actual = per_sample_grad(loss)(state_of(layer), x)
    assert_close(actual, loop(loss, (0,), (None, 0))(state_of(layer), x)[0])
