"""``torch.compile`` with ``fullgraph=True``: whole steps, no stale constants, no recompilation for new data of the same shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from per_sample import per_sample_grad, per_sample_grad_and_value

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo and inductor warn about themselves

scale = 2.0


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=g), torch.randn(n, 5, generator=g)


def params():
    g = torch.Generator().manual_seed(1)
    return {"w": torch.randn(5, 3, generator=g), "b": torch.randn(5, generator=g)}


def loss(p, x, y):
    return scale * ((F.linear(x, p["w"], p["b"]) - y) ** 2).sum()


def step(p, x, y):
    grads, values = per_sample_grad_and_value(loss)(p, x, y)
    norms = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()
    weights = (1 / norms).clamp(max=1.0)
    return {k: v - 0.1 * torch.einsum("n,n...->...", weights, grads[k]) for k, v in p.items()}, values.mean()


def compiled(fn, backend="aot_eager", **options):
    return torch.compile(fn, fullgraph=True, backend=backend, **options)


class ConvNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.norm = torch.nn.GroupNorm(2, 4)
        self.head = torch.nn.Linear(4 * 4 * 4, 10)

    def forward(self, x):
        return self.head(F.gelu(self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_whole_training_step(backend):
    net = ConvNet()

    def net_loss(p, x, y):
        return F.cross_entropy(torch.func.functional_call(net, p, (x,)), y)

    def net_step(p, x, y):
        grads = per_sample_grad(net_loss, keep_batch_dim=True)(p, x, y)
        return {k: v - 0.1 * grads[k].mean(0) for k, v in p.items()}

    p = {k: v.detach().clone() for k, v in net.named_parameters()}
    x, y = torch.randn(8, 1, 6, 6), torch.randint(10, (8,))
    torch.testing.assert_close(compiled(net_step, backend)(p, x, y), net_step(p, x, y))


@pytest.mark.parametrize("dynamic", [True, None])
def test_batch_sizes_do_not_recompile(dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(step, counter, dynamic=dynamic)
    for n in (4, 4, 5, 7, 9, 3):
        torch.testing.assert_close(run(params(), *data(n, seed=n)), step(params(), *data(n, seed=n)))
    assert counter.frame_count <= (1 if dynamic else 2)


def test_a_global_that_changes_is_seen(monkeypatch):
    run = compiled(step)
    torch.testing.assert_close(run(params(), *data(4)), step(params(), *data(4)))
    monkeypatch.setitem(globals(), "scale", 3.0)
    torch.testing.assert_close(run(params(), *data(4)), step(params(), *data(4)))


@pytest.mark.parametrize("values", [(2.0, 3.0), (torch.tensor(2.0), torch.tensor(3.0))], ids=["number", "tensor"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_closed_over_value_that_changes_is_seen(values, backend):
    s = values[0]

    def scaled(p, x, y):
        return s * loss(p, x, y)

    def plain(p, x, y):
        return per_sample_grad(scaled)(p, x, y)

    run = compiled(plain, backend)
    torch.testing.assert_close(run(params(), *data(4)), plain(params(), *data(4)))
    s = values[1]
    torch.testing.assert_close(run(params(), *data(4)), plain(params(), *data(4)))


def test_closing_over_a_value_of_the_graph():
    def plain(p, x, y):
        z = x.sum()
        return per_sample_grad(lambda q, a, b: loss(q, a, b) * z)(p, x, y)

    torch.testing.assert_close(compiled(plain)(params(), *data(4)), plain(params(), *data(4)))


def test_backward_through_a_compiled_step():
    def gradient(run):
        p = {k: v.requires_grad_() for k, v in params().items()}
        new, _ = run(p, *data(4))
        return torch.autograd.grad(sum(t.square().sum() for t in new.values()), list(p.values()))

    torch.testing.assert_close(gradient(compiled(step)), gradient(step))


def test_a_method_and_the_transform_itself():
    class Model:
        def loss(self, p, x, y):
            return loss(p, x, y)

        def step(self, p, x, y):
            return per_sample_grad(self.loss)(p, x, y)

    expected = per_sample_grad(loss)(params(), *data(4))
    torch.testing.assert_close(compiled(Model().step)(params(), *data(4)), expected)
    torch.testing.assert_close(compiled(per_sample_grad(loss))(params(), *data(4)), expected)


def test_random_ops_draw_what_eager_draws():
    def dropped(p, x, y):
        return F.dropout(F.linear(x, p["w"], p["b"]), 0.5).sum() + 0 * y.sum()

    def plain(p, x, y):
        return per_sample_grad(dropped, randomness="different")(p, x, y)

    torch.manual_seed(0)
    actual = compiled(plain)(params(), *data(4))
    torch.manual_seed(0)
    torch.testing.assert_close(actual, plain(params(), *data(4)))


def test_keyword_arguments_aux_chunks_and_several_argnums():
    def with_aux(p, c, x, y, *, s):
        return s * c * loss(p, x, y), {"sum": x.sum()}

    def plain(p, c, x, y, s):
        return per_sample_grad_and_value(with_aux, argnums=(0, 1), has_aux=True, chunk_size=2)(p, c, x, y, s=s)

    arguments = (params(), torch.tensor(1.5), *data(5), torch.tensor(2.0))
    torch.testing.assert_close(compiled(plain)(*arguments), plain(*arguments))


@pytest.mark.parametrize("keep_batch_dim", [False, True])
def test_other_axes_and_a_batched_parameter(keep_batch_dim):
    def fn(p, x, y):
        return loss({k: v.squeeze(0) if keep_batch_dim and k == "b" else v for k, v in p.items()}, x, y)

    def plain(p, x, y):
        return per_sample_grad(fn, 0, ({"w": None, "b": 1}, 1, -1), keep_batch_dim=keep_batch_dim)(p, x, y)

    x, y = data(4)
    p = {"w": params()["w"], "b": torch.stack([params()["b"] * i for i in range(4)], 1)}
    actual = compiled(plain)(p, x.T.contiguous(), y.T.contiguous())
    torch.testing.assert_close(actual, plain(p, x.T.contiguous(), y.T.contiguous()))
    assert {k: tuple(v.shape) for k, v in actual.items()} == {"w": (4, 5, 3), "b": (4, 5)}


def test_an_empty_batch():
    torch.testing.assert_close(compiled(step)(params(), *data(0))[0], params())


def test_inside_itself():
    def outer(p, x, y):
        inner = per_sample_grad(lambda q, s: loss(q, x * s, y))(p, torch.arange(1.0, 4.0))
        return sum((t**2).sum() for t in inner.values())

    def plain(p, x, y):
        return per_sample_grad(outer)(p, x, y)

    torch.testing.assert_close(compiled(plain)(params(), *data(4)), plain(params(), *data(4)))


def test_arguments_that_are_views_of_one_tensor():
    """Tokens and the next ones; parameters cut from one vector."""
    flat, tokens = torch.randn(40, dtype=torch.float64), torch.randint(5, (4, 8))
    params = {"embedding": flat[:20].view(5, 4), "out": flat[20:].view(5, 4)}

    def of_tokens(params, x, y):
        return F.cross_entropy(F.embedding(x, params["embedding"]) @ params["out"].T, y)

    batch = tokens[:, :-1], tokens[:, 1:]
    step = torch.compile(lambda p, x, y: per_sample_grad(of_tokens)(p, x, y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(params, *batch), per_sample_grad(of_tokens)(params, *batch))


@pytest.mark.parametrize(
    "options",
    [{"in_dims": (None, 1, -1)}, {"in_dims": (0, 1, -1)}, {"in_dims": (None, 1, -1), "argnums": 1}],
    ids=["shared", "own", "argnums"],
)
def test_numbers_of_axes_where_all_numbers_are_left_open(options):
    def of_axes(w, x, y):
        return ((w * x).sum() * y).sin().sum()

    w = torch.randn(4, 3, dtype=torch.float64)
    args = w if options["in_dims"][0] == 0 else w[0], torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    found = torch.compile(per_sample_grad(of_axes, **options), fullgraph=True, dynamic=True, backend="aot_eager")(*args)
    torch.testing.assert_close(found, per_sample_grad(of_axes, **options)(*args))
