"""Book-keeping (Bu et al. 2022, Differentially Private Optimization on Large Model at Small Cost), as fastDP does it.

fastDP itself is in no package index. One backward pass stops at the layers' outputs; norms come from a layer's input and
output gradient, by the products of positions or by the sample's gradient, whichever is smaller; then one weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.methods.method import Runner
from bench.methods.reductions import clipping_weights
from bench.workloads import Task

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: torch.nn.grad.conv1d_weight,
    nn.Conv2d: torch.nn.grad.conv2d_weight,
    nn.Conv3d: torch.nn.grad.conv3d_weight,
}


@dataclass
class Call:
    """What one layer was given and what it gave; ``g`` is the gradient of that, once known."""

    layer: Any
    x: Tensor
    output: Tensor
    g: Tensor


def _outer_norm(x: Tensor, g: Tensor) -> Tensor:
    """Squared norms of the sums over t of outer products: `x (n, r, t, i)`, `g (n, r, t, o)`, r groups."""
    if 2 * x.shape[2] ** 2 < x.shape[3] * g.shape[3]:
        return ((x @ x.mT) * (g @ g.mT)).sum((1, 2, 3))
    return (g.mT @ x).square().sum((1, 2, 3))


def _patches(conv: Any, x: Tensor) -> Tensor:
    """`x (n, c, *size)` to `(n, groups, t, c / groups * kernel)`."""
    x = F.pad(x, [p for size in reversed(conv.padding) for p in (size, size)])
    for dim, (kernel, stride) in enumerate(zip(conv.kernel_size, conv.stride, strict=True), 2):
        x = x.unfold(dim, kernel, stride)
    d = len(conv.kernel_size)
    x = x.unflatten(1, (conv.groups, -1)).movedim(2, 2 + d)
    return x.flatten(2, 1 + d).flatten(3)


def _normalised(layer: Any, x: Tensor) -> Tensor:
    """The input of the affine part, `(n, t, c)`."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps).flatten(1, -2)
    return F.group_norm(x, layer.num_groups, eps=layer.eps).flatten(2).mT


def _positions(call: Call) -> Tensor:
    """The output's gradient as `(n, t, channels)`."""
    channels_last = isinstance(call.layer, nn.Linear | nn.LayerNorm | nn.Embedding)
    return call.g.reshape(len(call.g), -1, call.g.shape[-1]) if channels_last else call.g.flatten(2).mT


def _squares(call: Call) -> Tensor:
    """`[n]`, of all parameters of a layer."""
    layer, g = call.layer, _positions(call)
    if isinstance(layer, nn.Embedding):
        index = call.x.flatten(1)
        return ((index[:, :, None] == index[:, None]) * (g @ g.mT)).sum((1, 2))
    if isinstance(layer, nn.Linear):
        squares = _outer_norm(call.x.reshape(len(g), 1, -1, call.x.shape[-1]), g.unsqueeze(1))
    elif type(layer) in CONVOLUTIONS:
        squares = _outer_norm(_patches(layer, call.x), g.unflatten(2, (layer.groups, -1)).movedim(2, 1))
    else:
        squares = (_normalised(layer, call.x) * g).sum(1).square().sum(1)
    return squares if layer.bias is None else squares + g.sum(1).square().sum(1)


def _weighted(call: Call, weights: Tensor) -> list[Tensor]:
    """The weighted sum of the gradients of the layer's parameters."""
    layer, positions = call.layer, _positions(call)
    g = positions * weights[:, None, None]
    if isinstance(layer, nn.Embedding):
        return [torch.zeros_like(layer.weight).index_add_(0, call.x.flatten(), g.flatten(0, 1))]
    if isinstance(layer, nn.Linear):
        weight = g.flatten(0, 1).T @ call.x.flatten(0, -2)
    elif type(layer) in CONVOLUTIONS:
        grad_output = call.g * weights.view(-1, *[1] * (call.g.dim() - 1))
        place = layer.stride, layer.padding, layer.dilation, layer.groups
        weight = CONVOLUTIONS[type(layer)](call.x, layer.weight.shape, grad_output, *place)
    else:
        weight = (_normalised(layer, call.x) * g).sum((0, 1))
    return [weight] if layer.bias is None else [weight, g.sum((0, 1))]


def _layers(model: nn.Module) -> list[nn.Module]:
    known = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, *CONVOLUTIONS)
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    for layer in layers:
        if not isinstance(layer, known):
            raise NotImplementedError(f"book-keeping has no rule for {type(layer).__name__}")
    if sum(len(list(m.parameters(recurse=False))) for m in layers) > len(list(model.parameters())):
        raise NotImplementedError("book-keeping has no rule for tied parameters")
    return layers


@contextmanager
def _recorded(layers: list[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    calls: dict[nn.Module, Call] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Parameters require no gradient, so the first layer of all starts the graph.
        if not output.requires_grad:
            output.requires_grad_()
        calls[layer] = Call(layer, inputs[0].detach(), output, output)

    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _book(task: Task) -> Callable[[], list[Call]]:
    model = task.copy_model().requires_grad_(False)
    layers = _layers(model)

    def run() -> list[Call]:
        with _recorded(layers) as calls:
            loss = task.workload.loss(model(task.x), task.y)
        found = [calls[layer] for layer in layers]
        for call, g in zip(found, torch.autograd.grad(loss, [call.output for call in found]), strict=True):
            call.g = g
        return found

    return run


def _norms(calls: list[Call]) -> Tensor:
    return torch.stack([_squares(call) for call in calls]).sum(0).sqrt()


def norms(task: Task) -> Runner:
    """One backward pass to the layers' outputs."""
    book = _book(task)
    return lambda: [_norms(book())]


def clipped(task: Task) -> Runner:
    """The same, then the weighted sum from what was kept."""
    book = _book(task)

    def run() -> list[Tensor]:
        calls = book()
        weights = clipping_weights(_norms(calls), task.max_norm)
        return [grad for call in calls for grad in _weighted(call, weights)]

    return run
