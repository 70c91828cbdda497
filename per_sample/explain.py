"""``explain``: how a transform runs on one batch, where the time goes, and what would make it faster."""

from __future__ import annotations

import functools
import inspect
import time
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample import _arguments
from per_sample._errors import ArgumentError
from per_sample._explanation.advice import advice_on
from per_sample._explanation.report import Advice, Explanation, Op, Parameter, Question, Run
from per_sample._record import Recorder, recording
from per_sample.transforms import ClippedGrad, per_sample_grad

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._arguments import Argnums, Arguments
    from per_sample._record import Leaf
    from per_sample._signatures import P, Randomness

__all__ = ["Advice", "Explanation", "Op", "Parameter", "Question", "Run", "explain"]


def explain(
    fn: Callable[P, Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    of: Callable[..., Any] = per_sample_grad,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[P, Explanation]:
    """Transform a per-sample loss into a function that reports how a transform of it runs, what that costs, and what would help.

    Args:
        fn: the loss of one sample, as in ``per_sample_grad``; or what a transform made of one, such as
            ``clipped_grad(loss, max_norm=1.0)``, whose options are then its own.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``.
        of: the transform of a loss to report on, with what it needs besides the function filled in, such as ``per_sample_grad_norm`` or
            ``functools.partial(clipped_grad, max_norm=1.0)``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments. It runs the transform once, and returns an ``Explanation``: ``parameters``, ``ops`` and
        ``advice``, which prints in a terminal, in a notebook, and with rich. Times are of that run, so the first call includes warm-up.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import explain, per_sample_grad_norm
        >>> norms = per_sample_grad_norm(lambda w, x: (x @ w).square().sum())
        >>> report = explain(norms)(torch.ones(300, 200), torch.ones(5, 4, 300))
        >>> report.n, "fallback" in report.routes()
        (5, False)
        >>> w = report.parameters[0]
        >>> w.form, w.held_bytes, w.formed_bytes, w.questions[0].way
        ('sum of 4 outer products', 40000, 1200000, 'gram')
    """
    _arguments.check_options(fn, argnums, randomness, chunk_size)
    options = {"argnums": argnums, "in_dims": in_dims, "has_aux": has_aux, "keep_batch_dim": keep_batch_dim}
    options |= {"chunk_size": chunk_size, "randomness": randomness}
    defaults = {"argnums": 0, "in_dims": None, "has_aux": False, "keep_batch_dim": False, "chunk_size": None, "randomness": "error"}
    given = {name: value for name, value in options.items() if value is not defaults[name]}
    if _is_transformed(fn):
        if given or of is not per_sample_grad:
            raise ArgumentError("`explain` got what a transform returned, whose options are its own: give it the function alone.")
        transformed = fn
    else:
        _check_transform(of, fn, given)
        transformed = of(fn, **given)

    @functools.wraps(fn)
    def explained(*args: P.args, **kwargs: P.kwargs) -> Explanation:
        recorder = Recorder()
        start = time.perf_counter()
        with recording(recorder):
            transformed(*args, **kwargs)
        seconds = time.perf_counter() - start
        if recorder.arguments is None:
            raise ArgumentError(f"`of` must be a transform of this library's, run outside of torch.compile; {of} was not seen to run any.")
        return _explanation(recorder, recorder.arguments, seconds)

    return explained


def _is_transformed(fn: Any) -> bool:
    """Whether a transform of this library's made the function, which is then no loss of one sample."""
    return isinstance(fn, ClippedGrad) or (isinstance(fn, FunctionType) and fn.__globals__["__name__"].split(".")[0] == __package__)


def _check_transform(of: Any, fn: Any, given: dict[str, Any]) -> None:
    if not callable(of):
        raise ArgumentError(f"`of` must be a transform, such as `per_sample_grad_norm`; got {type(of).__name__}.")
    try:
        inspect.signature(of).bind(fn, **given)
    except TypeError as err:
        called = ", ".join(["the function", *sorted(given)])
        raise ArgumentError(
            f"`of` must be a transform that can be called with {called}: {err}. Fill in what it needs, as in "
            "`functools.partial(clipped_grad, max_norm=1.0)`."
        ) from err


def _explanation(recorder: Recorder, arguments: Arguments, seconds: float) -> Explanation:
    whole = seconds or 1.0
    n = arguments.n
    rows = sorted(recorder.rows.values(), key=lambda row: -row.seconds)
    ops = tuple(Op(row.op, row.route, row.count, row.seconds, row.seconds / whole) for row in rows)
    names = _names(arguments)
    parameters = tuple(_parameter(names[number], leaf, n, whole) for number, leaf in sorted(recorder.leaves.items()))
    run = Run(
        recorder.runs,
        seconds,
        recorder.lost_seconds,
        recorder.quantity_seconds,
        tuple(recorder.splits) if n else (),
        tuple(recorder.restarts),
        _is_differentiable(arguments),
    )
    return Explanation(ops, parameters, advice_on(ops, parameters, run, list(recorder.formed.values())), n, run)


def _parameter(name: str, leaf: Leaf, n: int, seconds: float) -> Parameter:
    questions = tuple(
        Question(step.question, step.way, step.count, step.seconds, step.seconds / seconds, step.ways) for step in leaf.steps.values()
    )
    # A sample of zeros stands for an empty batch.
    there = min(1, n)
    sizes = (leaf.samples * there, leaf.held_bytes * there, leaf.formed_bytes * there)
    return Parameter(name, leaf.shape, leaf.factor, leaf.form, *sizes, questions)


def _names(arguments: Arguments) -> list[str]:
    """The path of each differentiated leaf in its argument, with the argument's number where there are several."""
    names = []
    several = len(arguments.argnums) > 1
    for path, leaf, diff in zip(arguments.spec.paths(), arguments.leaves, arguments.diff, strict=True):
        if diff and isinstance(leaf, Tensor):
            names.append(".".join(map(str, path if several else path[1:])) or f"argument {path[0]}")
    return names


def _is_differentiable(arguments: Arguments) -> bool:
    """Whether the result carries a graph of autograd's."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments.leaves)
