"""The clipped sum of gradients, as differentially private training adds its noise to."""

from __future__ import annotations

import functools
import math
import warnings
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, overload

import torch
from torch import Tensor

from per_sample import _distributed
from per_sample import _trees as trees
from per_sample._batches import rows
from per_sample._containers import open_tree
from per_sample._errors import ArgumentError, NonFiniteWarning
from per_sample._kernels.functional import must_be_functional
from per_sample._signatures import Memory, P, Randomness
from per_sample._targets import Convention, Targets
from per_sample._weighing import Weighed, Weighing, Weights, check_memory, weighed_sum
from per_sample.quantities.combined import widest
from per_sample.quantities.precision import real_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from per_sample._arguments import Argnums


class Rounding(NamedTuple):
    """What a sum's rounding may add, relative to the parts of a gradient."""

    harmless: float  # parts this times smaller than the bound cannot move the sum beyond it by more than rounding
    added: float  # parts count as a gradient of this share of them
    largest: float  # number of the precision


_ROUNDING = {
    torch.float32: Rounding(1e-3, 1e-5, torch.finfo(torch.float32).max),
    torch.float64: Rounding(1e-8, 1e-13, torch.finfo(torch.float64).max),
}
_RELATIONS = {"add_or_remove_one": 1.0, "replace_one": 2.0}


def clipped_grad(
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
) -> ClippedGrad[P]:
    """Transform the loss of one sample into a function that returns the sum of the samples' clipped gradients, from one backward pass.

    Each sample's gradient ``g`` counts as ``min(1, max_norm / |g|) * g``, so that no sample moves the sum by more than ``max_norm``. A
    sample whose gradient is not finite, or has a norm beyond the range of its precision, is left out, with a ``NonFiniteWarning`` (the
    derivative of the sum is then not a number). A sample whose gradient is so much smaller than the parts it is a sum of that rounding
    could carry it beyond the bound is formed, and weighed by the norm that it has then. Without noise the sum is not private; see the
    limits in the documentation.

    Args:
        fn: as in ``per_sample_grad``.
        max_norm: the bound on the L2 norm of each sample's gradient, a positive number (also ``math.inf``: nothing is clipped) or a 0-dim
            tensor; or a prefix pytree of the differentiated argument, with one bound for each group of leaves below it. Where that is a
            module's parameters by name, so are groups: ``{"encoder": 1.0, "head": 0.5}`` bounds what begins with ``encoder.`` together.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``.
        normalize_by: what the sum is divided by, such as the expected batch size.
        automatic: scale every gradient to about the bound, ``max_norm / (|g| + stability) * g``, instead of clipping those that exceed it.
        stability: see ``automatic``.
        return_norms: also return the norms before clipping.
        return_values: also return every sample's loss.
        memory: ``"fast"``: one pass, which holds both sides of each weight's gradients until the norms are known; ``"low"``: two passes,
            which hold hardly more than a plain batched gradient, for the same numbers.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``: microbatches, with the same result.
        randomness: as in ``per_sample_grad``; both passes draw the same numbers.

    Returns:
        A ``ClippedGrad``: a function of the same arguments, and of ``is_padding [n]`` (True for samples that are not there). It returns
        the sum in the structure of the differentiated argument, in float32 for parameters in half precision; or a tuple
        ``(sum, norms, values, aux)`` of what is asked for. The norms are ``[n]``, in the structure of ``max_norm``; that of padding is 0.
        The values are ``[n]``, of padding too. Its ``sensitivity()`` says how far one sample can move the sum.

    Raises:
        ArgumentError: for options that cannot be right, or a ``max_norm`` that is no prefix of the differentiated argument.

    Example:
        >>> import torch
        >>> from per_sample import clipped_grad
        >>> clipped = clipped_grad(lambda w, x: w @ x, max_norm=25.0)
        >>> clipped(torch.ones(2), torch.tensor([[30.0, 40.0], [1.0, 0.0]])), clipped.sensitivity()
        (tensor([16., 20.]), 25.0)

    Source:
        Abadi et al., Deep Learning with Differential Privacy, 2016, https://arxiv.org/abs/1607.00133; Bu et al., Automatic Clipping, 2022,
        https://arxiv.org/abs/2206.07136; one pass: Bu et al., Differentially Private Optimization on Large Model at Small Cost, 2022,
        https://arxiv.org/abs/2210.00038.
    """
    convention = Convention(argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)
    convention.check(fn)
    check_memory(memory)
    for name, number, least in (("normalize_by", normalize_by, 0.0), ("stability", stability, 0.0)):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not least < number < math.inf:
            raise ArgumentError(f"`{name}` must be a positive number; got {number!r}.")
    for bound in trees.flatten(open_tree(max_norm))[0]:
        _check_bound(bound, automatic)
    return ClippedGrad(fn, convention, max_norm, normalize_by, stability if automatic else None, return_norms, return_values, memory)


