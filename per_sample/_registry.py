"""The rule table, keyed by aten op, and ``rule``, which fills it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._ops import OpOverload, OpOverloadPacket

from per_sample._errors import RuleError

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(frozen=True, eq=False, slots=True)
class Rule:
    """How one op runs on a whole batch, and what ``explain`` calls that."""

    run: Callable[..., Any]
    route: str
    # A rule from outside the package: its results are checked against the op's own shapes.
    foreign: bool


TABLE: dict[OpOverload, Rule] = {}
_listeners: list[Callable[[OpOverload], None]] = []


def on_change(listener: Callable[[OpOverload], None]) -> None:
    """Call ``listener(op)`` whenever an op's rule changes (the interpreter's resolved entries go stale)."""
    _listeners.append(listener)


def register(op: OpOverload, run: Callable[..., Any], route: str, *, override: bool = False) -> None:
    """Put a rule into the table."""
    _check_op(op)
    if op in TABLE and not override:
        raise RuleError(f"`{op}` already has the rule `{TABLE[op].run.__qualname__}`; pass `override=True` to replace it.")
    # None where it was defined by `exec`.
    foreign = not (getattr(run, "__module__", None) or "").startswith("per_sample.")
    TABLE[op] = Rule(run, route, foreign)
    for listener in _listeners:
        listener(op)


def _check_op(op: Any) -> None:
    if not isinstance(op, OpOverload):
        hint = f" Of `{op}`, name an overload: `{op}.default`." if isinstance(op, OpOverloadPacket) else ""
        raise RuleError(f"A rule is keyed by an op overload such as `torch.ops.aten.mm.default`; got {op!r}.{hint}")


def rule(*ops: OpOverload, override: bool = False) -> Callable[[F], F]:
    """Register a function as the rule of one or more ops.

    The function takes the op's arguments under the schema's names. A tensor that differs between samples arrives as ``Batched``
    (``x.physical`` is ``[n, *shape]``, ``x.n`` the number of samples), one that all samples share as a plain tensor. It returns the
    physical result ``[n, *shape]`` (a tuple for an op with several results), or ``NotImplemented`` to leave the case to the fallback.

    Args:
        ops: the op overloads, for instance ``torch.ops.mylib.scale.default``.
        override: replace a rule that stands already.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Raises:
        RuleError: if the parameters do not fit the op's schema, or the op has a rule already.

    Example:
        >>> import torch, per_sample
        >>> @per_sample.rule(torch.ops.aten.trace.default, override=True)
        ... def trace(self):
        ...     return self.physical.diagonal(dim1=1, dim2=2).sum(-1)
    """

    for op in ops:
        _check_op(op)
    if not ops:
        raise RuleError("A rule is for an op: `@rule(torch.ops.mylib.scale.default)`.")

    def decorate(function: F) -> F:
        for op in ops:
            _check_signature(op, function)
            register(op, function, "rule", override=override)
        return function

    return decorate


def _check_signature(op: OpOverload, function: Callable[..., Any]) -> None:
    """Positional arguments may arrive by position and under the schema's names, so both must fit."""
    expected = op._schema.arguments
    parameters = list(inspect.signature(function).parameters.values())
    names = [p.name for p in parameters]
    if names != [a.name for a in expected]:
        raise RuleError(f"The rule `{function.__qualname__}` of `{op}` takes {names}; the schema has {[a.name for a in expected]}.")
    for parameter, argument in zip(parameters, expected, strict=True):
        has_default = parameter.default is not inspect.Parameter.empty
        if argument.kwarg_only != (parameter.kind is inspect.Parameter.KEYWORD_ONLY):
            raise RuleError(
                f"The rule `{function.__qualname__}` of `{op}`: `{argument.name}` must be keyword-only exactly as in the schema."
            )
        # The dispatcher drops arguments that equal their defaults.
        if argument.has_default_value() and not has_default:
            raise RuleError(
                f"The rule `{function.__qualname__}` of `{op}`: `{argument.name}` needs the schema's default {argument.default_value!r}."
            )


def is_random(op: OpOverload) -> bool:
    """Whether the op draws random numbers."""
    return torch.Tag.nondeterministic_seeded in op.tags


def draws(op: OpOverload, values: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this call of a random op draws: not with a dropout of probability 0, nor outside training."""
    given = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in op._schema.arguments), values, strict=False)) | kwargs
    return not (given.get("dropout_p") == 0.0 or given.get("train") is False or given.get("training") is False)


def returns_written(op: OpOverload) -> bool:
    """Whether an op returns what it wrote into; others (`rrelu_with_noise`) write into one tensor and return another."""
    returns = op._schema.returns
    return not returns or returns[0].alias_info is not None
