"""Every quantity on every program: a loop of plain autograd, the fast way and the plain way agree."""

from __future__ import annotations

import optree
import pytest

import per_sample
import tree_oracle
from per_sample import reference
from programs import BY_NAME, PROGRAMS
from quantity_table import FEWER, QUANTITIES

# Quantities that come in the structure of the gradients.
_STRUCTURED = {"weighted", "second moment", "variance", "norm of leaves", "map to a sum"}
# The reference takes nothing but gradients, so that what matters is how they are passed and what they look like.
_DIFFERENT = [
    *("mixed", "cnn, keep_batch_dim", "without numbers", "complex and real"),
    *("frozen", "other order", "sample differentiated too", "own parameters"),
]


def _check(package, program, quantity):
    actual = quantity.make(package, program, **program.options)(*program.args)
    tree_oracle.assert_close(actual, quantity.expected(program))
    if quantity.name in _STRUCTURED:
        assert optree.tree_structure(actual, none_is_leaf=True) == optree.tree_structure(program.wanted, none_is_leaf=True)


@pytest.mark.parametrize("quantity", FEWER, ids=lambda q: q.name)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_as_a_loop(program, quantity):
    _check(per_sample, program, quantity)


@pytest.mark.parametrize("quantity", [quantity for quantity in QUANTITIES if quantity not in FEWER], ids=lambda q: q.name)
@pytest.mark.parametrize("program", [BY_NAME[name] for name in _DIFFERENT], ids=lambda p: p.name)
def test_more_as_a_loop(program, quantity):
    _check(per_sample, program, quantity)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda q: q.name)
@pytest.mark.parametrize("program", [BY_NAME[name] for name in _DIFFERENT], ids=lambda p: p.name)
def test_the_reference_as_a_loop(program, quantity):
    _check(reference, program, quantity)
