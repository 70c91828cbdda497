"""The sum of clipped gradients, from the gradients."""

from __future__ import annotations

import functools
import math
import warnings
from typing import TYPE_CHECKING, Any, Generic, overload

import torch
from torch import Tensor

from per_sample import _trees as trees
from per_sample._containers import close_tree, open_tree
from per_sample._errors import ArgumentError, NonFiniteWarning
from per_sample._signatures import Memory, P, Randomness
from per_sample.reference.dense import dense_gradients, norms_of, weighted_sums
from per_sample.reference.sums import check_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._arguments import Argnums
    from per_sample.reference.dense import Gradients


class clipped_grad(Generic[P]):
    """``per_sample.clipped_grad`` by ``vmap(grad(fn))``, a norm of each row, and a sum over the samples.

    Args:
        fn: as in ``per_sample.clipped_grad``, and so are the other arguments.
        max_norm: as in ``per_sample.clipped_grad``.
        argnums: as in ``per_sample.clipped_grad``.
        in_dims: as in ``per_sample.clipped_grad``.
        normalize_by: as in ``per_sample.clipped_grad``.
        automatic: as in ``per_sample.clipped_grad``.
        stability: as in ``per_sample.clipped_grad``.
        return_norms: as in ``per_sample.clipped_grad``.
        return_values: as in ``per_sample.clipped_grad``.
        memory: as in ``per_sample.clipped_grad``.
        has_aux: as in ``per_sample.clipped_grad``.
        keep_batch_dim: as in ``per_sample.clipped_grad``.
        chunk_size: as in ``per_sample.clipped_grad``.
        randomness: as in ``per_sample.clipped_grad``.

    Returns:
        A callable that returns the sums; after them the norms with ``return_norms``, the losses with ``return_values``, and the
        auxiliary values with ``has_aux``.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import reference
        >>> w, x = torch.ones(2), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> reference.clipped_grad(lambda w, x: (w * x).sum(), 2.5)(w, x)
        tensor([2.5000, 2.0000])
    """

    def __init__(
        self,
        fn: Callable[P, Any],
        max_norm: Any,
        argnums: Argnums = 0,
        in_dims: Any = None,
        *,
        normalize_by: float = 1.0,
        automatic: bool = False,
        stability: float = 0.01,
        return_norms: bool = False,
        return_values: bool = False,
        memory: Memory = "fast",
        has_aux: bool = False,
        keep_batch_dim: bool = False,
        chunk_size: int | None = None,
        randomness: Randomness = "error",
    ) -> None:
        functools.update_wrapper(self, fn, updated=())
        check_memory(memory)
        self._bounds, self._spec = trees.flatten(open_tree(max_norm))
        for bound in self._bounds:
            _check_bound(bound, automatic)
        if not (_is_number(normalize_by) and 0 < normalize_by < math.inf):
            raise ArgumentError(f"`normalize_by` must be a positive number; got {normalize_by!r}.")
        if not (_is_number(stability) and 0 < stability < math.inf):
            raise ArgumentError(f"`stability` must be a positive number; got {stability!r}.")
        self._normalize_by, self._automatic, self._stability = normalize_by, automatic, stability
        self._return_norms, self._return_values, self._has_aux = return_norms, return_values, has_aux
        self._gradients = dense_gradients(
            fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
        )

    def sensitivity(self, relation: str = "add_or_remove_one") -> float:
        """As in ``per_sample.clipped_grad``."""
        factors = {"add_or_remove_one": 1.0, "replace_one": 2.0}
        if relation not in factors:
            raise ArgumentError(f"`relation` must be one of {tuple(factors)}; got {relation!r}.")
        return factors[relation] * math.hypot(*(float(bound) for bound in self._bounds if bound is not None)) / self._normalize_by

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    @overload
    def __call__(self, *args: Any, is_padding: Tensor | None, **kwargs: Any) -> Any: ...
    def __call__(self, *args: Any, is_padding: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[misc]
        """The sums, and what else was asked for."""
        found = self._gradients(args, kwargs)
        members = self._members(found)
        norms = [norms_of(found.matrix(group)).to(found.matrix().dtype.to_real()) for group in members]
        keep = torch.stack([norm.isfinite() for norm in norms]).all(0)
        there = torch.ones_like(keep) if is_padding is None else ~_checked(is_padding, found.arguments.n)
        _warn(there & ~keep)
        keep = keep & there
        sums: list[Tensor] = [g.sum(0) for g in found.leaves]
        for group, norm, bound in zip(members, norms, self._bounds, strict=True):
            if bound is None:
                continue
            kept = [torch.where(keep.reshape(-1, *(1,) * (g.dim() - 1)), g, 0) for g in (found.leaves[i] for i in group)]
            weighted = weighted_sums(kept, self._weights(torch.where(keep, norm, 0), bound))
            for i, total in zip(group, weighted, strict=True):
                sums[i] = total / self._normalize_by
        out = [found.as_arguments(sums)]
        if self._return_norms:
            shown = [None if bound is None else torch.where(there, norm, 0) for norm, bound in zip(norms, self._bounds, strict=True)]
            out.append(close_tree(trees.unflatten(self._spec, shown)))
        return found.beside(out, values=self._return_values, aux=self._has_aux)

    def _weights(self, norm: Tensor, bound: float) -> Tensor:
        if self._automatic:
            return bound / (norm + self._stability)
        # The inner choice keeps the derivative finite where the norm is zero.
        return torch.where(norm > bound, bound / torch.where(norm > bound, norm, 1), 1)

    def _members(self, found: Gradients) -> list[list[int]]:
        """The leaves that each bound is for."""
        numbers = found.arranged(list(range(len(found.leaves))))
        groups = trees.unflatten(self._spec, list(range(len(self._bounds))))
        modules = trees.by_module(groups, numbers)
        try:
            if modules is None:
                group_of = trees.broadcast_prefix(groups, numbers)
            else:
                group_of = [groups[modules[number]] for number in trees.flatten(numbers)[0]]
        except ValueError as err:
            raise ArgumentError(f"`max_norm` is not a prefix of the differentiated argument's structure: {err}") from err
        members: list[list[int]] = [[] for _ in self._bounds]
        for group, number in zip(group_of, trees.flatten(numbers)[0], strict=True):
            if number is not None and self._bounds[group] is None:
                raise ArgumentError("`max_norm` has None for a tensor; only what is not differentiated needs no bound.")
            if number is not None:
                members[group].append(number)
        return members


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _check_bound(bound: Any, automatic: bool) -> None:
    # None stands for leaves that are None.
    if bound is None or (isinstance(bound, Tensor) and bound.dim() == 0 and bound.is_floating_point()):
        return
    if not (_is_number(bound) and bound > 0 and (bound < math.inf or not automatic)):
        raise ArgumentError(f"`max_norm` must be a positive number, finite with `automatic`, or a pytree of those; got {bound!r}.")


def _checked(is_padding: Any, n: int) -> Tensor:
    if not isinstance(is_padding, Tensor) or is_padding.dtype != torch.bool or is_padding.shape != (n,):
        raise ArgumentError(f"`is_padding` must be a bool for each sample, a tensor of shape [{n}]; got {is_padding!r}.")
    return is_padding


def _warn(bad: Tensor) -> None:
    # Under an outer transform nobody knows the numbers.
    if not torch._C._functorch.is_functorch_wrapped_tensor(bad) and bool(bad.any()):
        message = f"{int(bad.sum())} of {len(bad)} samples have a gradient that is not finite; they were left out of the clipped sum."
        warnings.warn(message, NonFiniteWarning, stacklevel=3)
