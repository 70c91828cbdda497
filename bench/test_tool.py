"""Does the benchmark see what is wrong, and measure what it says?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

import pytest
from torch import Tensor

from bench import memory
from bench.measure import run_workload
from bench.methods import METHODS, Method, Runner, Unavailable
from bench.workloads import WORKLOADS, Task, Workload


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


def test_one_that_takes_no_part_is_no_failure() -> None:
    def prepare(task: Task) -> Runner:
        raise Unavailable("no twin")

    *_, found = run_workload(WORKLOADS["mlp-tiny"], {"norms": [Method("absent", "norms", prepare)]}, rounds=0)
    assert (found.status, found.reason) == ("absent", "Unavailable: no twin")


def test_memory_is_that_of_the_tensors_that_live() -> None:
    workload = WORKLOADS["mnist-cnn"]
    task = workload.build()
    expected = sum(prod(p.shape) for p in task.params.values()) * 4 * workload.n
    try:
        peak = memory.peak(workload, "gradients", "write")
    except RuntimeError as err:
        pytest.skip(str(err))
    assert expected <= peak <= 1.05 * expected


def test_a_call_without_enough_memory_is_told_from_one_that_fails() -> None:
    workload = WORKLOADS["mlp-tiny"]
    with pytest.raises(MemoryError):
        memory.peak(replace(workload, n=2**19), "gradients", "write", limit=2**20)
    with pytest.raises(RuntimeError, match="KeyError"):
        memory.peak(workload, "gradients", "nobody")


SMALL = {"mlp-tiny": 5, "mnist-cnn": 3, "convnet": 4, "resnet18-gn": 4, "separable": 8, "audio": 4, "conv3d": 2}
SMALL |= {"gpt": 32, "gpt-tied": 32, "gpt-long": 32, "lstm": 5, "experts": 6, "embedding": 3}
KINDS = {"mlp": "mlp-tiny", "resnet18-gn-32": "resnet18-gn"}


def small(name: str) -> Workload:
    """Two samples, few channels, and of a transformer one block."""
    workload = replace(WORKLOADS[name], n=2, width=SMALL[name])
    return replace(workload, model=partial(workload.model, blocks=1)) if name.startswith("gpt") else workload


def test_every_workload_has_a_small_twin_here() -> None:
    assert {KINDS.get(name, name) for name in WORKLOADS} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_every_workload_runs_here_and_the_answer_is_right(name: str) -> None:
    tables = {"gradients": [METHODS["gradients"][m] for m in ("vmap", "ours")], "norms": [METHODS["norms"]["ours"]]}
    found = run_workload(small(name), tables, rounds=0)
    refused = {("lstm", "vmap")}
    assert [(r.method, r.status, r.reason) for r in found if r.status != "ok" and (name, r.method) not in refused] == []


@pytest.mark.parametrize("name", SMALL)
def test_book_keeping_is_right_or_says_why_not(name: str) -> None:
    tables = {q: [METHODS[q]["book-keeping"]] for q in ("norms", "clipped")}
    found = [r for r in run_workload(small(name), tables, rounds=0) if r.method == "book-keeping"]
    refused = {"lstm": "LSTM", "gpt-tied": "tied"}
    if name in refused:
        assert all(r.status == "failed" and refused[name] in r.reason for r in found), found
    else:
        assert [(r.status, r.reason) for r in found] == [("ok", "")] * 2


@pytest.mark.parametrize(
    ("name", "quantity"),
    [("mlp-tiny", "norms"), ("mlp-tiny", "clipped"), *((n, "gradients") for n in ("mnist-cnn", "convnet", "embedding", "gpt-tied"))],
)
def test_twins_in_jax_are_right(name: str, quantity: str) -> None:
    pytest.importorskip("jax")
    *_, found = run_workload(small(name), {quantity: [METHODS[quantity]["jax"]]}, rounds=0)
    assert (found.status, found.reason) == ("ok", "")
