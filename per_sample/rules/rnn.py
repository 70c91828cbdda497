"""The fused LSTM layer of the CPU. GRUs, plain RNNs and double precision arrive as single steps, which other rules take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, Context, context_of, physical
from per_sample._factors import Outer
from per_sample._kernels import lstm
from per_sample._kernels.functional import must_be_functional
from per_sample._registry import rule

aten = torch.ops.aten


class _Layer:
    """The physical operands, in single or double precision: ``m`` is ``[n * b]``, or ``[n, b]`` where weights differ between samples."""

    def __init__(self, ctx: Context, input: Any, w_ih: Any, w_hh: Any, biases: tuple[Any, ...], reverse: bool) -> None:
        self.n, self.reverse = ctx.n, reverse
        self.dtype = input.dtype
        self.t, self.b = input.shape[0], input.shape[1]
        self.own = type(w_ih) is Batched or type(w_hh) is Batched
        self.m = (ctx.n, self.b) if self.own else (ctx.n * self.b,)
        self.x = self.sequence(input)
        self.w_ih, self.w_hh = self.weight(w_ih), self.weight(w_hh)
        self.biases = biases
        self.in_place = not (self.own or any(type(w) is Batched for w in biases) or ctx.functional)

    def weight(self, w: Any) -> Tensor:
        return self.wide(physical(w, self.n) if self.own else w)

    def wide(self, x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

    def sequence(self, x: Any) -> Tensor:
        """``[t, b, k]`` of every sample as ``[t, *m, k]``, in the order in which the layer reads it."""
        value = self.wide(physical(x, self.n)).transpose(1, 2)
        return (value.flip(2) if self.reverse else value).reshape(*self.m, self.t, -1).movedim(-2, 0)

    def state(self, x: Any) -> Tensor:
        """``[1, b, k]`` or ``[b, k]`` of every sample as ``[*m, k]``."""
        return self.wide(physical(x, self.n)).reshape(*self.m, -1)

    def out(self, x: Tensor) -> Tensor:
        """``[t, *m, k]`` as ``[n, t, b, k]``, in the program's order."""
        value = (x.flip(0) if self.reverse else x).movedim(0, -2).reshape(self.n, self.b, self.t, -1).transpose(1, 2)
        return value.to(self.dtype)

    def over_time(self, x: Tensor) -> Tensor:
        """``[t, *m, k]`` as ``[n, b * t, k]``."""
        return x.movedim(0, -2).reshape(self.n, self.b * self.t, -1).to(self.dtype)


def _forward(layer: _Layer, h: Any, c: Any) -> tuple[Tensor, Tensor]:
    h, c = layer.state(h), layer.state(c)
    if layer.in_place and not must_be_functional(layer.x, layer.w_ih, layer.w_hh, h, c):
        bias = layer.wide(layer.biases[0]) + layer.wide(layer.biases[1]) if layer.biases else None
        return lstm.forward_in_place(layer.x, layer.w_ih, bias, layer.w_hh, h, c)
    gates = layer.x @ layer.w_ih.transpose(-1, -2)
    for bias in layer.biases:
        added = physical(bias, layer.n).unsqueeze(1) if type(bias) is Batched else bias
        gates = (gates.reshape(layer.t, layer.n, layer.b, -1) + layer.wide(added)).reshape(gates.shape)
    return lstm.forward(gates, layer.w_hh, h, c)


@rule(aten.mkldnn_rnn_layer.default)
def mkldnn_rnn_layer(
    input: Any, weight0: Any, weight1: Any, weight2: Any, weight3: Any, hx_: Any, cx_: Any, reverse: bool, batch_sizes: Any, mode: int,
    hidden_size: int, num_layers: int, has_biases: bool, bidirectional: bool, batch_first: bool, train: bool,
) -> Any:  # fmt: skip
    """The workspace, which only the backward rule reads, holds the activated gates and the cells."""
    ctx = context_of(input, weight0, weight1, weight2, weight3, hx_, cx_)
    layer = _Layer(ctx, input, weight0, weight1, (weight2, weight3) if has_biases else (), reverse)
    h, saved = _forward(layer, hx_, cx_)
    # Copies, since the program may write into the last state.
    last = [x.reshape(ctx.n, *hx_.shape).to(layer.dtype, copy=True) for x in (h[-1], saved[-1, ..., 4 * hidden_size :])]
    # The program may view it, and the op's own result is contiguous.
    return layer.out(h).contiguous(), *last, saved.movedim(0, -2).reshape(ctx.n, layer.b, layer.t, -1)


@rule(aten.mkldnn_rnn_layer_backward.default)
def mkldnn_rnn_layer_backward(
    input: Any, weight1: Any, weight2: Any, weight3: Any, weight4: Any, hx_: Any, cx_tmp: Any, output: Any, hy_: Any, cy_: Any,
    grad_output: Any, grad_hy: Any, grad_cy: Any, reverse: bool, mode: int, hidden_size: int, num_layers: int, has_biases: bool,
    train: bool, bidirectional: bool, batch_sizes: Any, batch_first: bool, workspace: Any,
) -> Any:  # fmt: skip
    """The gradients of both weights stay factored: over time, as of one long sequence."""
    ctx = context_of(workspace, grad_output, grad_hy, grad_cy)
    layer = _Layer(ctx, input, weight1, weight2, (weight3, weight4) if has_biases else (), reverse)
    if type(workspace) is Batched:
        saved = workspace.physical.reshape(*layer.m, layer.t, -1).movedim(-2, 0)
    else:
        # Nothing differed between samples in the forward pass, so torch's kernel ran, whose workspace only it can read.
        _, saved = _forward(layer, hx_, cx_tmp)
    h, h0, c0 = layer.sequence(output), layer.state(hx_), layer.state(cx_tmp)
    grad = torch.zeros_like(h) if grad_output is None else layer.sequence(grad_output)
    dh, dc = (torch.zeros_like(h[0]) if g is None else layer.state(g) for g in (grad_hy, grad_cy))
    in_place = layer.in_place and not must_be_functional(grad, dh, dc, layer.w_hh, saved, c0)
    backward = lstm.backward_in_place if in_place else lstm.backward
    gates, dh, dc = backward(grad, dh, dc, layer.w_hh, saved, c0)
    left = layer.over_time(gates)
    bias = left.sum(1)
    # One tensor for both, so that what is worked out of it can be found again.
    left = left.transpose(1, 2)
    before = torch.cat((h0.unsqueeze(-2), h[:-1].movedim(0, -2)), -2).movedim(-2, 0)
    weights = (Outer(left, layer.over_time(x)) for x in (layer.x, before))
    states = (x.reshape(ctx.n, *hx_.shape).to(layer.dtype) for x in (dh, dc))
    return _to_input(layer, gates, input, in_place), *weights, bias, bias, *states


def _to_input(layer: _Layer, gates: Tensor, input: Any, in_place: bool) -> Tensor | Outer:
    """The gradient of the input."""
    if not in_place:
        return layer.out(gates @ layer.w_ih)
    if layer.reverse or layer.dtype != gates.dtype or type(input) is not Batched or input.requires_grad:
        return layer.out((gates.transpose(0, 1) @ layer.w_ih).transpose(0, 1))
    # Data are differentiated by hardly anyone, and the op does not say so: a product for each step, taken if someone asks.
    left = gates.transpose(0, 1).view(layer.n, layer.b, layer.t, -1).transpose(1, 2)
    return Outer(left, layer.w_ih.expand(layer.n, layer.t, *layer.w_ih.shape))
