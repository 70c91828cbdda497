"""What would make a call faster or smaller: only what its record shows, and only what can be done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from per_sample._explanation.display import size
from per_sample._explanation.report import Advice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from per_sample._explanation.report import Op, Parameter, Run
    from per_sample._record import Formed

# Below these, advice is not worth a line.
_SHARE, _FORMED_SHARE, _FORMED_BYTES, _LARGE_BYTES = 0.01, 0.1, 2**24, 2**30
# Above this share between the ops, those are too small for their number; unless it is more seconds for each than Python takes, as in a
# first call or where the function does something else.
_PYTHON, _PYTHON_SECONDS = 0.5, 5e-4

_RESTARTS = {
    "copies": "it writes in place into its arguments, of which it then got copies: use the forms that return a new tensor",
    "expands": "it writes per-sample values, or draws random numbers, into a tensor that it made itself: make that from a per-sample one "
    "(`x.new_zeros`, `torch.randn_like(x)`), or use `torch.stack`",
    "accumulates": "it holds a reentrant checkpoint: pass `use_reentrant=False` to `torch.utils.checkpoint`",
    "": "it uses a tensor from outside that requires grad: pass that as an argument, or detach it (a module: `requires_grad_(False)`)",
}


def advice_on(ops: Sequence[Op], parameters: Sequence[Parameter], run: Run, formed: Sequence[Formed]) -> tuple[Advice, ...]:
    """All advice, what is about the largest share of the time first."""
    found = [
        *_on_routes(ops),
        *_on_forming(parameters, run, formed),
        *_on_memory(parameters),
        *_on_runs(run),
        *_on_python(ops, parameters, run),
    ]
    return tuple(sorted(found, key=lambda advice: -advice.share))


def _on_routes(ops: Sequence[Op]) -> Iterator[Advice]:
    for op in ops:
        if op.route == "loop":
            yield Advice(
                f"`{op.op}` runs once for each sample, since neither this library nor torch.vmap has a rule for it. {_RULE}", op.share
            )
        elif op.route == "fallback" and op.share >= _SHARE and not _is_random(op.op):
            yield Advice(f"`{op.op}` has no rule and falls back to torch.vmap. {_RULE}", op.share)


def _is_random(name: str) -> bool:
    """Whether an op draws random numbers: how many samples share them is the caller's choice, not a rule's."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return torch.Tag.nondeterministic_seeded in getattr(found, "tags", ())


_RULE = "Register one with `per_sample.rule` (see the guide on rules), or use other ops."


def _on_forming(parameters: Sequence[Parameter], run: Run, formed: Sequence[Formed]) -> Iterator[Advice]:
    """Gradients that need not be formed, if only the program used its weights otherwise."""
    if any(question.question == "materialize" for parameter in parameters for question in parameter.questions):
        return
    for found in formed:
        share = found.seconds / (run.seconds or 1.0)
        if found.bytes >= _FORMED_BYTES or share >= _FORMED_SHARE:
            yield Advice(
                f"`{found.op}` has gradients formed, {size(found.bytes)} at once, that could have stayed a form of less memory "
                f"({found.factor}): use the weight as a whole, not in slices or normalised, where that can be; or pass a (smaller) "
                "`chunk_size`.",
                share,
            )


def _on_memory(parameters: Sequence[Parameter]) -> Iterator[Advice]:
    asked = {name: [p for p in parameters if any(q.question == name for q in p.questions)] for name in ("materialize", "settled")}
    whole = sum(parameter.formed_bytes for parameter in asked["materialize"])
    if whole >= _LARGE_BYTES:
        seconds = sum(q.share for p in asked["materialize"] for q in p.questions if q.question == "materialize")
        yield Advice(
            f"The gradients themselves take {size(whole)}. What is made of them (norms, clipped and weighted sums, variances, projections) "
            "has transforms of its own, which do not hold them.",
            seconds,
        )
    held = sum(parameter.held_bytes for parameter in asked["settled"])
    if held >= _LARGE_BYTES:
        yield Advice(
            f"Until the norms are known, {size(held)} are held for the sum. `memory='low'` takes two passes that hold nothing; a (smaller) "
            "`chunk_size` holds less.",
            0.0,
        )


def _on_runs(run: Run) -> Iterator[Advice]:
    if run.splits:
        ops = sorted({f"`{op}`" for op in run.splits if op})
        cause = " and ".join(ops) + (" asks" if len(ops) == 1 else " ask") if ops else "the function asks"
        packed = all("_pack_padded_sequence" in op for op in run.splits)
        remedy = (
            "Leave sequences padded, or batch those of one length."
            if packed
            else "Use `torch.where` or masks instead of a branch, where it is yours."
        )
        yield Advice(f"The samples ran apart, {run.runs} runs in all, since {cause} for values on which they do not agree. {remedy}", 1.0)
    if run.differentiable:
        yield Advice(
            "The arguments require grad, so the result is made to be differentiated again, which takes time and memory. Where nobody does "
            "that, detach them, or call under `torch.no_grad()`.",
            1.0,
        )
    needs = {need for restart in run.restarts for need in restart or ("",)}
    for need in sorted(needs & set(_RESTARTS)):
        yield Advice(f"The function had to begin again: {_RESTARTS[need]}.", run.lost_seconds / (run.seconds or 1.0))


def _on_python(ops: Sequence[Op], parameters: Sequence[Parameter], run: Run) -> Iterator[Advice]:
    measured = sum(op.seconds for op in ops) + sum(parameter.seconds for parameter in parameters) + run.quantity_seconds + run.lost_seconds
    between = 1 - measured / (run.seconds or 1.0)
    if between >= _PYTHON and run.seconds * between <= _PYTHON_SECONDS * sum(op.count for op in ops):
        yield Advice(
            "Most of the time goes by between the ops, in Python (this report's own among it): they are small for their number. Take more "
            "samples at once, or compile the call with `torch.compile` (which refuses `nn.LSTM` and its kind).",
            between,
        )
