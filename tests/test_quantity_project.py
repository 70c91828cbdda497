"""Random projections: the projectors' numbers, and gradients projected by each of their forms against dense float64."""

from dataclasses import FrozenInstanceError
from math import prod, sqrt

import pytest
import torch
from torch.testing import assert_close

from factor_cases import CASES, WAYS, Largest, Made, dense, flat, made, with_operands
from per_sample import options
from per_sample.quantities.precision import operands
from per_sample.quantities.project import project
from per_sample.quantities.projectors import FactoredProjector, GaussianProjector, RademacherProjector, SparseProjector

PROJECTORS = [GaussianProjector(5), RademacherProjector(67, seed=3), SparseProjector(11, nonzeros=3), FactoredProjector(2, 3, seed=-1)]
KINDS = [lambda seed: GaussianProjector(12, seed), lambda seed: RademacherProjector(12, seed), lambda seed: SparseProjector(12, seed)]
KINDS.append(lambda seed: FactoredProjector(3, 4, seed))


def expected(factor, projector, leaf):
    grads = dense(factor)
    shape = (*factor.shape, 2) if grads.is_complex() else factor.shape
    matrix = projector.matrix(shape, leaf, dtype=torch.float64)
    assert matrix.shape == (projector.k, prod(shape))
    return flat(torch.view_as_real(grads) if grads.is_complex() else grads) @ matrix.mT


