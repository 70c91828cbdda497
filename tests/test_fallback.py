"""The fallback by itself, on the ops where torch.vmap writes every sample into the one shared copy."""

from __future__ import annotations

import pytest
import torch

from per_sample import _fallback
from per_sample._batched import Context, wrap

aten = torch.ops.aten
N = 3
INDEX = torch.tensor([0, 4])
WRITES = {
    aten.index_fill.int_Tensor: (torch.zeros(5), 0, INDEX, torch.arange(1.0, N + 1)),
    aten.index_add.default: (torch.zeros(5), 0, INDEX, torch.randn(N, 2)),
    aten.index_copy.default: (torch.zeros(5), 0, INDEX, torch.randn(N, 2)),
    aten.masked_fill.Tensor: (torch.zeros(5), torch.tensor([True, False, True, False, False]), torch.randn(N)),
    aten.scatter.src: (torch.zeros(5), 0, INDEX, torch.randn(N, 2)),
    aten.scatter_add.default: (torch.zeros(5), 0, INDEX, torch.randn(N, 2)),
    aten.select_scatter.default: (torch.zeros(5, 2), torch.randn(N, 2), 0, 1),
    aten.fill.Tensor: (torch.zeros(5), torch.randn(N)),
}


@pytest.mark.parametrize("op", WRITES, ids=str)
def test_a_shared_target_with_per_sample_values(op):
    args = WRITES[op]
    batched = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and i > 0 and a.shape[:1] == (N,)]
    assert len(batched) == 1
    ctx = Context(N)
    lifted = tuple(wrap(ctx, a) if i in batched else a for i, a in enumerate(args))
    actual = _fallback.run(op, lifted, {}, N, "error")
    expected = torch.stack([op(*(a[j] if i in batched else a for i, a in enumerate(args))) for j in range(N)])
    torch.testing.assert_close(actual, expected)
