"""The library with torch and optree alone: the README's first snippet, a plain table, and clear words where an extra is missing.

`.ci/release` runs this in an environment that holds nothing else.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

with warnings.catch_warnings():
    # Torch itself says that numpy is not there.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch

warnings.simplefilter("error")

import per_sample  # noqa: E402
from per_sample.testing import assert_matches_reference  # noqa: E402

OPTIONAL = ("numpy", "rich", "tqdm", "matplotlib", "sklearn", "dp_accounting", "pytest")
README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    """Run it all; an exception is the verdict."""
    found = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    assert not found, f"this environment is to hold torch and optree alone; it has {found}"

    names: dict[str, object] = {}
    first = README.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(first, "README.md, first snippet", "exec"), names)

    def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (x @ w).tanh().sum()

    w, x = torch.ones(3, 2), torch.randn(5, 3)
    assert_matches_reference(loss, w, x)
    assert per_sample.per_sample_grad_norm(loss)(w, x).shape == (5,)
    assert per_sample.clipped_grad(loss, max_norm=1.0)(w, x).shape == w.shape
    assert "aten." in str(per_sample.explain(loss)(w, x))

    message = ""
    try:
        with per_sample.options(progress=True):
            per_sample.per_sample_grad(loss, chunk_size=2)(w, x)
    except ImportError as err:
        message = str(err)
    assert "pip install tqdm" in message, f"a progress bar without tqdm: {message!r}"
    print(f"per_sample {per_sample.__version__} runs with torch {torch.__version__} and optree alone.")


main()
