"""``torch.compile(fullgraph=True)`` of every quantity, for batches of any size."""

from __future__ import annotations

import optree
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import per_sample
from programs import BY_NAME, real
from quantity_table import BY_NAME as QUANTITY
from quantity_table import middle

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo and inductor warn about themselves

MLP = BY_NAME["mlp"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("quantity", "of"),
    [
        *((name, "mlp") for name in ("variance", "gram", "projected, factored")),
        *(("map to a sum", "mlp"), ("clipped", "conv1d"), ("norm", "embedding, tied head")),
    ],
)
def test_one_graph_for_batches_of_any_size(quantity, of):
    program = BY_NAME[of]
    counter = CompileCounterWithBackend("aot_eager")
    transformed = QUANTITY[quantity].make(per_sample, program)
    # Something around it, as in a training step.
    run = torch.compile(lambda *args: transformed(*args), fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for n in (5, 7, 6):
        args = (*program.params, *program.samples(n))
        assert_same(run(*args), transformed(*args))
        frames.append(counter.frame_count)
    # Dynamo may begin the first compilation again, with the numbers that it has found to be constants.
    assert frames[1:] == frames[:-1]


@pytest.mark.parametrize("quantity", ["norm", "clipped", "clipped, low", "weights of norms"])
def test_a_graph_break_in_the_function_is_refused_by_name(quantity):
    def breaking(p, x, y):
        torch._dynamo.graph_break()
        return MLP.loss(p, x, y)

    transformed = {
        "norm": per_sample.per_sample_grad_norm(breaking),
        "clipped": per_sample.clipped_grad(breaking, 1.0),
        "clipped, low": per_sample.clipped_grad(breaking, 1.0, memory="low"),
        "weights of norms": per_sample.weighted_grad(breaking, lambda norms: 1 / norms),
    }[quantity]
    args = (*MLP.params, *MLP.samples(3))
    with pytest.raises(per_sample.DataDependentError, match="in one piece"):
        torch.compile(lambda *args: transformed(*args), backend="eager")(*args)


def assert_same(actual, expected):
    torch.testing.assert_close(optree.tree_leaves(actual), optree.tree_leaves(expected))
    assert optree.tree_structure(actual) == optree.tree_structure(expected)


def test_a_private_training_step():
    bound = middle(MLP)

    def step(p, x, y, noise):
        clipped = per_sample.clipped_grad(MLP.loss, bound, normalize_by=5.0)
        grads, norms = per_sample.clipped_grad(MLP.loss, bound, return_norms=True)(p, x, y)
        return {k: p[k] - grads[k] - noise[k] * clipped.sensitivity() for k in p}, norms

    noise = {k: real(*v.shape) for k, v in MLP.params[0].items()}
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*MLP.args, noise), step(*MLP.args, noise))


def test_weights_and_padding_are_inputs_of_the_graph():
    def step(p, x, y, weights, is_padding):
        summed = per_sample.weighted_grad(MLP.loss, weights)(p, x, y)
        clipped = per_sample.clipped_grad(MLP.loss, 1.5)(p, x, y, is_padding=is_padding)
        return summed, clipped

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for shift in (0, 1):  # other values, the same graph
        args = (*MLP.args, real(5), (torch.arange(5) + shift) % 3 == 1)
        torch.testing.assert_close(run(*args), step(*args))


def test_samples_that_are_not_finite_are_dropped_without_a_break():
    transformed = per_sample.clipped_grad(MLP.loss, middle(MLP))
    run = torch.compile(lambda *args: transformed(*args), fullgraph=True, backend="aot_eager")
    params, x, y = MLP.args
    x = x.clone()
    x[2] = torch.nan
    keep = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(run(params, x, y), transformed(params, x[keep], y[keep]))


@pytest.mark.parametrize("name", ["clipped, low"])
def test_chunks(name):
    transformed = QUANTITY[name].make(per_sample, MLP, chunk_size=2)
    run = torch.compile(lambda *args: transformed(*args), fullgraph=True, backend="aot_eager")
    assert_same(run(*MLP.args), transformed(*MLP.args))


def test_backward_through_a_compiled_quantity():
    transformed = QUANTITY["norm"].make(per_sample, MLP)
    run = torch.compile(lambda *args: transformed(*args), fullgraph=True, backend="aot_eager")

    def gradient(f):
        p = {k: v.clone().requires_grad_() for k, v in MLP.params[0].items()}
        return torch.autograd.grad(f(p, *MLP.args[1:]).square().sum(), list(p.values()))

    torch.testing.assert_close(gradient(run), gradient(transformed))
