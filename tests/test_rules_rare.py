"""Rules that torch's first sample inputs do not reach, each against a loop of plain autograd, and what they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from case import score
from checked import check
from per_sample import RandomnessError, UnsupportedError, per_sample_grad

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

N = 3
INDEX = torch.tensor([[0, 3, 3], [4, -1, 0], [2, 2, -5]])
LENGTHS = torch.tensor([[2, 3], [1, 4], [3, 2]])
MASK = torch.tensor([[True, False, True, True], [False, True, True, False], [False] * 4])


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def cplx(*shape: int) -> Tensor:
    return torch.complex(real(*shape), real(*shape, 1).squeeze(-1))


def bag(w: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return F.embedding_bag(x.remainder(5), w, offsets.cumsum(0) - offsets, mode="max")


def ctc(p: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
    """Per-sample targets, padded, of per-sample lengths."""
    scores = (p * x).log_softmax(-1)
    return F.ctc_loss(scores, INDEX[:2].abs().clamp(min=1), torch.tensor([6, 6]), lengths.clamp(1, 3), reduction="none")


def ctc_of_one(p: Tensor, x: Tensor, targets: Tensor, length: Tensor) -> Tensor:
    """Without a batch axis: neither the targets nor the lengths have one."""
    return F.ctc_loss((p * x).log_softmax(-1), targets.abs().clamp(1, 4), length + 3, torch.tensor(3))


def pooled(p: Tensor, x: Tensor) -> Tensor:
    return F.adaptive_max_pool3d(p, (1, 2, 2)) * x


def index_reduced(p: Tensor, x: Tensor, i: Tensor) -> Tensor:
    return p.index_reduce(0, i.remainder(5), x, "amax") + p.index_reduce(0, torch.tensor([4, 1, 0]), x, "mean", include_self=False)


# name -> function of the parameter and one sample's tensors, the parameter, and every sample's tensors.
CASES: dict[str, tuple[Callable[..., Any], Tensor, tuple[Tensor, ...]]] = {
    "roll of a 0-dim sample": (lambda p, x: (p * x).roll(10), real(), (real(N),)),
    "shared input, gradients per sample: pool": (pooled, real(2, 3, 4, 5), (real(N, 2, 1, 2, 2),)),
    "shared input, gradients per sample: cdist": (lambda p, x: torch.cdist(p, p[:2].sin()) * x, real(5, 4), (real(N, 5, 2),)),
    "complex pinv of a shared matrix": (lambda p, x: torch.linalg.pinv(p) * x, cplx(4, 3), (real(N, 3, 4),)),
    "solve for a vector": (torch.linalg.solve, real(4, 4), (real(N, 4),)),
    "solve for a shared vector": (lambda p, x: torch.linalg.solve(x, p), real(4), (real(N, 4, 4),)),
    "ctc": (ctc, real(6, 2, 5), (real(N, 6, 2, 5), LENGTHS)),
    "ctc without a batch axis": (ctc_of_one, real(6, 5), (real(N, 6, 5), INDEX, LENGTHS[:, 0])),
    "embedding bag, maximum": (bag, real(5, 4), (torch.arange(15).reshape(N, 5) * 7, LENGTHS)),
    "masked scatter": (lambda p, m, x: p.masked_scatter(m, x), real(2, 4), (MASK, real(N, 7))),
    "masked scatter in place": (lambda p, m, x: x.clone().masked_scatter_(m, p), real(7), (MASK, real(N, 2, 4))),
    "take": (lambda p, i: p.take(i), real(5), (INDEX,)),
    "put": (lambda p, i, x: p.put(i, x, accumulate=True), real(5), (INDEX, real(N, 3))),
    "index_reduce": (index_reduced, real(5, 2), (real(N, 3, 2), INDEX)),
    "segment_reduce": (lambda p, x, k: torch.segment_reduce(p * x, "max", lengths=k), real(5, 2), (real(N, 5, 2), LENGTHS)),
    "renorm": (lambda p, x: (p * x).renorm(2, 1, 0.5), real(4, 5), (real(N, 4, 5),)),
    "a slice of a product, in place": (lambda p, x: torch.linalg.householder_product(p, x), real(5, 3), (real(N, 3),)),
}


@pytest.mark.filterwarnings("ignore:index_reduce\\(\\) is in beta", "ignore:The reduce argument of torch.segment_reduce")
@pytest.mark.parametrize("name", CASES)
def test_against_a_loop(name: str) -> None:
    fn, param, samples = CASES[name]
    check(lambda params, *sample: score(fn(params["p"], *sample)), {"p": param}, *samples)


def test_an_in_place_op_that_would_resize_its_target_is_refused() -> None:
    """Torch makes a matrix of the target here."""
    factors = real(2, 3, 4), real(2, 4, 5)
    assert torch.ones(1, dtype=torch.float64).addbmm_(*factors).shape == (3, 5)
    with pytest.raises(UnsupportedError, match="shape of its target"):
        per_sample_grad(lambda p, x: (p * x).clone().addbmm_(*factors).sum())(real(1), real(N, 1))


@pytest.mark.parametrize("fn", [lambda p, i: p.take(i), lambda p, i: p.put(i, p[:1])])
@pytest.mark.parametrize("wrong", [5, -6])
def test_an_index_out_of_range_reaches_no_other_sample(fn: Callable[..., Tensor], wrong: int) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        per_sample_grad(lambda p, i: fn(p, i).sum(), in_dims=0)(real(N, 5), torch.tensor([[0], [wrong], [1]]))


def test_masked_scatter_from_too_few_elements_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        per_sample_grad(lambda p, m: p.masked_scatter(m, p[:2]).sum())(real(4), MASK)


@pytest.mark.parametrize("inplace", [False, True])
def test_random_slopes(inplace: bool) -> None:
    """The gradient is the slope that was drawn."""

    def loss(p: Tensor, x: Tensor) -> Tensor:
        return F.rrelu(p * x, 0.2, 0.4, training=True, inplace=inplace).sum()

    p, x = torch.ones(5), torch.tensor([-1.0, 1.0, -1.0, -1.0, -1.0]).expand(N, 5)
    with pytest.raises(RandomnessError):
        per_sample_grad(loss)(p, x)
    same = per_sample_grad(loss, randomness="same")(p, x)
    different = per_sample_grad(loss, randomness="different")(p, x)
    for slopes in (same, different):
        assert (slopes[:, 1] == 1).all()
        assert ((-slopes[:, 2:] >= 0.2) & (-slopes[:, 2:] <= 0.4)).all()
    assert (same == same[:1]).all()
    assert (different[0, 2:] != different[1, 2:]).all()


def test_strides_that_would_read_other_samples_memory_are_refused() -> None:
    """The sample axis is the innermost one: the strides of a contiguous sample lead to its neighbours."""
    x = real(4, N).T
    assert x.stride() == (1, N)

    def windows(p: Tensor, x: Tensor, step: int) -> Tensor:
        return score(p * x.as_strided((2, 3), (step, step)))

    with pytest.raises(UnsupportedError, match="other samples' memory"):
        per_sample_grad(lambda p, x: windows(p, x, 1))(real(3), x)
    with pytest.raises(UnsupportedError, match="other samples' memory"):
        per_sample_grad(lambda p, x: windows(p, x, 2 * N))(real(3), x)
    found = per_sample_grad(lambda p, x: windows(p, x, N))(real(3), x)
    torch.testing.assert_close(found, per_sample_grad(lambda p, x: windows(p, x, 1))(real(3), x.contiguous()))


def test_fractional_pooling_reads_the_first_rows_of_its_random_numbers() -> None:
    numbers = torch.rand(4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def pooled(p: Tensor, x: Tensor) -> Tensor:
        return F.fractional_max_pool2d(p * x, 2, 3, _random_samples=numbers)

    check(lambda params, x: score(pooled(params["p"], x)), {"p": real(2, 7, 8)}, real(N, 2, 7, 8))
