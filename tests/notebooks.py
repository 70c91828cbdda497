"""``python -m tests.notebooks [--write] [FILE ...]``: run the notebooks of ``examples/``, and compare or store what they print.

Every notebook runs in a kernel of its own, in an empty directory. What its cells print must be what is stored with them, so that what a
reader sees cannot go stale. Pictures are not compared, only that there is one. The text of a cell tagged ``varies`` (times, say) is not
compared either; it still must run. Whatever a cell writes to the error stream, warnings too, is a failure.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from traitlets.config import Config

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
VARIES = "varies"
# The site folds the code of such a cell away: it only draws.
HIDDEN = "hide-input"
SECONDS_A_CELL = 300
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}


def read(path: Path) -> NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(path, as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    """Store a notebook, without what another run or another machine would change."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": tags(cell)} if tags(cell) else {})
    nbformat.write(notebook, path)


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def executed(notebook: NotebookNode) -> NotebookNode:
    """The same cells with the outputs of a fresh run; a cell that fails ends it, and its error is among its outputs."""
    fresh = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as empty:
        client = NotebookClient(
            fresh,
            timeout=SECONDS_A_CELL,
            kernel_name="python3",
            resources={"metadata": {"path": empty}},
            record_timing=False,
            coalesce_streams=True,
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
            # The kernel that comes with this interpreter, whatever others are installed.
            config=Config(KernelSpecManager={"kernel_dirs": []}),
        )
        try:
            client.execute(env=_environment(empty))
        except CellExecutionError:
            pass
    return fresh


def _environment(directory: str) -> dict[str, str]:
    """The kernel's environment: it finds the same package as this process, wherever that stands."""
    spec = importlib.util.find_spec("per_sample")
    assert spec is not None
    assert spec.origin is not None
    paths = [str(Path(spec.origin).parents[1]), os.environ.get("PYTHONPATH", "")]
    # As in `pyproject.toml`: forward mode of torch 2.15 uses what torch has deprecated.
    ignored = "ignore:`torch.jit.script` is deprecated:FutureWarning"
    found = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONWARNINGS": ignored}
    return os.environ | found | {"IPYTHONDIR": directory, "MPLCONFIGDIR": directory}


def errors(notebook: NotebookNode) -> Iterator[str]:
    """What went wrong in a run: exceptions, and all that was written to the error stream."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"in\n{cell.source}\n{_plain(chr(10).join(output.traceback))}"
            elif output.output_type == "stream" and output.name == "stderr":
                yield f"on the error stream of\n{cell.source}\n{output.text}"


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def differences(stored: NotebookNode, fresh: NotebookNode) -> Iterator[str]:
    """Where a fresh run shows something else than what is stored."""
    for old, new in zip(code_cells(stored), code_cells(fresh), strict=True):
        before, after = shown(old), shown(new)
        if before != after:
            lines = difflib.unified_diff(before, after, "stored", "fresh", lineterm="", n=2)
            yield f"in\n{old.source}\n" + "\n".join(lines)


def shown(cell: NotebookNode) -> list[str]:
    """What a cell shows, line by line, as far as every run must show the same."""
    lines: list[str] = []
    for output in cell.outputs:
        if output.output_type == "stream":
            lines += ["<text>"] if VARIES in tags(cell) else output.text.splitlines()
        elif output.output_type == "error":
            lines.append(f"<{output.ename}>")
        elif any(kind.startswith("image/") for kind in output.data):
            lines.append("<picture>")
        else:
            lines += ["<value>"] if VARIES in tags(cell) else _plain(output.data.get("text/plain", "")).splitlines()
    return lines


def _plain(text: str) -> str:
    """Text without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def main() -> int:
    """Run the notebooks, all of them by default; 1 where one fails or, without ``--write``, shows something else than before."""
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description="Run the notebooks of examples/.")
    parser.add_argument("files", nargs="*", type=Path, default=NOTEBOOKS, help="all of examples/ by default")
    parser.add_argument("--write", action="store_true", help="store what they show, instead of comparing with what is stored")
    options = parser.parse_args()
    failed = False
    for path in options.files:
        stored = read(path)
        fresh = executed(stored)
        found = list(errors(fresh)) or ([] if options.write else list(differences(stored, fresh)))
        print(f"{path.name}: {chr(10).join(found) or ('stored' if options.write else 'as stored')}", flush=True)
        failed |= bool(found)
        if options.write and not found:
            write(fresh, path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
