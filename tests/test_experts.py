"""Products of groups of rows, as mixtures of experts have them, and the ops that sort and count the groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from per_sample import explain, options, per_sample_grad
from tree_oracle import assert_close, loop

N, EXPERTS, ROWS, WIDTH, OUT = 5, 3, 10, 8, 16


def product(w: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Rows behind the last group are whatever was in memory."""
    out = torch._grouped_mm(x, w, ends)
    inside = torch.arange(ROWS) < ends[-1]
    return torch.where(inside[:, None], out, 0)


def loss(w: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    out = product(w, x, ends)
    return (out * torch.arange(1.0, out.numel() + 1).view(out.shape).cos()).sum() + out.square().sum()


def drawn(generator: torch.Generator, *, full: bool) -> Tensor:
    ends = torch.randint(0, ROWS + 1, (N, EXPERTS), generator=generator).sort(1)[0].to(torch.int32)
    if full:
        ends[:, -1] = ROWS
    return ends


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dims", [(None, 0, 0), (0, 0, 0), (None, 0, None), (0, 0, None), (None, None, 0)])
def test_grouped_products(dims, full):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(*(() if dims[0] is None else (N,)), EXPERTS, WIDTH, OUT, generator=generator)
    x = torch.randn(*(() if dims[1] is None else (N,)), ROWS, WIDTH, generator=generator)
    ends = drawn(generator, full=full)
    ends = ends[0] if dims[2] is None else ends
    # torch leaves the gradient of rows of no group uninitialised, so that only the weights' is compared then.
    argnums = (0, 1) if full else (0,)
    actual = per_sample_grad(loss, argnums, dims)(w, x, ends)
    for got, want in zip(actual, loop(loss, argnums, dims)(w, x, ends), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    routes = {row.route for row in explain(loss, argnums, dims)(w, x, ends).rows if "_grouped_mm" in row.op}
    assert routes <= {"rule", "shared"}


def test_rows_of_no_expert_reach_no_other_sample():
    experts = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    ends = torch.tensor([[4, 12], [3, 16], [8, 10], [1, 2]], dtype=torch.int32)

    def fn(w: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        y = torch._grouped_mm(x, w, offs=ends)
        return torch.where((torch.arange(16) < ends[-1])[:, None], y, 0.0).float().sin().sum()

    clean = per_sample_grad(fn)(experts, rows, ends)
    rows[0, 14] = float("nan")
    assert torch.equal(per_sample_grad(fn)(experts, rows, ends)[1:], clean[1:])


COUNTS = {
    "histc": lambda x: (torch.histc(x, 4, 0, 3),),
    "histc-outside": lambda x: (torch.histc(x, 7, -1, 2.5),),
    "histc-own-range": lambda x: (torch.histc(x, 3),),
    "unique": lambda x: torch.unique(x, return_inverse=True, return_counts=True),
    "unique-of-rows": lambda x: torch.unique(x.view(2, 3), dim=0, return_inverse=True, return_counts=True),
    "unique-consecutive": lambda x: torch.unique_consecutive(x.view(2, 3), return_inverse=True, return_counts=True),
    "bincount": lambda x: (torch.bincount(x.long()),),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counting(name):
    x = torch.randint(0, 4, (9, 6), generator=torch.Generator().manual_seed(0)).float()

    def weigh(w: Tensor, x: Tensor) -> Tensor:
        found = COUNTS[name](x)
        return w * sum((t.double() * torch.arange(1, t.numel() + 1).view(t.shape)).sum() for t in found)

    w = torch.ones((), dtype=torch.float64)
    with options(split_batch=True):
        assert_close(per_sample_grad(weigh)(w, x), loop(weigh, (0,), (None, 0))(w, x)[0])
