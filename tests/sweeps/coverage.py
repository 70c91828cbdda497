"""The page of the documentation that tells what was checked, and which route every op takes."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import torch

from .exceptions import EXCEPTIONS, PROMISES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .tally import Finding

# What `explain` calls the ways in which an op runs, the slowest last; a form of a gradient has other names for its own.
ROUTES = ("shared", "pointwise", "rule", "fallback", "loop")
VERSION = torch.__version__.split("+")[0]
SECTIONS = {
    "ops": ("Torch's table of ops", "op"),
    "modules": ("Torch's table of modules", "module"),
    "families": ("Model families of Hugging Face transformers", "family"),
}
# Ops of torch's table that have no case, and why.
ABSENT = {
    "nn.functional.batch_norm.without_cudnn": "only for GPUs",
    "nn.functional.one_hot": "of integers, without a derivative",
    "sparse.mm.reduce": "of sparse tensors",
    "sparse.sampled_addmm": "of sparse tensors",
    "torch.ops.aten._efficient_attention_forward": "only for GPUs",
    "torch.ops.aten._flash_attention_forward": "only for GPUs",
}
VARIANTS = ("-train", "-dropout", "-padded", "-ragged", "-loop", "-grouped")
INTRODUCTION = """# Coverage

<!-- python -m tests.sweeps --coverage docs/coverage.md -->

What `python -m tests.sweeps` found with torch {version}. Every line was compared with a loop of plain autograd over the samples, on
material that this project did not write: torch's own table of ops, with each floating-point argument in turn as the parameter; its own
table of modules, in training and in evaluation; and models of Hugging Face transformers, unchanged, from random configurations. A
*variant* is one input run in one way. All that is not right is named here.

- **right**: the gradients of every sample are those of the loop.
- **refused**: a typed error says why. The reason stands beside it.
- **no gradient**: the loop itself has none there, or does not run, so that there is nothing to compare with.
- **wrong**: another number, or an error that is not one of the library's. There must be none.

{tally}
The route says how the ops of a line ran, the slowest one that was met:

- `rule`: by rules of this library, each for the whole batch at once, or pointwise, as the op is;
- `fallback`: the ops named had no rule for that case, and ran for the whole batch under `torch.func.vmap`;
- `loop`: the ops named had no rule for that case, here or in `vmap`: one call for each sample.

"""
OPS = """## Ops of aten

All ops that were met on the way, in forward and backward passes, with the routes that they took. `rule, fallback` means that the rule
leaves some cases to `vmap`. Ops that are not listed and have no rule run under `vmap` or in a loop, too:
[a rule](rules.md) makes them faster.

"""


def page(found: list[Finding]) -> str:
    """The whole page, in Markdown."""
    parts = [INTRODUCTION.format(version=VERSION, tally=_tally(found))]
    parts += [_section(kind, [f for f in found if f.name.startswith(f"{kind}/")]) for kind in SECTIONS]
    return "".join(parts) + OPS + _ops(found)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table in Markdown; ``numbers`` are the columns that are aligned to the right."""
    marks = ["---:" if i in set(numbers) else "---" for i in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, marks, *rows))


def subject(finding: Finding) -> str:
    """The op, module or family that a finding is about."""
    kind, name = finding.name.split("/")[:2]
    if kind != "families":
        return name
    return next((name.removesuffix(v) for v in VARIANTS if name.endswith(v)), name)


def _counts(found: list[Finding]) -> list[str]:
    count = Counter(f.verdict for f in found)
    return [str(len(found)), *(str(count[v]) for v in ("right", "refused", "void")), str(count["wrong"] + count["raw"])]


def _tally(found: list[Finding]) -> str:
    rows = []
    for kind, (title, _) in SECTIONS.items():
        own = [f for f in found if f.name.startswith(f"{kind}/")]
        rows.append([title, str(len({subject(f) for f in own})), *_counts(own)])
    return table(("table", "lines", "variants", "right", "refused", "no gradient", "wrong"), rows, range(1, 7))


def _section(kind: str, found: list[Finding]) -> str:
    title, noun = SECTIONS[kind]
    lines: dict[str, list[Finding]] = defaultdict(list)
    for f in found:
        lines[subject(f)].append(f)
    rows = [[f"`{name}`", _route(own), *_counts(own)[1:], _notes(own)] for name, own in sorted(lines.items())]
    if kind == "ops":
        rows += [[f"`{name}`", "-", *"0000", f"no case: {reason}"] for name, reason in ABSENT.items()]
    head = (noun, "route", "right", "refused", "no gradient", "wrong", "why not right; which ops had no rule")
    return f"## {title}\n\n{table(head, rows, range(2, 6))}\n"


def _route(found: list[Finding]) -> str:
    """The slowest route of all ops."""
    met = {route for f in found for _, route in f.routes}
    if not met:
        return "refused" if any(f.verdict == "refused" for f in found) else "-"
    slowest = max((ROUTES.index(route) for route in met if route in ROUTES), default=0)
    return ROUTES[max(slowest, ROUTES.index("rule"))]


def _notes(found: list[Finding]) -> str:
    reasons = sorted({(PROMISES | EXCEPTIONS)[f.excuse] for f in found if f.excuse})
    reasons += sorted(f"wrong: `{f.name}`" for f in found if f.verdict in ("wrong", "raw"))
    for slow in ("loop", "fallback"):
        ops = sorted({op for f in found for op, route in f.routes if route == slow})
        if ops:
            reasons.append(f"{slow}: " + ", ".join(f"`{_short(op)}`" for op in ops))
    return "; ".join(reasons)


def _short(op: str) -> str:
    return op.removeprefix("aten.").removesuffix(".default")


def _ops(found: list[Finding]) -> str:
    routes: dict[str, set[str]] = defaultdict(set)
    for f in found:
        for op, route in f.routes:
            if route in ROUTES and route != "shared":
                routes[op].add(route)
    rows = ([f"`{op}`", ", ".join(sorted(met, key=ROUTES.index))] for op, met in sorted(routes.items()))
    return table(("op", "route"), rows)
