"""What the compiled program holds: no more products of matrices and convolutions than one plain batched gradient."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from per_sample import clipped_grad, per_sample_grad, per_sample_grad_norm
from workloads import WORKLOADS

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo warns about itself

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default, aten.convolution_backward.default}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def compiled_ops(fn, *args):
    """The ops of the one graph that reaches the compiler's backend."""
    graphs = []
    torch.compile(fn, fullgraph=True, backend=aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph))(*args)
    (graph,) = graphs
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def products(ops):
    """How many products there are, without those with vectors, such as a bias's weighted sum."""
    return sum(node.target in PRODUCTS and 1 not in _shape(node)[-2:] for node in ops)


def _shape(node):
    value = node.meta["val"]
    return next(x for x in (value if isinstance(value, (tuple, list)) else (value,)) if x is not None).shape


def batched(loss):
    """One plain gradient of the whole batch."""
    return torch.func.grad(lambda params, x, y: torch.func.vmap(loss, (None, 0, 0))(params, x, y).sum())


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        *((t, name) for t in (per_sample_grad, per_sample_grad_norm, clipped_grad) for name in ("mlp", "mnist-cnn")),
        (per_sample_grad, "gpt"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_no_more_products_than_a_plain_gradient(name, transform):
    workload = WORKLOADS[name]
    loss, params = workload.build()
    args = params, *workload.data(5)
    transformed = transform(loss, *((1.0,) if transform is clipped_grad else ()))
    ops = compiled_ops(lambda *args: transformed(*args), *args)
    assert not [node for node in ops if "per_sample" in str(node.target)]
    # A clipped sum of convolutions may need each gradient, and then their sum.
    # The two gradients of a plain convolution are one op.
    convolutions = 1 if (name, transform) == ("mnist-cnn", clipped_grad) else 0
    assert products(ops) <= products(compiled_ops(batched(loss), *args)) + convolutions


@pytest.mark.parametrize(("transform", "count"), [(per_sample_grad, 5), (per_sample_grad_norm, 5), (clipped_grad, 8)])
def test_layers_of_one_position(transform, count):
    """Three layers forward and two back; a gradient of one position is no product, and a clipped sum is one for each layer."""
    loss, params = WORKLOADS["mlp"].build()
    transformed = transform(loss, *((1.0,) if transform is clipped_grad else ()))
    assert products(compiled_ops(lambda *args: transformed(*args), params, *WORKLOADS["mlp"].data(5))) == count
