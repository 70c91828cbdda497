"""The site's pages: every Python snippet runs and prints what it says, every public name has an entry, and tables fit the registry."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import per_sample
from per_sample import _entries, _registry, grad, reference, testing
from sweeps import ops

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTS = "# prints: "


def snippets(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def imports(page: Path) -> set[str]:
    """The packages that a page's snippets import at their beginnings."""
    return set(re.findall(r"^(?:import|from) (\w+)", "\n".join(snippets(page)), re.MULTILINE))


@pytest.fixture
def rules() -> Iterator[None]:
    """The rules of a page end with it."""
    before = set(_registry.TABLE)
    yield
    for op in set(_registry.TABLE) - before:
        del _registry.TABLE[op]
        for listener in _registry._listeners:
            listener(op)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem)
@pytest.mark.usefixtures("rules")
# Training loops of other projects, which use what torch has deprecated, and have advice of their own.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:lightning")
def test_snippets_run_and_print_what_they_say(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in imports(page):
        pytest.importorskip(name, reason="the page is about a package that is not installed")
    # A module of its own: compiled functions look their globals up there.
    module = types.ModuleType(f"snippets_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for number, code in enumerate(snippets(page)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page.name}, snippet {number}", "exec"), module.__dict__)
        expected = [line.removeprefix(PRINTS) for line in code.splitlines() if line.startswith(PRINTS)]
        assert printed.getvalue().splitlines() == expected, f"snippet {number}:\n{code}"


ENTRY = re.compile(r"^\.\. auto\w+:: (\S+)$", re.MULTILINE)
ENTRIES = {name for page in sorted((DOCS / "api").glob("*.md")) for name in ENTRY.findall(page.read_text(encoding="utf-8"))}
MODULES = (per_sample, grad, reference, testing)
# Without `__all__` what a module defines itself is public.
PUBLIC = {
    f"{module.__name__}.{name}"
    for module in MODULES
    for name in getattr(module, "__all__", None) or [n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    if not name.startswith("_") and not isinstance(getattr(module, name), types.ModuleType)
}


def test_every_public_name_has_an_entry() -> None:
    assert sorted(PUBLIC - ENTRIES) == []


def test_no_entry_is_of_a_name_that_is_gone() -> None:
    # What `explain` returns has parts whose classes nobody makes.
    others = {name for name in ENTRIES if name.startswith("per_sample._explanation.")} | {module.__name__ for module in MODULES}
    assert sorted(ENTRIES - PUBLIC - others) == []


def test_every_error_has_a_paragraph() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    errors = [name for name in per_sample.__all__ if name.endswith(("Error", "Warning")) and name != "PerSampleError"]
    assert errors
    assert [name for name in errors if f"\n## {name}\n" not in text] == []


def test_every_page_says_what_it_is_about() -> None:
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert text.startswith(("# ", "```{include}")), page.name


COVERAGE = (DOCS / "coverage.md").read_text(encoding="utf-8")
# Functions that the library takes as a whole have no row in the table of rules.
WHOLE = {"aten.linear.default", "aten.linear_backward.default"}
# A rule that refuses training mode, and steps aside in evaluation.
ASIDE = {"aten._native_batch_norm_legit.default"}


def rows(title: str) -> list[list[str]]:
    """The lines of one of the page's tables."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", COVERAGE, re.MULTILINE | re.DOTALL)
    assert section, title
    return [[cell.strip(" `") for cell in line.strip("|\n").split("|")] for line in section[1].splitlines() if line.startswith("| `")]


def declared(name: str) -> str:
    """The route that an op takes if its rule does not step aside."""
    _, packet, overload = name.split(".")
    return "fallback" if name in ASIDE else _entries.resolve(getattr(getattr(torch.ops.aten, packet), overload)).route


MET = [row for row in rows("Ops of aten") if row[0].startswith("aten.") and row[0] not in WHOLE]


@pytest.mark.skipif(f"with torch {torch.__version__.split('+')[0]}." not in COVERAGE, reason="the page is of another torch")
def test_the_routes_of_the_coverage_page_are_those_of_the_registry() -> None:
    assert len(MET) > 500
    stale = {name: (routes, declared(name)) for name, routes in MET if declared(name) not in routes.split(", ")}
    assert stale == {}, "make the page anew: python -m tests.sweeps --coverage docs/coverage.md"


def test_the_coverage_page_tells_of_nothing_wrong() -> None:
    for title in ("Torch's table of ops", "Torch's table of modules", "Model families of Hugging Face transformers"):
        found = rows(title)
        assert found
        for name, _, right, refused, _, wrong, note in found:
            assert wrong == "0", name
            assert note or (int(right) and refused == "0"), f"{name} is refused without a reason"


@pytest.mark.skipif(f"with torch {torch.__version__.split('+')[0]}." not in COVERAGE, reason="the page is of another torch")
def test_the_coverage_page_has_every_op_of_the_table() -> None:
    assert {row[0] for row in rows("Torch's table of ops")} == {op.full_name for op in ops.OPS}
