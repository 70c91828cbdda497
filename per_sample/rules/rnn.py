"""The fused LSTM layer of the CPU. GRUs, plain RNNs and double precision arrive as single steps, which other rules take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._factors import Factor, Outer
from per_sample._kernels import lstm
from per_sample._registry import rule

aten = torch.ops.aten


class _Layer:
    """The physical operands, in single or double precision: ``m`` is ``[n * b]``, or ``[n, b]`` where weights differ between samples."""

    def __init__(self, n: int, input: Any, w_ih: Any, w_hh: Any, reverse: bool) -> None:
        self.n, self.reverse = n, reverse
        self.dtype = input.dtype
        self.t, self.b = input.shape[0], input.shape[1]
        self.own = type(w_ih) is Batched or type(w_hh) is Batched
        self.m = (n, self.b) if self.own else (n * self.b,)
        self.x = self.sequence(input)
        self.w_ih, self.w_hh = self.weight(w_ih), self.weight(w_hh)

    def weight(self, w: Any) -> Tensor:
        return self.wide(physical(w, self.n) if self.own else w)

    def wide(self, x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

    def sequence(self, x: Any) -> Tensor:
        """``[t, b, k]`` of every sample as ``[t, *m, k]``, in the order in which the layer reads it."""
        value = self.wide(physical(x, self.n)).transpose(0, 1)
        return (value.flip(0) if self.reverse else value).reshape(self.t, *self.m, -1)

    def state(self, x: Any) -> Tensor:
        """``[1, b, k]`` or ``[b, k]`` of every sample as ``[*m, k]``."""
        return self.wide(physical(x, self.n)).reshape(*self.m, -1)

    def out(self, x: Tensor) -> Tensor:
        """``[t, *m, k]`` as ``[n, t, b, k]``, in the program's order."""
        value = (x.flip(0) if self.reverse else x).reshape(self.t, self.n, self.b, -1).transpose(0, 1)
        return value.to(self.dtype)


def _forward(layer: _Layer, biases: tuple[Any, ...], h: Any, c: Any) -> tuple[Tensor, Tensor, Tensor]:
    gates = layer.x @ layer.w_ih.transpose(-1, -2)
    for bias in biases:
        added = physical(bias, layer.n).unsqueeze(1) if type(bias) is Batched else bias
        gates = (gates.view(layer.t, layer.n, layer.b, -1) + layer.wide(added)).view_as(gates)
    return lstm.forward(gates, layer.w_hh, layer.state(h), layer.state(c))


@rule(aten.mkldnn_rnn_layer.default)
def mkldnn_rnn_layer(
    input: Any, weight0: Any, weight1: Any, weight2: Any, weight3: Any, hx_: Any, cx_: Any, reverse: bool, batch_sizes: Any, mode: int,
    hidden_size: int, num_layers: int, has_biases: bool, bidirectional: bool, batch_first: bool, train: bool,
) -> Any:  # fmt: skip
    """The workspace, which only the backward rule reads, holds the activated gates and the cells."""
    n = samples(input, weight0, weight1, weight2, weight3, hx_, cx_)
    layer = _Layer(n, input, weight0, weight1, reverse)
    h, activated, cells = _forward(layer, (weight2, weight3) if has_biases else (), hx_, cx_)
    last = [x[-1].reshape(n, *hx_.shape).to(layer.dtype) for x in (h, cells)]
    saved = torch.cat((activated, cells), -1).reshape(layer.t, n, layer.b, -1).transpose(0, 1)
    return layer.out(h), *last, saved


@rule(aten.mkldnn_rnn_layer_backward.default)
def mkldnn_rnn_layer_backward(
    input: Any, weight1: Any, weight2: Any, weight3: Any, weight4: Any, hx_: Any, cx_tmp: Any, output: Any, hy_: Any, cy_: Any,
    grad_output: Any, grad_hy: Any, grad_cy: Any, reverse: bool, mode: int, hidden_size: int, num_layers: int, has_biases: bool,
    train: bool, bidirectional: bool, batch_sizes: Any, batch_first: bool, workspace: Any,
) -> Any:  # fmt: skip
    """The gradients of both weights stay factored: over time, as of one long sequence."""
    n = samples(workspace, grad_output, grad_hy, grad_cy)
    layer = _Layer(n, input, weight1, weight2, reverse)
    if type(workspace) is Batched:
        saved = workspace.physical.transpose(0, 1).reshape(layer.t, *layer.m, -1)
        activated, cells = saved.split((4 * hidden_size, hidden_size), -1)
    else:
        # Nothing differed between samples in the forward pass, so torch's kernel ran, whose workspace only it can read.
        _, activated, cells = _forward(layer, (weight3, weight4) if has_biases else (), hx_, cx_tmp)
    h = layer.sequence(output)
    grad = torch.zeros_like(h) if grad_output is None else layer.sequence(grad_output)
    dh, dc = (torch.zeros_like(h[0]) if g is None else layer.state(g) for g in (grad_hy, grad_cy))
    h0 = layer.state(hx_)
    gates, dh, dc = lstm.backward(grad, dh, dc, layer.w_hh, activated, cells, layer.state(cx_tmp))
    left = _over_time(layer, gates)
    dx = layer.out(gates @ layer.w_ih)
    bias = left.sum(1)
    before = torch.cat((h0.unsqueeze(0), h[:-1]))
    weights = (_outer(left, _over_time(layer, x)) for x in (layer.x, before))
    return dx, *weights, bias, bias, dh.reshape(n, *hx_.shape).to(layer.dtype), dc.reshape(n, *hx_.shape).to(layer.dtype)


def _over_time(layer: _Layer, x: Tensor) -> Tensor:
    """``[t, *m, k]`` as ``[n, t * b, k]``."""
    return x.reshape(layer.t, layer.n, layer.b, -1).transpose(0, 1).reshape(layer.n, layer.t * layer.b, -1).to(layer.dtype)


def _outer(left: Tensor, right: Tensor) -> Factor:
    return Outer(left.transpose(1, 2), right)
