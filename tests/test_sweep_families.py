"""A few model families of ``transformers``; ``python -m tests.sweeps families`` runs all of them in every variant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("transformers", reason="wants the dependency group `families`")

from sweeps import families

if TYPE_CHECKING:
    from sweeps.tally import Case


@pytest.mark.parametrize("case", families.cases(whole=False), ids=lambda case: case.name)
def test_few(case: Case) -> None:
    finding = case.check()
    assert finding.verdict == "right", finding.detail
