"""The way back into a module: parameters and gradients by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from per_sample._errors import ArgumentError, UnsupportedError, few
from per_sample._fsdp import resharded
from per_sample._ranks import is_distributed


def load_back(module: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Write parameters (or buffers) into a module.

    Args:
        module: what ``functional`` was made from, or a module with the same names.
        params: tensors by name, in the module's shapes; names that are left out keep their values.

    Raises:
        ArgumentError: for a name that the module does not have, or another shape; then nothing is written.

    Example:
        >>> import torch
        >>> from per_sample import functional, load_back
        >>> model = torch.nn.Linear(2, 1)
        >>> load_back(model, {"bias": torch.tensor([3.0])})
        >>> model.bias.item()
        3.0
    """
    own = state_of(module)
    check_shapes(params, own, "params")
    with torch.no_grad():
        for name, x in params.items():
            own[name].copy_(_like(x, own[name]))


def set_grads(module: nn.Module, grads: Mapping[str, Tensor]) -> None:
    """Put gradients into a module's ``.grad``, where an optimizer of ``torch.optim`` looks for them.

    Args:
        module: what ``functional`` was made from, or a module with the same names.
        grads: tensors by name, in the parameters' shapes: a sum or mean over samples. They replace what ``.grad`` holds.

    Raises:
        ArgumentError: for a name that is no parameter of the module, or another shape; then nothing is set.

    Example:
        >>> import torch
        >>> from per_sample import clipped_grad, functional, set_grads
        >>> model = torch.nn.Linear(2, 1)
        >>> loss = functional(model, torch.nn.functional.mse_loss)
        >>> set_grads(model, clipped_grad(loss, max_norm=1.0)(loss.params, torch.randn(4, 2), torch.randn(4, 1)))
        >>> model.weight.grad.shape
        torch.Size([1, 2])
    """
    own = dict(resharded(module).named_parameters(remove_duplicate=False))
    check_shapes(grads, own, "grads")
    for name, x in grads.items():
        # A copy: what clips or zeroes gradients writes into them.
        own[name].grad = _like(x, own[name]).detach().to(device=own[name].device, dtype=own[name].dtype, copy=True)


def _like(x: Tensor, own: Tensor) -> Tensor:
    """A tensor that is spread over processes as a whole one, where the module's own is plain."""
    return x.full_tensor() if is_distributed(x) and not is_distributed(own) else x  # type: ignore[attr-defined]


def by_first_name(tensors: Mapping[str, Tensor], own: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors by the first name of each of the module's own, as in ``named_parameters``; a tied one has several."""
    check_shapes(tensors, own, what)
    first = {id(own[name]): name for name in reversed(own)}
    found: dict[str, Tensor] = {}
    for name, x in tensors.items():
        other = found.setdefault(first[id(own[name])], x)
        # A `state_dict` has them all, each as a tensor of its own.
        if not (other is x or x.is_meta or torch.equal(other, x)):
            raise ArgumentError(f"`{what}` has different ones for {first[id(own[name])]!r} and {name!r}, which are tied.")
    return found


def state_of(module: nn.Module) -> dict[str, Tensor]:
    # A tied tensor by all its names.
    parameters = resharded(module).named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def check_shapes(tensors: Any, own: Mapping[str, Tensor], what: str) -> None:
    """Raise ``ArgumentError`` unless every name is one of the module's, with a tensor of its shape."""
    if not isinstance(tensors, Mapping):
        raise ArgumentError(f"`{what}` must be a dict by the module's names; got {type(tensors).__name__}.")
    unknown = tensors.keys() - own.keys()
    if unknown:
        raise ArgumentError(f"`{what}` names {few(unknown)}, which the module does not have.")
    for name, x in tensors.items():
        if is_lazy(own[name]):
            raise UnsupportedError(f"The parameter {name!r} is not initialised; run the module once first.")
        if isinstance(x, Tensor) and x.is_complex() and not own[name].is_complex():
            raise ArgumentError(f"`{what}[{name!r}]` is complex, where the module's own is real.")
        found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if found != list(own[name].shape):
            hint = " Sum or average over the samples first." if found[1:] == list(own[name].shape) else ""
            raise ArgumentError(f"`{what}[{name!r}]` must have the shape {list(own[name].shape)}; got {found}.{hint}")