@pytest.mark.parametrize(("n", "dtype", "functional", "scratch"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_projections(case, n, dtype, functional, scratch):
    factor = made(case, n, dtype)
    before = [x.clone() for x in operands(factor)]
    for projector in PROJECTORS:
        with options(scratch_bytes=max(scratch, 2**15)):
            found = project(factor, projector, 2, functional=functional)
        assert_close(found, expected(factor, projector, 2))
    assert_close(operands(factor), before, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_summed_in_single(case):
    factor = made(case, 4, torch.bfloat16)
    for projector in PROJECTORS:
        found = project(factor, projector, 0)
        assert found.dtype == torch.float32
        assert_close(found.double(), expected(factor, projector, 0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", ["dense", "outer", "rows", "sum-tied", "conv-line"])
@pytest.mark.parametrize("projector", PROJECTORS, ids=str)
def test_derivatives_and_vmap(case, projector):
    factor = made(case, 2)
    tensors = [x.clone().requires_grad_() for x in operands(factor)]

    def run(*x):
        return project(with_operands(factor, x), projector, 1)

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    stacked = [torch.stack([x.detach(), 1 - x.detach()]) for x in tensors]
    found = torch.func.vmap(run)(*stacked)
    for number in range(2):
        assert_close(found[number], expected(with_operands(factor, [x[number] for x in stacked]), projector, 1))


@pytest.mark.parametrize("case", ["outer-wide", "conv-point", "rows-few"])
def test_factored_projections_form_no_gradient(case):
    factor = made(case, 64)
    with Largest() as largest:
        project(factor, FactoredProjector(3, 2), 0)
    assert largest.numel < 64 * flat(dense(factor)).shape[1]


@pytest.mark.parametrize("projector", PROJECTORS[:3], ids=str)
def test_blocks_keep_to_the_scratch_memory(projector):
    factor = Made(64).outer(60, 2, 50)
    with options(scratch_bytes=2**20), Largest() as largest:
        project(factor, projector, 0)
    assert largest.numel <= 2**20 / 8


def test_only_the_rows_that_occur_are_drawn():
    with Largest() as largest:
        project(Made(2).rows(10**6, 3, 4), GaussianProjector(6), 0)
    assert largest.numel < 1000


@pytest.mark.parametrize("projector", PROJECTORS, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 5)])
def test_any_range_of_columns_has_the_same_numbers(projector, shape):
    whole = projector.matrix(shape, 4, dtype=torch.float64)
    for start in range(prod(shape)):
        for size in (0, 1, prod(shape) - start):
            assert_close(projector.matrix(shape, 4, start, size, dtype=torch.float64), whole[:, start : start + size], rtol=0, atol=1e-14)
    assert_close(projector.matrix(shape, 4), whole.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projector", PROJECTORS, ids=str)
def test_leaves_and_seeds_have_their_own_numbers(projector):
    others = [projector.matrix((9, 8), 1), type(projector)(**{**vars(projector), "seed": 8}).matrix((9, 8), 0)]
    own = projector.matrix((9, 8), 0)
    assert torch.equal(own, type(projector)(**vars(projector)).matrix((9, 8), 0))
    for other in others:
        assert not torch.equal(own, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6,), (5, 4)], ids=str)
def test_inner_products_are_kept_in_the_mean(kind, shape):
    make, seeds = Made(1), 500
    g, h = make.normal(prod(shape)), make.normal(prod(shape))
    projected = torch.stack([kind(seed).matrix(shape, 1, dtype=torch.float64) @ torch.stack((g, h), 1) for seed in range(seeds)])
    products, squares = (projected[..., 0] * projected[..., 1]).sum(1), projected[..., 0].square().sum(1)
    for found, exact in ((products, g @ h), (squares, g @ g)):
        # Five standard errors: less than one in a million at random, and the seeds are fixed.
        assert abs(found.mean() - exact) < 5 * found.std() / sqrt(seeds)
    if not isinstance(kind(0), FactoredProjector):
        # The variance of independent entries; a Kronecker product's is larger.
        assert products.var() < 1.25 * (g @ g * (h @ h) + (g @ h) ** 2) / 12


def test_gaussian_entries_are_normal():
    x = GaussianProjector(33).matrix((3001,), 0, dtype=torch.float64).flatten().sort().values * sqrt(33)
    n = x.numel()
    distance = (torch.special.ndtr(x) - (torch.arange(n) + 0.5) / n).abs().max()
    # Kolmogorov and Smirnov: one in a thousand at random.
    assert distance < 1.95 / sqrt(n)
    assert abs((x**4).mean() - 3) < 5 * sqrt(96 / n)
    assert x.abs().max() < 6.8


@pytest.mark.parametrize("projector", [GaussianProjector(64), RademacherProjector(130), SparseProjector(64)], ids=str)
def test_entries_are_not_correlated(projector):
    entries = projector.matrix((4000,), 0, dtype=torch.float64) * sqrt(projector.k)
    n = entries.shape[1]
    rows = entries @ entries.mT / n
    limit = 5.5 / sqrt(n)
    assert (rows - rows.diag().diag()).abs().max() < limit * (4 if isinstance(projector, SparseProjector) else 1)
    assert entries.mean().abs() < 5 / sqrt(entries.numel())
    for shift in (1, 2, 7):
        assert (entries[:, shift:] * entries[:, :-shift]).mean().abs() < 5 / sqrt(entries.numel())


def test_signs_and_places_are_drawn_evenly():
    signs = RademacherProjector(100).matrix((1000,), 0) * 10
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert (signs.mean(1).abs() < 5 / sqrt(1000)).all()
    sparse = SparseProjector(10, nonzeros=3).matrix((6000,), 0)
    assert (sparse != 0).sum(0).unique().tolist() == [3]
    for block in ((0, 3), (3, 6), (6, 10)):
        counts = (sparse[slice(*block)] != 0).sum(1)
        size = block[1] - block[0]
        assert counts.sum() == 6000
        assert ((counts - 6000 / size).abs() < 5 * sqrt(6000 / size)).all()


@pytest.mark.parametrize("make", [
    lambda: GaussianProjector(0),
    lambda: GaussianProjector(2.0),
    lambda: GaussianProjector(True),
    lambda: RademacherProjector(-1),
    lambda: RademacherProjector(3, seed=0.5),
    lambda: SparseProjector(3),
    lambda: SparseProjector(3, nonzeros=0),
    lambda: FactoredProjector(0, 2),
    lambda: FactoredProjector(2, None),
])  # fmt: skip
def test_wrong_numbers_are_refused(make):
    with pytest.raises(ValueError, match="Projector"):
        make()


def test_projectors_are_values():
    assert GaussianProjector(3) == GaussianProjector(3, seed=0) != GaussianProjector(3, seed=1)
    assert hash(FactoredProjector(2, 3)) == hash(FactoredProjector(2, 3))
    assert FactoredProjector(2, 3).k == 6
    with pytest.raises(FrozenInstanceError):
        GaussianProjector(3).k = 4
