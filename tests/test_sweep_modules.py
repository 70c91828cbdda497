"""The first inputs of every module of torch's own table; ``python -m tests.sweeps modules`` checks all of them."""

from __future__ import annotations

import pytest

from sweeps import modules

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:reduction. 'mean' divides the total loss")

CASES = {}
for case in modules.cases(whole=False):
    CASES.setdefault(case.name.split("/")[1], []).append(case)


@pytest.mark.parametrize("module", CASES)
def test_module(module: str) -> None:
    findings = [case.check() for case in CASES[module]]
    assert [f"{f.verdict} {f.name}: {f.detail}" for f in findings if not f.fine] == []
    assert any(f.verdict != "void" for f in findings)
