"""Does the benchmark see what is wrong, and measure what it says?"""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import memory
from bench.measure import run_workload
from bench.methods import METHODS, Method, Runner
from bench.summary import summary
from bench.workloads import WORKLOADS, Task


def _off(quantity: str, by: float) -> Method:
    """A method one of whose numbers of one sample is off by a part of itself."""

    def prepare(task: Task) -> Runner:
        right = METHODS[quantity]["loop" if quantity != "gram" else "vmap"].prepare(task)

        def run() -> list[Tensor]:
            answer = [t.clone() for t in right()]
            answer[0].flatten()[int(answer[0].abs().argmax())] *= 1 + by
            return answer

        return run

    return Method("off", quantity, prepare)


@pytest.mark.parametrize("quantity", METHODS)
def test_a_wrong_answer_is_seen_and_a_right_one_passes(quantity: str) -> None:
    for by, status in ((0.0, "ok"), (0.05, "wrong")):
        plain, *_, found = run_workload(WORKLOADS["mlp-tiny"], {quantity: [_off(quantity, by)]}, rounds=0)
        assert (plain.status, found.status) == ("ok", status), found
        assert not found.times


@pytest.mark.parametrize("quantity", METHODS)
def test_one_that_raises_is_reported_with_its_reason(quantity: str) -> None:
    def prepare(task: Task) -> Runner:
        raise NotImplementedError("no rule\n for it")

    *_, found = run_workload(WORKLOADS["mlp-tiny"], {quantity: [Method("raises", quantity, prepare)]}, rounds=2)
    assert (found.status, found.reason, found.ratios) == ("failed", "NotImplementedError: no rule for it", {})


def test_half_of_the_samples_are_clipped() -> None:
    seen = {}

    def prepare(task: Task) -> Runner:
        norms = METHODS["norms"]["loop"].prepare(task)()[0]
        seen["clipped"], seen["n"] = int((norms > task.max_norm * 1.0001).sum()), len(norms)
        return METHODS["clipped"]["vmap"].prepare(task)

    *_, found = run_workload(WORKLOADS["mlp-tiny"], {"clipped": [Method("counts", "clipped", prepare)]}, rounds=0)
    assert found.status == "ok"
    assert seen == {"clipped": 4, "n": 8}


def test_memory_is_that_of_the_tensors_that_live() -> None:
    workload = WORKLOADS["mnist-cnn"]
    task = workload.build()
    expected = sum(prod(p.shape) for p in task.params.values()) * 4 * workload.n
    try:
        peak = memory.peak(task, "gradients", "write")
    except RuntimeError as err:
        pytest.skip(str(err))
    assert expected <= peak <= 1.05 * expected


def test_the_readme_gets_a_table_for_each_quantity_and_each_kind_of_ratio() -> None:
    def row(quantity: str, method: str, status: str = "ok", **ratios: float) -> dict[str, Any]:
        return {"workload": "a", "n": 2, "quantity": quantity, "method": method, "status": status, "ratios": ratios}

    found = {
        "date": "2026-01-01T00:00:00",
        "machine": {"cpu": "c", "cores": 2, "threads": 1},
        "versions": {"torch": torch.__version__, "opacus": "1"},
        "settings": {"rounds": 3},
        "results": [
            row("norms", "plain", plain=1.0, memory=1.0),
            row("norms", "ours", plain=1.25, memory=1.5),
            row("norms", "peer", "failed"),
            row("clipped", "plain", plain=1.0),
            row("clipped", "ours", plain=2.0),
        ],
    }
    lines = summary(found).splitlines()
    titles = [line for line in lines if line.startswith("**")]
    rows = [line for line in lines if line.startswith("| a (2)")]
    assert titles == ["**Norms: time**", "**Norms: peak memory**", "**Clipped: time**"]
    assert rows == ["| a (2) | 1.25 | failed |", "| a (2) | 1.50 | failed |", "| a (2) | 2.00 |"]
