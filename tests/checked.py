"""One check for whole programs: the gradients of a loop of plain autograd, by the routes that are expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

import case
from oracle import loop_grads
from per_sample import explain, per_sample_grad_and_value

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor, nn


def check(
    loss: Callable[..., Tensor],
    params: dict[str, Tensor],
    *samples: Tensor,
    keep_batch_dim: bool = False,
    fallback: Collection[str] = (),
) -> dict[str, Tensor]:
    """The gradients of ``loss(params, *samples)`` where they and the losses are right, and only these ops have no rule.

    No op runs sample by sample.
    """
    options = {"keep_batch_dim": keep_batch_dim}
    grads, values = per_sample_grad_and_value(loss, **options)(params, *samples)
    names = list(params)

    def of_list(leaves: list[Tensor], *one: Tensor) -> Tensor:
        return loss(dict(zip(names, leaves, strict=True)), *one)

    expected, expected_values = loop_grads(of_list, list(params.values()), samples, **options)
    torch.testing.assert_close(values, expected_values.to(values.dtype))
    torch.testing.assert_close(grads, dict(zip(names, expected, strict=True)))
    rows = explain(loss, **options)(params, *samples).rows
    assert {row.op for row in rows if row.route == "loop"} == set()
    assert {row.op.removeprefix("aten.") for row in rows if row.route == "fallback"} <= set(fallback)
    return grads


def score(out: Any) -> Tensor:
    """A scalar that depends on every element of every tensor in a tree."""
    return sum(case.score(x) for x in tree_leaves(out) if x is not None)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters, detached, a tied one once."""
    return {name: p.detach() for name, p in module.named_parameters()}


def call(module: nn.Module, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The module with other parameters."""
    return torch.func.functional_call(module, params, args, kwargs)
