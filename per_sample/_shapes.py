"""What an op returns for one sample, asked of the op itself: the check on rules from outside."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from per_sample._batched import Batched
from per_sample._errors import RuleError
from per_sample._factors import Factor


def check_result(op: Any, args: Any, kwargs: Any, out: Any, n: int) -> None:
    """Raise ``RuleError`` unless a rule's result has the shapes and dtypes that the op itself would give for each sample."""
    returns = op._schema.returns
    if not returns and out is None:
        return
    results = out if isinstance(out, (tuple, list)) else (out,)
    several = len(returns) != 1 or isinstance(returns[0].type, torch.ListType)
    if isinstance(out, (tuple, list)) is not several and returns and len(results) == max(1, len(returns)):
        raise RuleError(f"The rule of `{op}` returned {type(out).__name__}; the op gives {'a tuple' if several else 'a tensor'}.")
    expected = _for_one_sample(op, args, kwargs)
    if expected is None:
        expected = _for_the_first_sample(op, args, kwargs)
    if expected is None:
        wanted: Any = [_SOME] * len(results) if several and len(returns) == 1 else [_SOME] * len(returns)
    else:
        wanted = expected if isinstance(expected, (tuple, list)) else (expected,)
    if len(results) != len(wanted):
        raise RuleError(f"The rule of `{op}` returned {len(results)} results; the op has {len(wanted)}.")
    for got, want in zip(results, wanted, strict=True):
        if got is None and want is not None:
            raise RuleError(
                f"The rule of `{op}` returned None where the op gives a tensor; `NotImplemented` leaves a case to the fallback."
            )
        if not isinstance(want, Tensor):
            continue
        if isinstance(got, Factor):
            shape = (n, *got.shape)
        elif type(got) is Batched:
            shape = (n, *got.shape)
        elif isinstance(got, Tensor):
            shape = tuple(got.shape)
        else:
            raise RuleError(f"The rule of `{op}` returned {type(got).__name__} where the op gives a tensor.")
        if shape != (n, *want.shape):
            raise RuleError(
                f"The rule of `{op}` returned shape {list(shape)}; for {n} samples the op gives {[n, *want.shape]} (sample axis first)."
            )
        if isinstance(got, Tensor) and got.dtype != want.dtype:
            raise RuleError(f"The rule of `{op}` returned dtype {got.dtype}; the op gives {want.dtype}.")


# A result of which nothing is known.
_SOME = object()


def _for_one_sample(op: Any, args: Any, kwargs: Any) -> Any:
    def meta(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    args, kwargs = pytree.tree_map_only(Tensor, meta, (args, kwargs))
    try:
        return op(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        return None  # an op without a meta kernel cannot be asked


def _for_the_first_sample(op: Any, args: Any, kwargs: Any) -> Any:
    """What it really returns for one sample; None where that cannot be known, or would draw random numbers."""
    if torch.Tag.nondeterministic_seeded in op.tags:
        return None

    def first(x: Tensor) -> Tensor:
        return (x.physical[0] if type(x) is Batched and not x.shared else x).clone()

    try:
        with torch.no_grad():
            args, kwargs = pytree.tree_map_only(Tensor, first, (args, kwargs))
            return op(*args, **kwargs)
    except Exception:
        return None  # below `torch.vmap`, say, which has no rule for it; or it refuses what the rule takes
