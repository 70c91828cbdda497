"""Linear algebra on matrices of any layout, and its outer derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from case import score
from per_sample import per_sample_grad
from tree_oracle import assert_close, loop

D = torch.float64
N = 6
W = torch.randn(4, 4, dtype=D, generator=torch.Generator().manual_seed(1))
X = torch.randn(N, 4, 4, dtype=D, generator=torch.Generator().manual_seed(2))
B = torch.randn(4, 3, dtype=D, generator=torch.Generator().manual_seed(3))

MATRICES = {
    "det": lambda a: torch.linalg.det(a),
    "slogdet": lambda a: torch.linalg.slogdet(a)[1],
    "solve": lambda a: torch.linalg.solve(a, B),
    "solve on the right": lambda a: torch.linalg.solve(a, B.t(), left=False),
    "inverse": torch.linalg.inv,
    "factors": lambda a: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), B),
}
LAYOUTS = {
    "in one piece": lambda w, x: w + x,
    "transposed": lambda w, x: (w + x).t(),
    "shared": lambda w, x: w * x[0, 0].exp(),
    "product": lambda w, x: x.t() @ w,
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "samples", [X, X.mT.contiguous().mT, X.permute(1, 2, 0).contiguous().permute(2, 0, 1)], ids=["rows", "columns", "last"]
)
def test_matrices_of_any_layout_and_their_outer_derivatives(name, layout, samples):
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return score(MATRICES[name](LAYOUTS[layout](w, x)))

    w = W.clone().requires_grad_()
    grads = per_sample_grad(fn)(w, samples)
    expected = torch.stack([torch.autograd.grad(fn(w, x), w, create_graph=True)[0] for x in samples])
    assert_close(grads, expected)
    # Where nobody differentiates again, torch's formulas go another way.
    assert_close(per_sample_grad(fn)(W, samples), expected.detach())
    weights = torch.arange(grads.numel(), dtype=D).cos().view_as(grads)
    found, wanted = (torch.autograd.grad((g * g * weights).sum(), w)[0] for g in (grads, expected))
    assert_close(found / wanted.abs().max(), wanted / wanted.abs().max())


@pytest.mark.parametrize("name", ["own", "shared", "least squares"])
def test_complex_matrices_that_torch_conjugates_lazily(name):
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(4, 3, dtype=torch.complex128, generator=generator)
    samples = torch.randn(N, 4, 3, dtype=torch.complex128, generator=generator)

    def fn(w: Tensor, x: Tensor) -> Tensor:
        if name == "least squares":
            return score(torch.linalg.lstsq(w, x).solution)
        return score(torch.linalg.pinv(w + x) if name == "own" else torch.linalg.pinv(w) * x.mH)

    assert_close(per_sample_grad(fn)(w, samples), loop(fn, (0,), (None, 0))(w, samples)[0])