def _check_bound(bound: Any, automatic: bool) -> None:
    if bound is None:
        return  # for a leaf that is None
    if isinstance(bound, Tensor) and bound.dim() == 0 and bound.is_floating_point():
        if must_be_functional(bound):
            return  # nobody knows its value here
        bound = float(bound)
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0:
        raise ArgumentError(f"`max_norm` must be a positive number, or a tree of them; got {bound!r}.")
    if automatic and bound == math.inf:
        raise ArgumentError("`max_norm` must be finite where every gradient is scaled to it (`automatic`).")


class ClippedGrad(Generic[P]):
    """What ``clipped_grad`` returns: a function, and how far one sample can move its result.

    As an annotation it names the function's arguments: ``ClippedGrad[[dict[str, Tensor], Tensor, Tensor]]``, or ``ClippedGrad[...]``.
    """

    def __init__(
        self,
        fn: Callable[P, Any],
        convention: Convention,
        max_norm: Any,
        normalize_by: float,
        stability: float | None,
        return_norms: bool,
        return_values: bool,
        memory: str,
    ) -> None:
        # Without the function's `__dict__`: the compiler of torch 2.11 cannot write into one, and it may hold names of ours.
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._convention = convention
        self._max_norm = max_norm
        self._normalize_by = normalize_by
        self._stability = stability
        self._return_norms = return_norms
        self._return_values = return_values
        self._memory = memory

    def __repr__(self) -> str:
        name = getattr(self._fn, "__name__", type(self._fn).__name__)
        return f"ClippedGrad({name}, max_norm={self._max_norm!r}, normalize_by={self._normalize_by:g})"

    def sensitivity(self, relation: str = "add_or_remove_one") -> float:
        """How far, in L2 norm, the sum can differ between neighbouring batches.

        Args:
            relation: what makes two batches neighbours: ``"add_or_remove_one"`` sample, or ``"replace_one"``.

        Returns:
            The bound, already divided by ``normalize_by``; over several groups the root of the sum of their squares. It counts exact
            arithmetic: rounding comes on top.

        Raises:
            ArgumentError: for another relation.

        Example:
            >>> from per_sample import clipped_grad
            >>> clipped_grad(lambda w, x: w @ x, max_norm=3.0, normalize_by=2.0).sensitivity("replace_one")
            3.0
        """
        if relation not in _RELATIONS:
            raise ArgumentError(f"`relation` must be one of {tuple(_RELATIONS)}; got {relation!r}.")
        bounds = [float(bound) for bound in trees.flatten(open_tree(self._max_norm))[0] if bound is not None]
        return _RELATIONS[relation] * math.hypot(*bounds) / self._normalize_by

    # That a call takes what the function takes, and one name more, cannot be said: with `is_padding` the other arguments are unchecked.
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    @overload
    def __call__(self, *args: Any, is_padding: Tensor | None, **kwargs: Any) -> Any: ...
    def __call__(self, *args: Any, is_padding: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[misc]
        """The clipped sum of one batch; see ``clipped_grad``."""
        spec: list[Any] = []

        def bind(targets: Targets) -> Weighing:
            groups, bounds, structure = targets.groups(self._max_norm, "max_norm")
            if any(bounds[group] is None for group in groups):
                raise ArgumentError("`max_norm` is None for a parameter that is differentiated.")
            spec.append(structure)
            if targets.ranks is not None:
                bounds = _distributed.whole(bounds)
            else:
                _distributed.refuse(bounds, "`max_norm` is a DTensor, and the batch is not.")
            padding = None if is_padding is None else targets.own_rows(_checked_padding(is_padding, targets.n), "is_padding")
            spec.append(bounds)
            spec.append(padding)
            weigh = functools.partial(self._weigh, bounds, padding, _ROUNDING[narrowest(targets)])
            return Weighing(groups, len(bounds), weigh, lambda group, norm: self._weight(norm, bounds[group]))

        weighed = weighed_sum(self._fn, self._convention, bind, self._memory, args, kwargs)
        targets = weighed.targets
        out = [targets.structured([x / self._normalize_by if self._normalize_by != 1 else x for x in weighed.sums])]
        structure, bounds, padding = spec
        norms = self._norms(weighed, padding)
        if self._return_norms:
            shown = [None if bound is None else norm for norm, bound in zip(norms, bounds, strict=True)]
            out.append(targets.closed(targets.trees.unflatten(structure, shown)))
        return weighed.evaluation.beside(out, values=self._return_values, aux=self._convention.has_aux)

    def _weigh(
        self,
        bounds: list[Any],
        padding: Tensor | None,
        rounding: Rounding,
        norms: list[Tensor],
        conditions: list[Tensor],
        samples: Sequence[int] | None,
    ) -> Weights:
        functional = must_be_functional(*norms)
        if functional:
            # Nobody can look at values here: what rounding may add to the sum counts as if it were in the gradient.
            norms = [torch.maximum(norm, whole * rounding.added) for norm, whole in zip(norms, conditions, strict=True)]
        # A norm beyond the range of the gradients' precision is that of no gradient in it.
        keep = torch.stack([norm <= rounding.largest for norm in norms]).all(0)
        if padding is not None:
            keep = keep & ~rows(padding, samples)
        weights = [self._weight(norm, bound) for norm, bound in zip(norms, bounds, strict=True)]
        if functional:
            return Weights([torch.where(keep, weight, 0) for weight in weights], keep)
        largest = [
            weight * whole * rounding.harmless <= bound
            for weight, whole, bound in zip(weights, conditions, bounds, strict=True)
            if bound is not None
        ]
        apart = keep & ~torch.stack(largest).all(0)
        some = bool(apart.any())
        if bool(keep.all()):
            return Weights(weights, None, apart if some else None)
        return Weights([torch.where(keep, weight, 0) for weight in weights], keep, apart if some else None)

    def _weight(self, norm: Tensor, bound: Any) -> Tensor:
        if bound is None:
            return norm  # a group without a leaf
        if self._stability is not None:
            return bound / (norm + self._stability)
        # Not by `clamp`: where the norm is zero, the quotient has no derivative. A bound that is not a number must show.
        within = norm <= bound
        return torch.where(within, 1, bound / torch.where(within, 1, norm))

    def _norms(self, weighed: Weighed, padding: Tensor | None) -> list[Tensor]:
        """The norms as they are returned, those of padding zero; a warning where some are not finite."""
        norms = weighed.norms if padding is None else [torch.where(padding, 0, norm) for norm in weighed.norms]
        if not must_be_functional(*norms):
            bad = int((~torch.stack(norms).isfinite()).any(0).sum())
            if bad:
                warnings.warn(
                    f"{bad} of {norms[0].shape[0]} samples have a gradient that is not finite; they were left out of the clipped sum.",
                    NonFiniteWarning,
                    stacklevel=3,
                )
        dtype = widest([real_dtype(leaf.dtype) for leaf in weighed.targets.leaves])
        ranks = weighed.targets.ranks
        return [norm.to(dtype) if ranks is None else ranks.rows(norm.to(dtype)) for norm in norms]


def narrowest(targets: Targets) -> torch.dtype:
    """The dtype in which the least precise of the sums is taken."""
    dtypes = {real_dtype(leaf.dtype) for leaf in targets.leaves}
    return torch.float32 if torch.float32 in dtypes else torch.float64


def _checked_padding(is_padding: Any, n: int) -> Tensor:
    if not isinstance(is_padding, Tensor) or is_padding.dtype != torch.bool or tuple(is_padding.shape) != (n,):
        found = f"{list(is_padding.shape)} of {is_padding.dtype}" if isinstance(is_padding, Tensor) else type(is_padding).__name__
        raise ArgumentError(f"`is_padding` must be booleans, one for each of the {n} samples; got {found}.")
    return is_padding
