"""Every Python snippet of the README runs, in order and in one namespace, and prints what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from versions import skip_if_lacking

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTS = "# prints: "


def snippets(language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(README.read_text(encoding="utf-8")) if found == language]


def test_python_snippets_run_and_print_what_they_say() -> None:
    torch.manual_seed(0)
    # A module of its own: compiled functions look their globals up there.
    module = types.ModuleType("readme")
    blocks = snippets("python")
    assert blocks
    for number, code in enumerate(blocks):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"README.md, snippet {number}", "exec"), module.__dict__)
        expected = [line.removeprefix(PRINTS) for line in code.splitlines() if line.startswith(PRINTS)]
        assert printed.getvalue().splitlines() == expected, f"snippet {number}:\n{code}"


def test_a_compiled_step_of_the_readme_equals_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = snippets("python")
    number, code = next((i, code) for i, code in enumerate(blocks) if "fullgraph=True" in code)
    module = types.ModuleType("readme_step")
    skip_if_lacking("compiled convolution")
    # Some versions of torch look for the module of what they compile where imported modules are.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with contextlib.redirect_stdout(io.StringIO()):
        for earlier in blocks[:number]:
            exec(compile(earlier, "README.md, an earlier snippet", "exec"), module.__dict__)
    eager = code.replace("@torch.compile(fullgraph=True)\n", "")
    arguments = [module.__dict__["loss"].params, module.__dict__["x"], module.__dict__["y"]]
    exec(compile(eager, "README.md, eager step", "exec"), module.__dict__)
    expected = module.__dict__["step"](*arguments)
    exec(compile(code, "README.md, compiled step", "exec"), module.__dict__)
    torch.testing.assert_close(module.__dict__["step"](*arguments), expected)


def test_the_table_comes_from_the_benchmark() -> None:
    spec = importlib.util.spec_from_file_location("summary", README.parent / "bench" / "summary.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = json.loads((README.parent / "bench" / "results.json").read_text(encoding="utf-8"))
    assert module.summary(results) in README.read_text(encoding="utf-8")


PATHS = re.findall(r"`([\w./]+/[\w./]+|[A-Z]{4,}(?:\.md)?)`", README.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PATHS)
def test_paths_named_in_the_readme_exist(path: str) -> None:
    assert (README.parent / path).exists()
