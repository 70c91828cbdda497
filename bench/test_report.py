"""Growth, the largest batch, and what becomes of the numbers: JSON, tables, pages, pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import pages, report
from bench.__main__ import main
from bench.summary import summary, tables
from bench.sweep import FACTORS, PRECISION, largest

LIMIT = 2**33
COSTS: dict[str, Callable[[int], float]] = {
    "a line": lambda n: 5e6 + 3e5 * n,
    "a square": lambda n: 4e3 * n**2,
    "a step": lambda n: 1e5 * n if n < 3000 else 2e6 * n,
    "flat at first": lambda n: max(1e6, 1e4 * (n - 500)),
}


@pytest.mark.parametrize("fails", [False, True], ids=["measured", "out of memory"])
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_the_largest_batch_is_found_in_a_few_steps(cost: Callable[[int], float], fails: bool) -> None:
    seen = []

    def peak(n: int) -> int:
        seen.append(n)
        if fails and cost(n) > LIMIT:
            raise MemoryError
        return int(cost(n))

    found = largest(peak, 16, int(cost(16)), LIMIT)
    assert cost(found) <= LIMIT < cost(int(found * PRECISION) + 1)
    assert len(seen) == len(set(seen)) <= 20


def row(quantity: str, method: str, status: str = "ok", n: int = 2, **more: Any) -> dict[str, Any]:
    ratios = {name: more.pop(name) for name in ("plain", "memory") if name in more}
    found = {"workload": "a", "n": n, "width": n, "quantity": quantity, "method": method, "status": status, "reason": "", "ratios": ratios}
    return {**found, "memory": 2**20, "median": 0.1, "times": [], "first_call": 1.0, **more}


FOUND: dict[str, Any] = {
    "date": "2026-01-01T00:00:00",
    "machine": {"cpu": "c", "cores": 2, "threads": 1},
    "versions": {"torch": torch.__version__, "opacus": "1"},
    "settings": {"rounds": 3},
    "results": [
        row("norms", "plain", plain=1.0, memory=1.0, times=[1.0, 1.0, 1.0]),
        row("norms", "backpack", plain=3.0, memory=3.0),
        row("norms", "book-keeping", plain=2.0),
        row("norms", "opacus-ghost", "failed", reason="refuses"),
        row("norms", "jax", plain=1.5, compiled=True, first_call=7.0),
        row("norms", "ours", plain=1.25, memory=1.5, times=[1.0, 1.25, 1.5]),
        row("norms", "ours-compiled", plain=0.5, compiled=True, first_call=9.0),
        row("clipped", "plain", plain=1.0),
        row("clipped", "opacus-ghost", "failed", reason="refuses"),
        row("clipped", "jax", "absent", compiled=True),
        row("clipped", "ours", plain=2.0),
    ],
    "sweeps": {kind: [row("norms", m, n=n, plain=1.0) for m in ("plain", "vmap", "ours") for n in (1, 2, 4)] for kind in FACTORS},
    "fits": {
        "largest": [{"workload": "a", "quantity": "clipped", "method": m, "limit": 2**33, "n": n} for m, n in (("x", 7), ("y", None))]
    },
}


def test_the_readme_shows_the_best_peer_beside_ours() -> None:
    lines = summary(FOUND).splitlines()
    assert [line for line in lines if line.startswith("**")] == [
        "**Time**",
        "**Peak memory**",
        "**Clipped: the largest batch in 8 GiB**",
    ]
    assert [line for line in lines if line.startswith("| a")] == [
        "| a (2) | 2.00 book-keeping | 1.25 | failed | 2.00 |",
        "| a (2) | 3.00 backpack | 1.50 | failed |",
        "| a | 7 | failed |",
    ]


def test_the_page_shows_every_method_and_why_one_failed() -> None:
    rows = [line for line in tables(FOUND).splitlines() if line.startswith("| a")]
    assert rows == [
        "| a (2) | 3.00 | 2.00 | failed | 1.50 | 1.25 (1.12-1.38) | 0.50 |",
        "| a (2) | 3.00 | failed | 1.50 |",
        "| a (2) | 7.0 | 9.0 |",
        "| a (2) | failed | 2.00 |",
    ]
    assert "- a, opacus-ghost: refuses" in pages.page(FOUND)


def test_pages_and_pictures_are_made_from_the_json_alone(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(FOUND))
    (tmp_path / "README.md").write_text(f"before\n{pages.BEGIN}old\n{pages.END}after\n")
    for _ in range(2):
        pages.write(tmp_path / "r.json", tmp_path)
        assert (tmp_path / "README.md").read_text() == f"before\n{pages.BEGIN}\n{summary(FOUND)}\n\n{pages.END}after\n"
    assert {f.name for f in (tmp_path / "docs").iterdir()} == {
        "benchmarks.md",
        *(f"{name}{suffix}.png" for name in ("benchmarks", "sweeps") for suffix in ("", "-dark")),
    }


def test_a_part_of_the_json_is_written_without_the_others(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    report.write_json(path, {"results": [1]}, {})
    report.write_json(path, {"n": [2]}, {}, "sweeps")
    report.write_json(path, {"width": [3]}, {}, "sweeps")
    report.write_json(path, {"results": [4]}, {})
    found = json.loads(path.read_text())
    assert (found["results"], found["sweeps"]["n"], found["sweeps"]["width"]) == ([4], [2], [3])


def test_the_command_line_writes_table_and_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--workload", "mlp-tiny", "--quantity", "norms", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "r.json")]
    main([*common, "--method", "loop", "ours", "--markdown", str(tmp_path / "r.md")])
    main([*common, "--sweep", "n", "width"])
    found = json.loads((tmp_path / "r.json").read_text())
    assert [r["method"] for r in found["results"]] == ["plain", "loop", "ours"]
    assert all(r["status"] == "ok" and len(r["times"]) == 2 for r in found["results"])
    assert list(dict.fromkeys(r["n"] for r in found["sweeps"]["n"])) == [2, 4, 8, 16, 32]
    assert list(dict.fromkeys(r["width"] for r in found["sweeps"]["width"])) == [8, 16, 32, 64]
    assert {r["method"] for kind in FACTORS for r in found["sweeps"][kind]} == {"plain", "vmap", "ours"}
    assert "ours" in capsys.readouterr().out
    assert "| mlp-tiny | 8 | norms | ours |" in (tmp_path / "r.md").read_text()
