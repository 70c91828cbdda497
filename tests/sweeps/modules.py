"""Every module of torch's own table, in training and in evaluation, with every input that the table ships."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import functional_call

from per_sample import PerSampleError, RandomnessError, explain, per_sample_grad, reference
from per_sample import options as settings

from .modules_table import listed
from .tally import Case, Finding, routes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .modules_table import Entry

N = 3
SEED = 17
# What is differentiated, and what a sample is. `one`: the parameters, a sample is an input as the table has it; `input`: the input
# too; `keep`: a sample is one entry of the input's first axis; `frozen`: a number that scales the output, the parameters are fixed.
FORMS = ("one", "input", "keep", "frozen")
_TOLERANCE = {torch.float64: {"rtol": 1e-7, "atol": 1e-7}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}


@dataclass(frozen=True)
class Task:
    """A loss of ``(targets, fixed, samples)``, all trees: what is differentiated, what the samples share, and what they do not."""

    loss: Callable[..., Tensor]
    # Shared and differentiated, the same for every sample.
    params: dict[str, Tensor]
    # Differentiated, one for each sample.
    own: list[Tensor]
    fixed: dict[str, Tensor]
    samples: list[Tensor]
    keep_batch_dim: bool = False

    @property
    def n(self) -> int:
        return (self.own + self.samples)[0].shape[0]

    def transformed(self, transform: Callable[..., Any], **options: Any) -> Any:
        """What a transform of the package returns for the task."""
        argnums = tuple(i for i, x in enumerate((self.params, self.own)) if x)
        options |= {"argnums": argnums, "in_dims": (None, 0, None, 0), "keep_batch_dim": self.keep_batch_dim}
        # The keyword arguments of a module may come with state that it changes, such as running statistics.
        fixed = {name: x.clone() for name, x in self.fixed.items()}
        # Where a module asks for values, such as whether a mask is causal, the samples run in groups.
        with settings(split_batch=True):
            return transform(self.loss, **options)(self.params, self.own, fixed, self.samples)

    def loop(self, *, seed: int | None = None) -> list[Tensor]:
        """Every leaf's gradients, by plain autograd for one sample after the other; with a seed all draw the same numbers."""
        rows = []
        for i in range(self.n):
            if seed is not None:
                torch.manual_seed(seed)
            rows.append(self._gradients(i))
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _gradients(self, i: int) -> list[Tensor]:
        params = {name: p.detach().clone().requires_grad_() for name, p in self.params.items()}
        at = slice(i, i + 1) if self.keep_batch_dim else i
        own = [x[i].clone().requires_grad_() for x in self.own]
        shown = [x.unsqueeze(0) if self.keep_batch_dim else x for x in own]
        fixed = {name: x.clone() for name, x in self.fixed.items()}
        loss = self.loss(params, shown, fixed, [x[at].clone() for x in self.samples])
        leaves = [*params.values(), *own]
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def score(out: Any) -> Tensor:
    """A scalar that depends on every element of every floating tensor in a tree, each in its own way."""
    total = torch.zeros((), dtype=torch.float64)
    for x in pytree.tree_leaves(out):
        if isinstance(x, Tensor) and x.is_floating_point():
            weights = torch.arange(1, x.numel() + 1, dtype=torch.float64).cos().reshape(x.shape)
            total = total + (x.double().sin() * (1 + weights / 2)).sum()
    return total


def spread(x: Tensor, n: int) -> Tensor:
    """``n`` different tensors of the same kind: rolled along the last axis, and shrunk where the values are not whole.

    That keeps probabilities, variances, labels, indices and masks what they are.
    """
    rows = torch.stack([x.roll(i, -1) if x.dim() else x for i in range(n)])
    if not x.is_floating_point() or bool((x == x.round()).all()):
        return rows
    return rows * (1 - 0.3 * torch.rand(rows.shape, dtype=x.dtype))


