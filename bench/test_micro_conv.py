"""Micro-benchmarks of each algorithm for convolutions: `pytest bench --benchmark-only -k algorithms`.

A group holds one shape and one quantity, its rows the algorithms, each forced; `python -m bench.cost_model` compares them with the pick.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cost_model import measure, summary
from bench.cost_model_ways import QUANTITIES, Choice, operands
from bench.micro import CONVS, Conv, assert_close
from per_sample._kernels.conv import ConvGeometry, conv_algorithm
from per_sample._kernels.conv_sum import SUMS, conv_weight_sum
from per_sample._options import CONV_ALGORITHMS, options
from per_sample.grad import conv1d_weight, conv2d_weight, conv3d_weight

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.benchmark(disable_gc=True, warmup="on")]

WEIGHT = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def _loop(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """The oracle: each sample by itself, in float64."""
    pairs = zip(x.double().split(1), g.double().split(1), strict=True)
    return torch.stack([conv_weight_sum(*pair, geometry, algorithm="plain") for pair in pairs])


@pytest.mark.parametrize("algorithm", [*CONV_ALGORITHMS, "ours"])
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)
def test_algorithms(benchmark: Any, case: Conv, algorithm: str) -> None:
    """Each sample's gradient."""
    x, g, geometry = operands(case)
    if algorithm == "onednn" and case.groups > 1:
        pytest.skip("one group only")
    arguments = x[:, 0], case.weight, g[:, 0], *case.options
    kernel = WEIGHT[len(case.input) - 2]
    benchmark.group = f"conv algorithms {case.name} (pick: {conv_algorithm(x, g, geometry)})"
    with options(conv_algorithm=None if algorithm == "ours" else algorithm):
        assert_close(kernel(*arguments), _loop(x, g, geometry))
        benchmark(kernel, *arguments)


@pytest.mark.parametrize("algorithm", [*SUMS, None])
@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)
def test_sum_algorithms(benchmark: Any, case: Conv, algorithm: str | None) -> None:
    """Their sum."""
    x, g, geometry = operands(case)
    assert_close(conv_weight_sum(x, g, geometry, algorithm=algorithm), _loop(x, g, geometry).sum(0))
    benchmark.group = f"conv sum algorithms {case.name}"
    benchmark(conv_weight_sum, x, g, geometry, algorithm=algorithm)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_small(quantity: str) -> None:
    """Fast: the first shape of the cost model's table is measured, and a wrong answer is seen."""
    choice = next(QUANTITIES[quantity]())
    row = measure(choice, rounds=1)
    assert row.picked == choice.picked
    assert row.loss >= 1
    assert min(row.ways.values()) == 1
    assert "1 shapes" in summary([row])
    wrong = Choice(choice.name, choice.picked, {**choice.ways, "wrong": lambda: choice.ways[choice.picked]() * 1.1}, choice.plain)
    with pytest.raises(AssertionError):
        measure(wrong, rounds=1)
