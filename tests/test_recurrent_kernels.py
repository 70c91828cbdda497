"""The passes of the fused LSTM that write in place: against those of differentiable ops, and what a program may do with their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checked import call, state_of
from per_sample import per_sample_grad, per_sample_jacobian
from per_sample._kernels import lstm
from per_sample.rules import rnn
from tree_oracle import assert_close, loop

D = torch.float64
N, T, B, WIDTH, HIDDEN = 4, 5, 2, 3, 6
aten = torch.ops.aten


def _operands(t: int, m: int, zeros: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, w_ih, w_hh, bias = (torch.randn(s, dtype=D) for s in ((m, t, WIDTH), (4 * HIDDEN, WIDTH), (4 * HIDDEN, HIDDEN), (4 * HIDDEN,)))
    # The zeros that a program leaves to torch arrive expanded.
    h, c = (torch.zeros(1, dtype=D).expand(m, HIDDEN) if zeros else torch.randn(m, HIDDEN, dtype=D) for _ in range(2))
    return x.transpose(0, 1), w_ih, bias, w_hh, h, c


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("t", "m"), [(T, 7), (1, 7), (T, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_in_place_equals_differentiable_ops(t, m, zeros, biased):
    x, w_ih, bias, w_hh, h, c = operands = _operands(t, m, zeros)
    before = [z.clone() for z in operands]
    outputs, saved = lstm.forward_in_place(x, w_ih, bias if biased else None, w_hh, h, c)
    gates = x @ w_ih.t() + (bias if biased else 0)
    expected = lstm.forward(gates, w_hh, h, c)
    torch.testing.assert_close((outputs, saved), expected, rtol=1e-12, atol=1e-12)
    grad, dh, dc = torch.randn(t, m, HIDDEN, dtype=D), *torch.randn(2, m, HIDDEN, dtype=D)
    given = (grad, dh, dc, w_hh, saved, c)
    copies = [z.clone() for z in given]
    found = lstm.backward_in_place(*given)
    torch.testing.assert_close(found, lstm.backward(*copies), rtol=1e-12, atol=1e-12)
    # A graph may be walked more than once.
    torch.testing.assert_close([*operands, *given], [*before, *copies], rtol=0, atol=0)


def test_the_reference_pass_is_the_derivative_of_the_other():
    x, w_ih, bias, w_hh, h, c = _operands(T, 7, zeros=False)
    gates = (x @ w_ih.t() + bias).requires_grad_()
    h, c = h.requires_grad_(), c.requires_grad_()
    outputs, saved = lstm.forward(gates, w_hh, h, c)
    grad, dh, dc = torch.randn(T, 7, HIDDEN, dtype=D), *torch.randn(2, 7, HIDDEN, dtype=D)
    wanted = torch.autograd.grad((outputs, outputs[-1], saved[-1, :, 4 * HIDDEN :]), (gates, h, c), (grad, dh, dc), retain_graph=True)
    with torch.no_grad():
        torch.testing.assert_close(lstm.backward(grad, dh, dc, w_hh, saved, c), wanted, rtol=1e-12, atol=1e-12)


def _close(loss: Any, layer: nn.Module, *args: Tensor) -> None:
    assert_close(per_sample_grad(loss)(state_of(layer), *args), loop(loss, (0,), (None, *[0] * len(args)))(state_of(layer), *args)[0])


def _layer(**options: Any) -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(WIDTH, HIDDEN, **options)


def test_a_plain_call_runs_in_place_and_one_that_is_differentiated_does_not(monkeypatch):
    ran: list[str] = []
    for name in ("forward", "forward_in_place", "backward", "backward_in_place"):
        kernel = getattr(lstm, name)
        monkeypatch.setattr(lstm, name, lambda *a, name=name, kernel=kernel: ran.append(name) or kernel(*a))
    layer, x = _layer(), torch.randn(N, T, B, WIDTH)
    grads = per_sample_grad(lambda p, x: call(layer, p, x)[0].sin().sum())
    grads(state_of(layer), x)
    assert ran == ["forward_in_place", "backward_in_place"]
    ran.clear()
    torch.func.grad(lambda p: grads(p, x)["weight_hh_l0"].sum())(state_of(layer))
    # Torch differentiates the op twice by a formula of its own ops.
    assert ran == ["forward"]


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_the_outputs_can_be_viewed(options):
    layer = _layer(**options)

    def loss(p: Any, x: Tensor) -> Tensor:
        out, (h, c) = call(layer, p, x)
        if not layer.batch_first:
            out = out.view(-1)
        return (out * torch.arange(out.numel()).view(out.shape).cos()).sum() + h.view(-1)[1:].sum() + c.view(-1)[2:].sum()

    _close(loss, layer, torch.randn(N, *((B, T) if layer.batch_first else (T, B)), WIDTH))


def test_the_last_state_can_be_written_into():
    layer = _layer()

    def loss(p: Any, x: Tensor) -> Tensor:
        zeros = x.new_zeros(B, HIDDEN)
        with torch.no_grad():
            rest = (False, [], 2, HIDDEN, 1, True, False, False, True)
            out, h, c, _ = aten.mkldnn_rnn_layer(x, *p.values(), zeros, zeros, *rest)
            h.mul_(3)
            c.add_(1)
        return p["bias_ih_l0"][0] * (out * h * c).sum() + call(layer, p, x)[0].sum()

    _close(loss, layer, torch.randn(N, T, B, WIDTH))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["Outer"]),
        ({"bidirectional": True}, ["Outer", "Tensor"]),
        ({"num_layers": 2}, ["Outer", "Tensor"]),
        ({"dtype": torch.bfloat16}, ["Tensor"]),
    ],
)
def test_the_gradient_of_data_stays_factored_and_is_right(monkeypatch, options, expected):
    """Nobody asks for it, so it is asked for here, and compared with the product that is taken for an input that is differentiated."""
    kinds: list[str] = []
    to_input = rnn._to_input

    def both(layer: Any, gates: Tensor, input: Any, in_place: bool) -> Any:
        found, wanted = to_input(layer, gates, input, in_place), to_input(layer, gates, None, in_place)
        kinds.append(type(found).__name__)
        assert_close(found.materialize() if kinds[-1] == "Outer" else found, wanted)
        return found

    monkeypatch.setattr(rnn, "_to_input", both)
    layer = _layer(**options)
    x = torch.randn(N, T, B, WIDTH, dtype=options.get("dtype"))
    per_sample_grad(lambda p, x: call(layer, p, x)[0].sin().sum())(state_of(layer), x)
    # Backwards in time or in another precision it would take a copy; and the second layer's input is not data.
    assert sorted(kinds) == expected


def test_a_graph_is_walked_more_than_once():
    layer, x = _layer(), torch.randn(N, T, B, WIDTH)

    def outputs(p: Any, x: Tensor) -> Tensor:
        return call(layer, p, x)[0].sum((0, 1))

    found = per_sample_jacobian(outputs)(state_of(layer), x)
    for row in range(HIDDEN):
        expected = loop(lambda p, x, row=row: outputs(p, x)[row], (0,), (None, 0))(state_of(layer), x)[0]
        assert_close({k: g[:, row] for k, g in found.items()}, expected)
