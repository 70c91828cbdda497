"""One direction of one LSTM layer over whole sequences, with all that its backward pass needs.

Tensors are time-major, ``[t, *m, ...]``; ``m`` are the sequences, ``[n * b]`` where they share the weights and ``[n, b]`` where each
sample has its own (``[n, 4 h, h]``). The gates stand in torch's order: input, forget, cell, output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _times(w: Tensor) -> Any:
    """``addmm`` for shared weights, ``baddbmm`` for the samples' own."""
    return torch.addmm if w.dim() == 2 else torch.baddbmm


def forward(gates: Tensor, w_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs ``[t, *m, h]``, the activated gates ``[t, *m, 4 h]`` and the cells ``[t, *m, h]``.

    ``gates [t, *m, 4 h]``: what the inputs and biases add to the gates; ``h`` and ``c [*m, h]``: the initial state.
    """
    multiply, w = _times(w_hh), w_hh.transpose(-1, -2)
    outputs, activated, cells = [], [], []
    for pre in gates.unbind(0):
        i, f, g, o = multiply(pre, h, w).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = torch.addcmul(f * c, i, g)
        h = o * c.tanh()
        outputs.append(h)
        activated.append(torch.cat((i, f, g, o), -1))
        cells.append(c)
    return torch.stack(outputs), torch.stack(activated), torch.stack(cells)


def backward(
    grad: Tensor, dh: Tensor, dc: Tensor, w_hh: Tensor, activated: Tensor, cells: Tensor, c0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the gates before activation ``[t, *m, 4 h]`` and of the initial state.

    ``grad [t, *m, h]``: of the outputs; ``dh`` and ``dc [*m, h]``: of the last state.
    """
    multiply = _times(w_hh)
    i, f, g, o = activated.chunk(4, -1)
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
