"""Torch's own table of ops: every sample input of every op that autograd differentiates, against a loop of plain autograd.

For one sample input there is one case for each floating-point argument as a parameter that all samples share (``arg0``, ...), with
every other tensor different in each sample, one with all tensors per sample, in alternating layouts (``all``), one with all shared, so
that only the backward pass differs between samples (``shared``), and the in-place form of the first two.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.testing import assert_close

from per_sample import PerSampleError, RandomnessError, explain, per_sample_grad_and_value

from .tally import Case, Finding, routes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def quiet() -> Iterator[None]:
    """Torch's tables, and the ops that they hold, warn of torch's own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


with quiet():
    from torch.testing._internal.common_methods_invocations import op_db

N = 3
OPS = [op for op in op_db if op.supports_autograd]
DTYPES = {"f64": torch.float64, "c128": torch.complex128}


def is_inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def score(out: Any, weight: Tensor) -> Tensor:
    """A scalar that depends on every floating-point number of the results, each in its own way, and on the sample."""
    total = weight.new_zeros(())
    for k, x in enumerate(pytree.tree_leaves(out)):
        if isinstance(x, Tensor) and is_inexact(x):
            x = x.to_dense() if x.layout is not torch.strided else x
            x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
            steps = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape)
            total = total + (x.double().sin() * (1 + (steps + k).cos() / 2)).sum()
    return total * weight


def vary(x: Tensor, seed: int) -> Tensor:
    """A different value for each sample, ``[N, *shape]``: a little nearer to zero, so that most domains are kept."""
    generator = torch.Generator().manual_seed(seed)
    if not is_inexact(x):
        # The same numbers in another order.
        return torch.stack([x.roll(i, -1) if x.dim() else x for i in range(N)])
    return x * (1 - 0.1 * torch.rand((N, *x.shape), generator=generator, dtype=torch.float64)).to(x.real.dtype)


def scaled(x: Tensor) -> Tensor:
    """A different value for each sample with all structure kept: a multiple of the whole tensor; other numbers stay."""
    factors = torch.arange(N, 0, -1).view(N, *(1,) * x.dim()) / N
    return x * factors.to(x.real.dtype) if is_inexact(x) else x.expand(N, *x.shape).clone()


