"""One direction of one LSTM layer over whole sequences, with all that its backward pass needs.

Tensors are indexed time first, ``[t, *m, ...]``; ``m`` are the sequences, ``[n * b]`` where they share the weights and ``[n, b]`` where
each sample has its own (``[n, 4 h, h]``). The gates stand in torch's order: input, forget, cell, output.

Each pass is written twice: of differentiable ops, and for shared weights in place, where a step of the loop is a handful of ops without a
temporary. The latter keeps the steps of a sequence side by side in memory, as all who take products over time would have them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _times(w: Tensor) -> Any:
    """``addmm`` for shared weights, ``baddbmm`` for the samples' own."""
    return torch.addmm if w.dim() == 2 else torch.baddbmm


def forward(gates: Tensor, w_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs ``[t, *m, h]``, and the activated gates and the cells side by side, ``[t, *m, 5 h]``.

    ``gates [t, *m, 4 h]``: what the inputs and biases add to the gates; ``h`` and ``c [*m, h]``: the initial state.
    """
    multiply, w = _times(w_hh), w_hh.transpose(-1, -2)
    outputs, saved = [], []
    for pre in gates.unbind(0):
        i, f, g, o = multiply(pre, h, w).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = torch.addcmul(f * c, i, g)
        h = o * c.tanh()
        outputs.append(h)
        saved.append(torch.cat((i, f, g, o, c), -1))
    return torch.stack(outputs), torch.stack(saved)


def forward_in_place(x: Tensor, w_ih: Tensor, bias: Tensor | None, w_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """``forward`` from the inputs ``x [t, m, k]``, in ops that write into what they return; shared weights only."""
    t, m, k = x.shape
    size = w_hh.shape[1]
    saved, outputs = x.new_empty(m, t, 5 * size), x.new_empty(m, t, size)
    rows, inputs = saved.view(m * t, 5 * size)[:, : 4 * size], x.transpose(0, 1).reshape(m * t, k)
    if bias is None:
        torch.mm(inputs, w_ih.t(), out=rows)
    else:
        torch.addmm(bias, inputs, w_ih.t(), out=rows)
    w, tanh_c = w_hh.t(), torch.empty_like(c)
    # All views of all steps at once: one by one they would cost as much as the arithmetic.
    parts = (saved[..., : 4 * size], saved[..., : 2 * size], *saved.chunk(5, -1), outputs)
    for gates, both, i, f, g, o, cell, out in zip(*(part.unbind(1) for part in parts), strict=True):
        gates.addmm_(h, w)
        both.sigmoid_()
        c = torch.mul(f, c, out=cell).addcmul_(i, g.tanh_())
        h = torch.mul(o.sigmoid_(), torch.tanh(c, out=tanh_c), out=out)
    return outputs.transpose(0, 1), saved.transpose(0, 1)


def backward(grad: Tensor, dh: Tensor, dc: Tensor, w_hh: Tensor, saved: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the gates before activation ``[t, *m, 4 h]`` and of the initial state.

    ``grad [t, *m, h]``: of the outputs; ``dh`` and ``dc [*m, h]``: of the last state.
    """
    multiply = _times(w_hh)
    i, f, g, o, cells = saved.chunk(5, -1)
    tanh_c = cells.tanh()
    before = torch.cat((c0.unsqueeze(0), cells[:-1]))
    # What a step does to dc and dh depends on no other step, so it is computed for all of them at once.
    to_dc = o * (1 - tanh_c * tanh_c)
    from_dc = torch.stack((g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)), -2)
    from_dh = (tanh_c * o * (1 - o)).unsqueeze(-2)
    found: list[Tensor] = []
    dh = dh + grad[-1]
    for t in range(len(grad) - 1, -1, -1):
        dc = torch.addcmul(dc, dh, to_dc[t])
        gates = torch.cat((from_dc[t] * dc.unsqueeze(-2), from_dh[t] * dh.unsqueeze(-2)), -2).flatten(-2)
        found.append(gates)
        dc = dc * f[t]
        dh = multiply(grad[t - 1] if t else torch.zeros_like(dh), gates, w_hh)
    return torch.stack(found[::-1]), dh, dc


def backward_in_place(grad: Tensor, dh: Tensor, dc: Tensor, w_hh: Tensor, saved: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``backward`` in ops that write into what they return; shared weights only. What the forward pass saved stays as it is."""
    t, m, size = grad.shape
    i, f, g, o, cells = saved.chunk(5, -1)
    gates = grad.new_empty(m, t, 4, size).transpose(0, 1)
    di, df, dg, do = gates.unbind(2)
    tanh_c = cells.tanh()
    # As in `backward`, first what no other step has a part in.
    aten.sigmoid_backward.grad_input(g, i, grad_input=di)
    aten.sigmoid_backward.grad_input(c0, f[0], grad_input=df[0])
    aten.sigmoid_backward.grad_input(cells[:-1], f[1:], grad_input=df[1:])
    aten.tanh_backward.grad_input(i, g, grad_input=dg)
    aten.sigmoid_backward.grad_input(tanh_c, o, grad_input=do)
    to_dc = aten.tanh_backward.grad_input(o, tanh_c, grad_input=tanh_c)
    dh, dc = dh + grad[-1], dc.clone()
    to_three, rows = dc.unsqueeze(1), gates.flatten(2)
    steps = [part.unbind(0) for part in (gates[:, :, :3], do, rows, f, to_dc)]
    for three, last, row, forget, to, earlier in reversed(list(zip(*steps, (None, *grad[:-1].unbind(0)), strict=True))):
        dc.addcmul_(dh, to)
        three.mul_(to_three)
        last.mul_(dh)
        dc.mul_(forget)
        dh = torch.mm(row, w_hh, out=dh) if earlier is None else torch.addmm(earlier, row, w_hh, out=dh)
    return rows, dh, dc
