"""The site: `sphinx-build -W --keep-going -n -b html docs <out>`. It needs no network."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
# The docstrings are those of this checkout, installed or not.
sys.path.insert(0, str(ROOT))

import per_sample  # noqa: E402

project = "per_sample"
author = "per_sample contributors"
version = release = per_sample.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]

html_theme = "furo"
html_title = "per_sample"
html_static_path: list[str] = []
# The single backticks of the docstrings are code, too.
default_role = "code"

# Every reference must have a target. Those of torch and of Python would have to be fetched (intersphinx), so they are named here instead.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|optree|collections|typing|types|contextlib|rich|tqdm)(\..*)?"),
    (r"py:.*", r"(Tensor|nn|nn\.Module|OpOverload|Callable|Iterator|Iterable|Mapping|Sequence|PackedSequence|optional)"),
    # Type variables, aliases and classes of the package's own modules in annotations.
    (r"py:.*", r"(Argnums|Factor|P|R|T|F|_?[A-Z])"),
    (r"py:.*", r"per_sample\._.*"),
]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "References")]
napoleon_use_rtype = False

myst_heading_anchors = 3
# The notebooks are executed by the tests, and keep their outputs.
nb_execution_mode = "off"
copybutton_prompt_text = ">>> "
# Only code is worth copying, not what it prints.
copybutton_only_copy_prompt_lines = False

# The notebooks stand in `examples`, and Sphinx looks only below this folder.
NOTEBOOKS = HERE / "notebooks"
for stale in NOTEBOOKS.glob("*.ipynb"):
    stale.unlink()
for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
    shutil.copy(notebook, NOTEBOOKS / notebook.name)


# A public name in double backticks.
NAME = re.compile(r"``(?:per_sample\.)?(" + "|".join(per_sample.__all__) + r")``")


def setup(app: Any) -> None:
    """Docstrings are prepared before Napoleon reads them."""
    app.connect("autodoc-process-docstring", _prepared, priority=400)


def _prepared(_app: Any, what: str, _name: str, _of: object, _options: object, lines: list[str]) -> None:
    lines[:] = [NAME.sub(r":py:obj:`~per_sample.\1`", line) for line in lines]
    if what in ("attribute", "property"):
        # Napoleon takes the words before a property's first colon for its type; a line in front, which shows as nothing, has no colon.
        lines.insert(0, "\\")
