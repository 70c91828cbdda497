"""Imports go one way, and files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import per_sample

# What is imported, wherever it is installed.
PACKAGE = Path(per_sample.__file__).parent
MAX_LINES = 320

# From the bottom up: a module imports from lower layers only, and from its own layer where that makes no cycle. A
# package stands for all its modules. Imports under TYPE_CHECKING do not count: they do not happen.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "_errors",
        "_fsdp",
        "_generators",
        "_conversions",
        "_keys",
        "_lists",
        "_options",
        "_out",
        "_containers",
        "_dynamo",
        "_signatures",
        "_skipped",
        "_trees",
        "_torch_trees",
    ),
    ("_kernels",),
    ("_factors", "_conv_arguments"),
    ("quantities",),
    ("_batched", "_record"),
    ("_captured", "_fresh", "_pointwise", "_registry", "_shapes"),
    ("_arguments", "_caller", "_fallback", "_values"),
    ("_combinators", "_composites", "_control", "_functions", "_guards"),
    ("_entries",),
    ("_interpreter",),
    ("rules", "_surroundings"),
    ("_backward", "_marks", "_notes"),
    ("_run",),
    ("_ranks",),
    ("_write_back",),
    ("_swapped",),
    ("_distributed",),
    ("_batches", "_targets"),
    ("_compile", "grad", "reference"),
    ("_evaluate",),
    ("_weighing",),
    ("transforms",),
    ("expanded_weights", "_explanation", "explain", "modules", "testing"),
    ("__init__",),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}

# What each of these must not reach, not even through others.
FORBIDDEN = {
    "_interpreter": {"rules", "transforms"},
    "quantities": {"_batched", "_interpreter", "_registry"},
    "_kernels": {"_batched", "_interpreter", "_registry"},
    "_registry": {"rules", "_interpreter"},
    "reference": {"_interpreter", "_batched", "_factors", "rules"},
    "rules": {"_interpreter", "_run", "transforms"},
}

# What the compiler reads, beside the transforms.
TRACED = {"_arguments", "_compile", "_evaluate", "_torch_trees", "_weighing", "modules"}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node: ast.AST) -> set[str]:
    """The package's own modules that a file imports at run time, wherever in the file."""
    if isinstance(node, ast.Import):
        return {resolve(alias.name) for alias in node.names} - {""}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import on line {node.lineno}"
        return {resolve(f"{node.module}.{alias.name}") for alias in node.names} - {""}
    below = [child for child in ast.iter_child_nodes(node) if not is_type_checking(node) or child not in node.body]
    return set().union(*map(imported, below))


def resolve(name: str) -> str:
    """The module of the package that an imported name is or stands in; empty for other packages."""
    top, *parts = name.split(".")
    if top != PACKAGE.name:
        return ""
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


IMPORTS = {name: imported(ast.parse(path.read_text(encoding="utf-8"))) - {name} for name, path in MODULES.items()}


def layer(module: str) -> int:
    unit = module.split(".")[0]
    assert unit in HEIGHT, f"`{unit}` has no layer yet: give it one in LAYERS"
    return HEIGHT[unit]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    upward = {other for other in IMPORTS[module] if layer(other) > layer(module)}
    assert not upward, f"`{module}` imports from above it: {sorted(upward)}"


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in sorted(IMPORTS[module]):
                visit(other, (*path, module))
            done.add(module)

    # `rules/__init__` imports its own files, which is no cycle: they do not import it.
    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("unit", FORBIDDEN)
def test_what_must_not_be_reached(unit: str) -> None:
    reached: set[str] = set()
    waiting = [module for module in MODULES if module.split(".")[0] == unit]
    assert waiting
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(IMPORTS[module])
    assert not FORBIDDEN[unit] & {module.split(".")[0] for module in reached}


def test_every_rule_file_is_loaded() -> None:
    # A leading underscore marks maths that rules share, without rules of its own.
    files = {module for module in MODULES if module.startswith("rules.") and not module.startswith("rules._")}
    assert files <= IMPORTS["rules"]


@pytest.mark.parametrize("module", MODULES)
def test_files_are_small_and_named_for_what_they_hold(module: str) -> None:
    path = MODULES[module]
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}


def comprehensions(node: ast.AST) -> set[int]:
    """The lines with a comprehension that runs in the frame of what is around it."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.GeneratorExp)):
        return set()
    own = {node.lineno} if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp)) else set()
    return own.union(*map(comprehensions, ast.iter_child_nodes(node)))


@pytest.mark.parametrize("module", [module for module in MODULES if module in TRACED or module.startswith("transforms.")])
def test_what_dynamo_traces_has_no_comprehension_inside_a_block(module: str) -> None:
    # It loses count of the blocks there, with Python 3.13.
    blocks = [node for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))) if isinstance(node, (ast.With, ast.Try))]
    assert not {line for block in blocks for line in comprehensions(block)}


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
