"""The notebooks of ``examples/`` run, and show what is stored with them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from notebooks import HIDDEN, METADATA, NOTEBOOKS, VARIES, differences, errors, executed, read, tags, write

MAX_BYTES = 150_000
# Whatever a machine is called, its paths begin with one of these.
MACHINE = ("/home/", "/root/", "/Users/", "C:\\\\", str(Path(__file__).parents[1]), tempfile.gettempdir() + "/")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@each
def test_a_notebook_shows_what_is_stored(path: Path) -> None:
    stored = read(path)
    fresh = executed(stored)
    assert not list(errors(fresh)), "\n".join(errors(fresh))
    found = list(differences(stored, fresh))
    assert not found, "\n".join([*found, f"`python -m tests.notebooks --write examples/{path.name}` stores what it shows now"])


@each
def test_a_notebook_is_small_and_holds_nothing_of_the_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MAX_BYTES
    assert not [part for part in MACHINE if part in text]
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert all(cell.metadata in ({}, {"tags": tags(cell)}) for cell in notebook.cells)
    assert {tag for cell in notebook.cells for tag in tags(cell)} <= {VARIES, HIDDEN}


@each
def test_a_notebook_was_stored_after_a_run_from_top_to_bottom(path: Path) -> None:
    counts = [cell.execution_count for cell in read(path).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def notebook(*sources: str) -> NotebookNode:
    return new_notebook(cells=[new_code_cell(source) for source in sources], metadata=METADATA)


def test_what_changed_is_found(tmp_path: Path) -> None:
    cells = "import random", "print(random.random())", "random.random()", "print(1)"
    path = tmp_path / "some.ipynb"
    stored = notebook(*cells)
    write(executed(stored), path)
    found = list(differences(read(path), executed(read(path))))
    assert [f.splitlines()[1] for f in found] == ["print(random.random())", "random.random()"]
    for cell in (again := read(path)).cells:
        cell.metadata["tags"] = [VARIES]
    assert not list(differences(again, executed(again)))


def test_what_went_wrong_is_found() -> None:
    fresh = executed(notebook("import warnings", "warnings.warn('careful')", "1 / 0", "print('never')"))
    warned, failed = errors(fresh)
    assert "careful" in warned
    assert "ZeroDivisionError" in failed
    assert not fresh.cells[-1].outputs
