"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from per_sample import _backward
from per_sample.quantities import side_by_side

SEED = 0


def pytest_collectstart() -> None:
    """What a module draws while it is imported is the same in every run."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def the_same_numbers_every_time() -> None:
    """So that a failure comes again, whatever ran before."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True, scope="module")
def every_size_is_large(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests are small, and mean what large models get; a module that says ``SIZES_AS_THEY_ARE`` sees what small ones get."""
    if getattr(request.module, "SIZES_AS_THEY_ARE", False):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backward, "LARGE", 0)
        patch.setattr(side_by_side, "SMALL", 0)
        yield
