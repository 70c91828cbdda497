"""Batches on several ranks: two processes under torchrun, launched once; ``distributed/checks.py`` says what they must find."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_examples import EXAMPLES, run_example

HERE = Path(__file__).parent
CHECKS = HERE / "distributed" / "checks.py"
NAMES = [
    node.name
    for node in ast.parse(CHECKS.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")


def torchrun(script, *arguments):
    """Run a script in two processes; warnings are errors in neither, since torch's own tools warn."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *map(str, arguments)]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Of each rank: what it says of each check; and what the processes printed."""
    folder = tmp_path_factory.mktemp("distributed")
    ended = torchrun(CHECKS, folder)
    found = []
    for rank in range(2):
        file = folder / f"rank{rank}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        found.append({line["check"]: line["verdict"] for line in map(json.loads, lines)})
    return found, f"exit status {ended.returncode}\n{ended.stderr[-8000:]}"


@pytest.mark.parametrize("name", NAMES)
def test_two_processes(launched, name):
    verdicts, printed = launched
    for rank, found in enumerate(verdicts):
        # A process that died says nothing here, but what it printed may.
        verdict = found.get(name) or f"not reached\n{printed}"
        assert verdict == "ok", f"rank {rank}: {verdict}"


PATTERN = r"(\d) process.* test accuracy ([\d.]+)% at epsilon ([\d.]+)"


@pytest.fixture(scope="module")
def alone():
    """What the example prints without torchrun."""
    done = run_example("distributed.py", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    return re.findall(PATTERN, done.stdout)


@pytest.mark.parametrize("options", [(), ("--sharded",)], ids=["replicated", "sharded"])
def test_the_example_on_two_processes(alone, options):
    done = torchrun(EXAMPLES / "distributed.py", "--epochs", "1", *options)
    assert done.returncode == 0, done.stderr
    # One process prints.
    [(processes, accuracy, epsilon)] = re.findall(PATTERN, done.stdout)
    [(one, accuracy_alone, epsilon_alone)] = alone
    assert (processes, one) == ("2", "1")
    assert epsilon == epsilon_alone
    # The same batches and the same noise: the parts are added in another order, that is all.
    assert abs(float(accuracy) - float(accuracy_alone)) < 1
    assert float(accuracy) > 30


def test_nothing_is_imported_for_plain_tensors():
    code = (
        "import sys, torch, per_sample\n"
        "per_sample.clipped_grad(lambda w, x: w @ x, 1.0)(torch.ones(2), torch.eye(2))\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent, timeout=120)
