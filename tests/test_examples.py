"""The examples run as a user runs them, and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def run_example(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / name, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_digits_finds_planted_labels(tmp_path: Path) -> None:
    picture = tmp_path / "new folder" / "digits.png"
    done = run_example("digits.py", "--epochs", "4", "--seed", "1", "--out", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"found (\d+) of (\d+) planted labels among the (\d+) largest gradient norms", done.stdout)
    assert found, done.stdout
    hits, planted, looked_at = map(int, found.groups())
    assert planted == looked_at == 72
    # By chance it would be 3.6; four epochs find about 60.
    assert hits > planted // 2, done.stdout
    assert picture.read_bytes().startswith(PNG)


def test_digits_refuses_bad_options() -> None:
    done = run_example("digits.py", "--epochs", "0")
    assert done.returncode == 2
    assert "--epochs must be at least 1" in done.stderr