def _task(entry: Entry, form: str) -> Task | None:
    """The task of one form; None where the form says nothing about such an input."""
    torch.manual_seed(SEED)
    module = entry.make()
    params = {name: p.detach() for name, p in module.named_parameters()}
    fixed = {name: b.detach() for name, b in module.named_buffers()}
    # Entries of a batch share the mask of positions by positions.
    shared = {k: v for k, v in entry.kwargs.items() if form == "keep" and k.endswith("mask") and "padding" not in k}
    leaves, spec = pytree.tree_flatten((entry.args, {k: v for k, v in entry.kwargs.items() if k not in shared}))
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    tensors = [leaves[i] for i in where]
    if form == "keep" and (len({x.shape[:1] for x in tensors}) > 1 or tensors[0].dim() < 2):
        return None
    samples = tensors if form == "keep" else [spread(x, N) for x in tensors]
    # The first floating tensor is the input.
    first = next((k for k, x in enumerate(tensors) if x.is_floating_point()), None)
    if form in ("input", "frozen") and (first is None or not params):
        return None
    differentiated = first is not None and (form == "input" or not params)
    if not (params or differentiated):
        return None
    own = [samples.pop(first)] if differentiated else []

    def called(state: dict[str, Tensor], own: list[Tensor], samples: list[Tensor]) -> Any:
        samples = [*samples[:first], *own, *samples[first:]] if own else samples
        values = dict(zip(where, samples, strict=True))
        args, kwargs = pytree.tree_unflatten([values.get(i, x) for i, x in enumerate(leaves)], spec)
        return functional_call(module, state, args, kwargs | shared)

    if form == "frozen":
        module.requires_grad_(False)
        scale = {"scale": torch.tensor(0.7, dtype=torch.float64)}
        return Task(lambda p, _, fixed, s: score(called(fixed, [], s)) * p["scale"].sin(), scale, [], params | fixed, samples)
    return Task(lambda p, own, fixed, s: score(called(p | fixed, own, s)), params, own, fixed, samples, form == "keep")


def _check(name: str, entry: Entry, form: str, whole: bool) -> Finding:
    task = _task(entry, form)
    assert task is not None
    try:
        expected = task.loop(seed=SEED)
    except Exception as err:
        return Finding(name, "void", f"{type(err).__name__}: {err}".split("\n")[0])
    if all(g.isnan().all() for g in expected):
        return Finding(name, "void", "not a number")
    try:
        grads, expected, randomness = _transformed(task, expected)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True, **_TOLERANCE[entry.dtype])
        routes = routes_of(task.transformed(explain, randomness=randomness)) if whole else frozenset()
    except AssertionError as err:
        return Finding(name, "wrong", " ".join(str(err).split()))
    except PerSampleError as err:
        return Finding(name, "refused", f"{type(err).__name__}: {err}", possible=_runs_by_vmap(task))
    except Exception as err:
        return Finding(name, "raw", f"{type(err).__name__}: {err}")
    return Finding(name, "right", routes=routes)


def _runs_by_vmap(task: Task) -> bool:
    try:
        task.transformed(reference.per_sample_grad, randomness="different")
    except Exception:
        return False
    return True


def _transformed(task: Task, expected: list[Tensor]) -> tuple[list[Tensor], list[Tensor], str]:
    """The gradients, what they should be, and the randomness they needed.

    Where all samples draw the same numbers these are the numbers of the loop, or of vmap, with the same seed: dropout draws in the order of
    memory, and vmap lays some tensors out in another order than plain torch.
    """

    def leaves(transform: Callable[..., Any], randomness: str) -> list[Tensor]:
        torch.manual_seed(SEED)
        return pytree.tree_leaves(task.transformed(transform, randomness=randomness))

    try:
        return leaves(per_sample_grad, "error"), expected, "error"
    except RandomnessError:
        different = leaves(per_sample_grad, "different")
    assert [g.shape for g in different] == [g.shape for g in expected], "shapes with randomness='different'"
    try:
        grads = leaves(per_sample_grad, "same")
    except RandomnessError:
        return different, different, "different"
    if not all(torch.allclose(g, e) for g, e in zip(grads, expected, strict=True)) and _runs_by_vmap(task):
        expected = leaves(reference.per_sample_grad, "same")
    return grads, expected, "same"


def cases(*, whole: bool) -> Iterator[Case]:
    """Every input of every module in every form; else the first two inputs of each module and mode, in one form that changes."""
    for entry in listed():
        if whole:
            for form in FORMS:
                if _task(entry, form) is not None:
                    name = f"modules/{entry.name}/{form}"
                    yield Case(name, functools.partial(_check, name, entry, form, whole))
        elif entry.index < 2:
            yield Case(f"modules/{entry.name}", functools.partial(_check_some_form, entry))


def _check_some_form(entry: Entry) -> Finding:
    # Not by `hash`, which changes from one process to the next.
    turn = zlib.crc32(entry.name.encode()) % len(FORMS)
    form = next(form for form in (*FORMS[turn:], *FORMS) if _task(entry, form) is not None)
    return _check(f"modules/{entry.name}/{form}", entry, form, False)
