"""The first samples of every op of torch's own table; ``python -m tests.sweeps ops`` checks all of them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sweeps import __main__ as command
from sweeps import ops


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.full_name)
def test_op(op: Any) -> None:
    findings = [case.check() for case in ops.cases_of(op, whole=False)]
    assert [f"{f.verdict} {f.name}: {f.detail}" for f in findings if not f.fine] == []


def test_the_command_without_a_word_runs_every_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[str] = []
    made = {name: SimpleNamespace(cases=lambda whole, name=name: run.append(name) or []) for name in command.SWEEPS}
    monkeypatch.setattr(command.importlib, "import_module", lambda name, package: made[name.removeprefix(".")])
    monkeypatch.setattr(sys, "argv", ["sweeps"])
    monkeypatch.setattr(command, "report", lambda found, complete: list(found) == [] and complete == command.SWEEPS)
    assert command.main() == 0
    assert run == list(command.SWEEPS)
    monkeypatch.setattr(sys, "argv", ["sweeps", "opz"])
    with pytest.raises(SystemExit):
        command.main()
