"""The fused recurrent cells of the GPU, one step each; gates and workspaces in the order of torch's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import context_of, physical, samples
from per_sample._caller import Restart
from per_sample._errors import UnsupportedError
from per_sample._registry import register, rule

aten = torch.ops.aten


def _with_bias(gates: Any, bias: Any, n: int) -> Tensor:
    value = physical(gates, n)
    return value if bias is None else value + physical(bias, n).unsqueeze(1)


@rule(aten._thnn_fused_lstm_cell.default)
def fused_lstm_cell(input_gates: Any, hidden_gates: Any, cx: Any, input_bias: Any = None, hidden_bias: Any = None) -> Any:
    """The workspace holds the activated gates: input, forget, cell, output."""
    n = samples(input_gates, hidden_gates, cx, input_bias, hidden_bias)
    gates = _with_bias(input_gates, input_bias, n) + _with_bias(hidden_gates, hidden_bias, n)
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * physical(cx, n) + i * g
    return o * cy.tanh(), cy, torch.cat((i, f, g, o), -1)


@rule(aten._thnn_fused_lstm_cell_backward_impl.default)
def fused_lstm_cell_backward(grad_hy: Any, grad_cy: Any, cx: Any, cy: Any, workspace: Any, has_bias: bool) -> Any:
    n = samples(grad_hy, grad_cy, cx, cy, workspace)
    i, f, g, o = physical(workspace, n).chunk(4, -1)
    tanh_c = physical(cy, n).tanh()
    dh = torch.zeros_like(tanh_c) if grad_hy is None else physical(grad_hy, n)
    dc = dh * o * (1 - tanh_c.square())
    if grad_cy is not None:
        dc = dc + physical(grad_cy, n)
    before = (dc * g * i * (1 - i), dc * physical(cx, n) * f * (1 - f), dc * i * (1 - g.square()), dh * tanh_c * o * (1 - o))
    gates = torch.cat(before, -1)
    return gates, dc * f, gates.sum(1)


@rule(aten._thnn_fused_gru_cell.default)
def fused_gru_cell(input_gates: Any, hidden_gates: Any, hx: Any, input_bias: Any = None, hidden_bias: Any = None) -> Any:
    """The workspace holds the reset, update and new gates, the old state, and the new gate's share of it."""
    n = samples(input_gates, hidden_gates, hx, input_bias, hidden_bias)
    r, z, new = _with_bias(input_gates, input_bias, n).chunk(3, -1)
    hidden_r, hidden_z, hidden_new = _with_bias(hidden_gates, hidden_bias, n).chunk(3, -1)
    h = physical(hx, n)
    r, z = (r + hidden_r).sigmoid(), (z + hidden_z).sigmoid()
    new = (new + r * hidden_new).tanh()
    return new + z * (h - new), torch.cat((r, z, new, h, hidden_new), -1)


@rule(aten._thnn_fused_gru_cell_backward.default)
def fused_gru_cell_backward(grad_hy: Any, workspace: Any, has_bias: bool) -> Any:
    n = samples(grad_hy, workspace)
    r, z, new, h, hidden_new = physical(workspace, n).chunk(5, -1)
    dh = physical(grad_hy, n)
    d_new = dh * (1 - z) * (1 - new.square())
    d_r, d_z = d_new * hidden_new * r * (1 - r), dh * (h - new) * z * (1 - z)
    of_input, of_hidden = torch.cat((d_r, d_z, d_new), -1), torch.cat((d_r, d_z, d_new * r), -1)
    return of_input, of_hidden, dh * z, of_input.sum(1), of_hidden.sum(1)


def _whole_network(*args: Any, **kwargs: Any) -> Any:
    """cuDNN's weight gradients are sums over the batch, so the layers are run step by step."""
    ctx = context_of(*args, *kwargs.values())
    if ctx.functions:
        raise UnsupportedError("A recurrent network called as cuDNN's own op has no per-sample form; call it through `torch.nn`.")
    raise Restart(ctx, functions=True)


register(aten._cudnn_rnn.default, _whole_network, "rule")
register(aten.miopen_rnn.default, _whole_network, "rule")
