"""The public API's types: a strict type checker accepts the files of ``typed`` and refuses the lines marked there."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import per_sample
from per_sample import reference

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
WRAPPERS: dict[str, tuple[Any, ...]] = {
    "per_sample_grad": (),
    "per_sample_grad_and_value": (),
    "per_sample_grad_map": (lambda grads: grads.norm(),),
    "per_sample_grad_norm": (),
    "weighted_grad": (torch.ones(3),),
    "clipped_grad": (1.0,),
    "grad_second_moment": (),
    "grad_variance": (),
    "gradient_noise_scale": (),
    "per_sample_grad_dot": (torch.ones(3),),
    "grad_gram": (),
    "projected_grad": (per_sample.GaussianProjector(4),),
    "per_sample_jacobian": (),
}


def test_a_strict_type_checker_agrees() -> None:
    pytest.importorskip("mypy")
    files = sorted(map(str, (ROOT / "tests" / "typed").glob("*.py")))
    assert files
    # Only what these files say: the package itself is checked by `mypy` alone, which shares its cache with this.
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--python-executable", sys.executable, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def loss(params: Tensor, x: Tensor, y: float = 1.0, *, scale: float = 2.0) -> Tensor:
    """The loss of one sample."""
    return (x @ params - y) * scale


@pytest.mark.parametrize("module", [per_sample, reference], ids=["per_sample", "reference"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_function_is_signed_as_the_function(name: str, module: Any) -> None:
    transform: Callable[..., Any] = getattr(module, name)
    wrapped = transform(loss, *WRAPPERS[name])
    assert inspect.signature(wrapped) == inspect.signature(loss)
    assert (wrapped.__name__, wrapped.__doc__) == ("loss", "The loss of one sample.")


def test_every_transform_is_listed() -> None:
    transforms = {name for name in reference.__all__ if inspect.isfunction(getattr(reference, name)) or name == "clipped_grad"}
    assert transforms == set(WRAPPERS)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_reference_takes_the_same_options(name: str) -> None:
    def of(module: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]

    assert of(per_sample) == of(reference)


def test_a_module_is_signed_as_its_forward() -> None:
    module = torch.nn.Linear(3, 2)
    assert inspect.signature(per_sample.call_for_per_sample_grads(module)) == inspect.signature(module.forward)
