"""What micro-benchmarks run under, and what the tests of the tool do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two for times, as in the big table; tests want none beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if "benchmark" in request.fixturenames else 1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
