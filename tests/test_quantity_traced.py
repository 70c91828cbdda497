"""Every quantity traced with sizes that are not known, as a compiler does: one program for any number of samples."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from factor_cases import direction_for, made, with_operands
from per_sample.quantities.dot import dot
from per_sample.quantities.gram import gram
from per_sample.quantities.moments import moments, square_sum
from per_sample.quantities.precision import operands
from per_sample.quantities.project import project
from per_sample.quantities.projectors import FactoredProjector, GaussianProjector, SparseProjector
from per_sample.quantities.weighted_sum import weighted_sum

QUANTITIES = {
    "weighted_sum": lambda factor, w, v: weighted_sum(factor, w, functional=True),
    "dot": lambda factor, w, v: dot(factor, v, functional=True),
    "moments": lambda factor, w, v: (square_sum(factor, functional=True), *moments(factor, functional=True)),
    "gram": lambda factor, w, v: gram(factor, factor, functional=True),
    "gaussian": lambda factor, w, v: project(factor, GaussianProjector(3), 0, functional=True),
    "sparse": lambda factor, w, v: project(factor, SparseProjector(5), 0, functional=True),
    "factored": lambda factor, w, v: project(factor, FactoredProjector(2, 3), 0, functional=True),
}


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("case", ["outer-1", "outer", "conv-grouped"])
def test_one_program_for_any_number_of_samples(case, quantity):
    factor = made(case)

    def run(w, v, *x):
        return QUANTITIES[quantity](with_operands(factor, x), w, v)

    def arguments(n):
        return torch.linspace(-1, 1, n, dtype=torch.float64), direction_for(factor), *operands(made(case, n))

    program = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments(3))
    for n in (3, 7):
        assert_close(program(*arguments(n)), run(*arguments(n)))