@dataclass(frozen=True)
class Problem:
    """One way to differentiate an op: ``call(values)`` on the tensors of one sample."""

    name: str
    call: Callable[[list[Tensor]], Any]
    tensors: list[Tensor]
    # Positions of the tensors that are differentiated, and of those that all samples share.
    diff: tuple[int, ...]
    shared: tuple[int, ...]
    # The sample axis is the innermost one in memory.
    inside_out: bool = False

    def batch(self, spread: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        return [x if i in self.shared else self._laid_out(spread(x, i)) for i, x in enumerate(self.tensors)]

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.movedim(0, -1).contiguous().movedim(-1, 0) if self.inside_out else x

    def loss(self, chosen: list[Tensor], rest: list[Tensor], weight: Tensor) -> Tensor:
        taken, left = iter(chosen), iter(rest)
        return score(self.call([next(taken) if i in self.diff else next(left) for i in range(len(self.tensors))]), weight)

    def arguments(self, values: list[Tensor]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arguments of ``loss`` and their ``in_dims``."""
        dims = [None if i in self.shared else 0 for i in range(len(values))]
        chosen, rest = ([i for i in range(len(values)) if (i in self.diff) is side] for side in (True, False))
        args = ([values[i] for i in chosen], [values[i] for i in rest], torch.linspace(0.5, 1.5, N, dtype=torch.float64))
        return args, ([dims[i] for i in chosen], [dims[i] for i in rest], 0)


def one(x: Tensor, dim: int | None, i: int) -> Tensor:
    """A sample's own copy. Its own tensor begins where the memory does; a shared one may be a view, and stays one."""
    return deepcopy(x) if dim is None else x[i].clone()


def loop(problem: Problem, values: list[Tensor]) -> tuple[list[Tensor], Tensor] | None:
    """Every sample's gradients and loss by plain autograd, one sample after the other; None where there is no gradient."""
    (chosen, rest, weights), dims = problem.arguments(values)
    columns: list[list[Tensor]] = [[] for _ in chosen]
    losses = []
    for i in range(N):
        own = [one(x, d, i).requires_grad_() for x, d in zip(chosen, dims[0], strict=True)]
        value = problem.loss(own, [one(x, d, i) for x, d in zip(rest, dims[1], strict=True)], weights[i])
        if not value.requires_grad:
            return None
        grads = torch.autograd.grad(value, own, allow_unused=True)
        for column, leaf, g in zip(columns, own, grads, strict=True):
            column.append(torch.zeros_like(leaf) if g is None else g.to_dense())
        losses.append(value.detach())
    return [torch.stack(c) for c in columns], torch.stack(losses)


def by_vmap(problem: Problem, args: Any, dims: Any, randomness: str = "error") -> Any:
    """What ``vmap(grad)`` gives, or None where it cannot run."""
    try:
        return torch.func.vmap(torch.func.grad_and_value(problem.loss), dims, randomness=randomness)(*args)
    except Exception:
        return None


def difference(found: tuple[Any, Tensor], expected: tuple[Any, Tensor]) -> str:
    """What is wrong with gradients and losses; empty where they agree."""
    try:
        assert_close(list(found[0]), list(expected[0]), equal_nan=True)
        assert_close(found[1], expected[1], equal_nan=True)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def data(problem: Problem) -> tuple[list[Tensor], Any] | str:
    """The tensors of a batch with the loop's answer, or why there is none. Where the op does not stand noise, multiples."""
    seed = sum(map(ord, problem.name))
    reason = "no gradient"
    fallback = None
    for spread in (lambda x, i: vary(x, seed + i), lambda x, i: vary(x, seed + i) if is_inexact(x) else scaled(x), lambda x, i: scaled(x)):
        values = problem.batch(spread)
        try:
            expected = loop(problem, values)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if expected is not None:
            if expected[1].isfinite().all():
                return values, expected
            fallback = fallback or (values, expected)
    return fallback or reason


def check(problem: Problem, whole: bool) -> Finding:
    """Run one problem and judge."""
    with quiet():
        found = data(problem)
        if isinstance(found, str):
            return Finding(problem.name, "void", found)
        values, expected = found
        args, dims = problem.arguments(values)
        versions = [x._version for x in values]
        try:
            got = per_sample_grad_and_value(problem.loss, in_dims=dims)(*args)
        except RandomnessError:
            return check_random(problem, args, dims, whole)
        except Exception as error:
            verdict = "refused" if isinstance(error, PerSampleError) else "raw"
            possible = by_vmap(problem, args, dims) is not None
            return Finding(problem.name, verdict, f"{type(error).__name__}: {error}", possible=possible)
        if versions != [x._version for x in values]:
            return Finding(problem.name, "wrong", "it changed an argument")
        wrong = difference(got, expected)
        if wrong:
            also = by_vmap(problem, args, dims)
            note = "cannot" if also is None else "differs too" if difference(also, expected) else "is right"
            return Finding(problem.name, "wrong", f"{wrong} (vmap {note})")
        routes = routes_of(explain(problem.loss, in_dims=dims)(*args)) if whole else frozenset()
        return Finding(problem.name, "right", routes=routes)


def check_random(problem: Problem, args: Any, dims: Any, whole: bool) -> Finding:
    """An op that draws: the numbers of torch.vmap under the same seed, where that runs it."""
    for randomness in ("same", "different"):
        torch.manual_seed(0)
        expected = by_vmap(problem, args, dims, randomness)
        torch.manual_seed(0)
        try:
            got = per_sample_grad_and_value(problem.loss, in_dims=dims, randomness=randomness)(*args)
        except Exception as error:
            verdict = "refused" if isinstance(error, PerSampleError) else "raw"
            if verdict == "refused" and randomness == "same" and expected is None:
                continue
            return Finding(problem.name, verdict, f"{randomness}: {type(error).__name__}: {error}", possible=expected is not None)
        wrong = "" if expected is None else difference(got, expected)
        if wrong:
            return Finding(problem.name, "wrong", f"randomness={randomness!r}, against vmap: {wrong}")
    routes = routes_of(explain(problem.loss, in_dims=dims, randomness="different")(*args)) if whole else frozenset()
    return Finding(problem.name, "right", routes=routes)


def has_derivative(call: Callable[[list[Tensor]], Any], tensors: list[Tensor], k: int) -> bool:
    """Whether autograd differentiates an op with respect to one of its arguments."""
    values = [x.detach().requires_grad_() if i == k else x for i, x in enumerate(tensors)]
    try:
        with quiet():
            return score(call(values), torch.ones((), dtype=torch.float64)).requires_grad
    except RuntimeError:
        return False


def problems(op: Any, dtype: str, i: int, sample: Any) -> Iterator[Problem]:
    """All ways to differentiate one sample input."""
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]
    tensors = [leaves[k].detach() for k in places]

    def call(form: Any, in_place: bool, values: list[Tensor]) -> Any:
        filled = list(leaves)
        for k, x in zip(places, values, strict=True):
            filled[k] = x
        first, args, kwargs = pytree.tree_unflatten(filled, spec)
        return sample.output_process_fn_grad(form(first.clone() if in_place else first, *args, **kwargs))

    if any(x.layout is not torch.strided for x in tensors):
        return
    diff = tuple(k for k, x in enumerate(tensors) if is_inexact(x) and has_derivative(functools.partial(call, op.op, False), tensors, k))
    if not diff:
        return
    name = f"ops/{op.full_name}/{dtype}/{i}"
    everything = Problem(f"{name}/all", functools.partial(call, op.op, False), tensors, diff, ())
    each = [replace(everything, name=f"{name}/arg{k}", diff=(k,), shared=(k,)) for k in diff]
    # Every other sample input in the layout that kernels which read by pointer would stumble over.
    everything = replace(everything, inside_out=i % 2 == 1)
    yield from (*each, everything)
    if len(tensors) > 1:
        yield replace(everything, name=f"{name}/shared", shared=tuple(range(len(tensors))))
    if op.inplace_variant is not None and isinstance(sample.input, Tensor) and 0 in diff and not sample.broadcasts_input:
        form = functools.partial(call, op.inplace_variant, True)
        yield replace(everything, name=f"{name}/in-place-all", call=form)
        yield replace(each[0], name=f"{name}/in-place-arg0", call=form)


def samples(op: Any, dtype: torch.dtype, most: int | None) -> list[Any]:
    """Torch's sample inputs of an op: the first ones, or all."""
    torch.manual_seed(0)
    with quiet():
        drawn = op.sample_inputs("cpu", dtype, requires_grad=False)
        return [s for _, s in zip(range(most), drawn)] if most else list(drawn)  # noqa: B905


def cases_of(op: Any, *, whole: bool) -> Iterator[Case]:
    """The cases of one op: all, or those of its first samples."""
    for name, dtype in DTYPES.items():
        if dtype in op.supported_backward_dtypes("cpu") and (whole or name == "f64"):
            for i, sample in enumerate(samples(op, dtype, None if whole else 2)):
                for problem in problems(op, name, i, sample):
                    yield Case(problem.name, functools.partial(check, problem, whole))


def cases(*, whole: bool) -> Iterator[Case]:
    """Every case, or the part that is quick."""
    for op in OPS:
        yield from cases_of(op, whole=whole)
