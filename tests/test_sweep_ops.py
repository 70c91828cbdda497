"""The first samples of every op of torch's own table; ``python -m tests.sweeps ops`` checks all of them."""

from __future__ import annotations

from typing import Any

import pytest

from sweeps import ops


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.full_name)
def test_op(op: Any) -> None:
    findings = [case.check() for case in ops.cases_of(op, whole=False)]
    assert [f"{f.verdict} {f.name}: {f.detail}" for f in findings if not f.fine] == []
