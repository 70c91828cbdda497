"""``torch.compile(fullgraph=True)`` of whole training steps, for a small twin of each kind of network that the benchmark times."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

from per_sample import clipped_grad, per_sample_grad, per_sample_grad_norm, weighted_grad
from workloads import WORKLOADS

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo and inductor warn about themselves

BOUND = 0.7


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def gradients(loss, keep, params, x, y):
    return {name: grad.sum(0) for name, grad in per_sample_grad(loss, keep_batch_dim=keep)(params, x, y).items()}


def weighted(loss, keep, params, x, y):
    norms = per_sample_grad_norm(loss, keep_batch_dim=keep)(params, x, y)
    return weighted_grad(loss, 1 / norms, keep_batch_dim=keep)(params, x, y)


def clipped(loss, keep, params, x, y):
    return clipped_grad(loss, BOUND, keep_batch_dim=keep)(params, x, y)


# What a sample's gradient counts in each sum, by its norm.
WEIGHT = {gradients: lambda norm: 1.0, weighted: lambda norm: 1 / norm, clipped: lambda norm: min(1.0, BOUND / norm)}


def momentum_step(loss, keep, quantity):
    """A step of SGD with momentum along a quantity."""

    def step(params, momentum, x, y):
        grads = quantity(loss, keep, params, x, y)
        momentum = {name: 0.9 * momentum[name] + grad / x.shape[0] for name, grad in grads.items()}
        return {name: p - 0.1 * momentum[name] for name, p in params.items()}, momentum

    return step


def by_loop(loss, keep, quantity, params, momentum, x, y):
    """The same step, from plain autograd on one sample after the other."""
    momentum = {name: 0.9 * m for name, m in momentum.items()}
    for i in range(x.shape[0]):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(loss(leaves, *((x[i : i + 1], y[i : i + 1]) if keep else (x[i], y[i]))), list(leaves.values()))
        norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
        for name, grad in zip(leaves, grads, strict=True):
            momentum[name] = momentum[name] + WEIGHT[quantity](norm) * grad / x.shape[0]
    return {name: p - 0.1 * momentum[name] for name, p in params.items()}, momentum


def training(workload, quantity):
    """The step, the step by a loop, and what it begins with."""
    loss, params = workload.build()
    momentum = {name: torch.ones_like(p) for name, p in params.items()}
    keep = workload.keep_batch_dim
    return momentum_step(loss, keep, quantity), lambda *args: by_loop(loss, keep, quantity, *args), (params, momentum)


def check_steps(workload, quantity, backend="aot_eager"):
    step, expected, state = training(workload, quantity)
    run = torch.compile(step, fullgraph=True, backend=backend)
    for stance in ("default", "fail_on_recompile"):
        batch = workload.data(5)
        with torch.compiler.set_stance(stance):
            found = run(*state, *batch)
        torch.testing.assert_close(found, expected(*state, *batch))
        state = found


# What takes long to compile is tried with one quantity.
ONE = {"resnet18-gn": gradients, "separable": clipped, "gpt": gradients, "gpt-tied": clipped, "long-transformer": clipped}


@pytest.mark.parametrize(
    ("quantity", "name"),
    [(q, name) for name in WORKLOADS if name != "lstm" for q in ((ONE[name],) if name in ONE else (gradients, clipped))],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_a_training_step_is_one_graph_for_every_batch_of_its_size(name, quantity):
    check_steps(WORKLOADS[name], quantity)


@pytest.mark.parametrize(("quantity", "name"), [(gradients, "mnist-cnn"), (clipped, "mlp")], ids=["mnist-cnn", "mlp"])
def test_generated_code(name, quantity):
    check_steps(WORKLOADS[name], quantity, backend="inductor")


@pytest.mark.parametrize(
    ("quantity", "name"),
    [(gradients, "convnet"), (weighted, "mlp"), (clipped, "embedding")],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_one_graph_for_batches_of_any_size(name, quantity):
    workload = WORKLOADS[name]
    step, expected, state = training(workload, quantity)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(step, fullgraph=True, backend=counter)
    for n in (5, 8, 13):
        batch = workload.data(n)
        for x in batch:
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(run(*state, *batch), expected(*state, *batch))
    assert counter.frame_count == 1


def test_python_numbers_in_several_subgraphs_of_dynamic_sizes():
    """Dynamo makes inputs of the graph of them, which all subgraphs read: here the norm's `eps`, and a closed-over number."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.GroupNorm(2, 6), torch.nn.Linear(6, 3)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    number = 2.0

    def loss(p, x, y):
        return number * F.cross_entropy(functional_call(net, p, (x,)), y)

    def step(p, x, y):
        return number * per_sample_grad_norm(loss, keep_batch_dim=True, chunk_size=5)(p, x, y)

    run = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for number in (3.0, 7.0):  # noqa: B007
        args = params, torch.randn(9, 6, dtype=torch.float64), torch.randint(3, (9,))
        torch.testing.assert_close(run(*args), step(*args))


def lstm_loss(params, x, y):
    """The function that ``nn.LSTM`` calls: dynamo refuses the module."""
    zeros = x.new_zeros(1, 1, 4)
    weights = [params[f"lstm.{kind}_l0"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    outputs, _, _ = torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, False, False, True)
    return F.cross_entropy(F.linear(outputs[:, -1], params["head.weight"], params["head.bias"]), y)


@pytest.mark.parametrize("quantity", [gradients, clipped])
def test_lstm(quantity):
    module_loss, params = WORKLOADS["lstm"].build()
    state = params, {name: torch.ones_like(p) for name, p in params.items()}
    step = momentum_step(lstm_loss, True, quantity)
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for stance in ("default", "fail_on_recompile"):
        x, y = torch.randn(5, 3, 3, dtype=torch.float64), torch.randint(6, (5,))
        with torch.compiler.set_stance(stance):
            found = run(*state, x, y)
        torch.testing.assert_close(found, by_loop(module_loss, True, quantity, *state, x, y))
