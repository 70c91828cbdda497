"""Custom autograd functions under ``torch.compile``: their own backward counts there, too, or they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from per_sample import UnsupportedError, clipped_grad, functional, per_sample_grad, per_sample_grad_norm

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo and inductor warn about themselves
N, D = 5, torch.float64


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Product(torch.autograd.Function):
    """What it saves comes back, and its backward is no derivative."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return 3 * g @ b.T, 2 * torch.outer(a, g)


class Scaled(torch.autograd.Function):
    """Keeps tensors by other means."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
        ctx.x, ctx.k = x, k
        return x.tanh() * k

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.k * (1 - ctx.x.tanh() ** 2) * 3.0, None


class Apart(torch.autograd.Function):
    """Of the newer form."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.tanh(), (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y**2) * 2.0


LOSSES = {
    "straight through": lambda w, x: ((Straight.apply(x @ w) + w.sum(0)) ** 2).sum(),
    "of a parameter alone": lambda w, x: (x @ Straight.apply(w)).square().sum() + w.sum(),
    "saved": lambda w, x: Product.apply(x, w).sin().sum(),
    "kept": lambda w, x: Scaled.apply(x @ w, 1.5).sum(),
    "newer form": lambda w, x: (Apart.apply(x @ w)[0] * Apart.apply(x @ w)[1]).sum(),
}
W, X = torch.randn(3, 4, dtype=D), torch.randn(N, 3, dtype=D)


def by_loop(loss: Any) -> Tensor:
    w = W.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(loss(w, x), w)[0] for x in X])


@pytest.mark.parametrize("grad_mode", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_backward_of_a_custom_function_counts(name: str, grad_mode: bool) -> None:
    loss, expected = LOSSES[name], by_loop(LOSSES[name])
    norms = expected.flatten(1).norm(dim=1)
    bound = float(norms.median())
    with torch.set_grad_enabled(grad_mode):
        compiled = torch.compile(lambda w, x: per_sample_grad(loss)(w, x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(W, X), expected)
        found = torch.compile(lambda w, x: per_sample_grad_norm(loss)(w, x), fullgraph=True, backend="aot_eager")(W, X)
        torch.testing.assert_close(found, norms)
        found = torch.compile(lambda w, x: clipped_grad(loss, bound, chunk_size=2)(w, x), fullgraph=True, backend="aot_eager")(W, X)
        torch.testing.assert_close(found, torch.einsum("n,nij->ij", (bound / norms).clamp(max=1), expected))


def test_by_inductor() -> None:
    compiled = torch.compile(lambda w, x: per_sample_grad(LOSSES["kept"])(w, x), fullgraph=True)
    torch.testing.assert_close(compiled(W, X), by_loop(LOSSES["kept"]))


def test_in_a_module() -> None:
    class Quantised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, Straight.apply(self.weight), self.bias)

    loss = functional(nn.Sequential(Quantised(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.functional.cross_entropy)
    x, y = torch.randn(N, 3), torch.tensor([0, 1, 1, 0, 1])
    compiled = torch.compile(lambda p, x, y: per_sample_grad(loss)(p, x, y), fullgraph=True, backend="aot_eager")
    grads = compiled(loss.params, x, y)
    assert grads["0.weight"].any()
    torch.testing.assert_close(grads, per_sample_grad(loss)(loss.params, x, y))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_results_require_grad_where_the_arguments_do(requires_grad: bool) -> None:
    """As dynamo sees it, who then looks at what is made of them: the leaves of the transform's own are not the caller's."""
    seen = []

    def step(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
        grads = per_sample_grad(lambda w, x: (x @ w * c).sin().sum(), has_aux=False)(w, x)
        seen.append(grads.requires_grad)
        return grads * 2

    for at in range(3):
        seen.clear()
        torch._dynamo.reset()
        args = [t.clone().requires_grad_(requires_grad and i == at) for i, t in enumerate((W, X, torch.ones(4, dtype=D)))]
        out = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
        assert seen == [requires_grad]
        assert out.requires_grad is requires_grad
        out.detach_().mul_(2)


def test_parameters_require_grad_inside() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w).sum() * (2 if w.requires_grad and not x.requires_grad else 1)

    for transform in (per_sample_grad(loss), torch.compile(per_sample_grad(loss), fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(transform(W, X), 2 * X[:, :, None].expand(N, 3, 4))


def taken_as_data(w: Tensor, x: Tensor) -> Tensor:
    return ((x @ w).tanh().data * (x @ w)).sum() + (w**2).sum()


def of_lists_in_place(w: Tensor, x: Tensor) -> Tensor:
    h = (x @ w).view(2, 2)
    torch._foreach_mul_([h], 2.0)
    return h.tanh().sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("loss", [taken_as_data, of_lists_in_place], ids=lambda loss: loss.__name__)
def test_what_only_a_derivative_sees(loss: Any, backend: str) -> None:
    compiled = torch.compile(lambda w, x: per_sample_grad(loss)(w, x), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(W, X), by_loop(loss))
    w, v = (W.clone().requires_grad_() for _ in range(2))
    rows = torch.stack([torch.autograd.grad(loss(v, x), v, create_graph=True)[0] for x in X])
    expected = torch.autograd.grad(rows.square().sum(), v)
    torch.testing.assert_close(torch.autograd.grad(compiled(w, X).square().sum(), w), expected)


def test_dropout_of_what_the_samples_share() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (x @ nn.functional.dropout(w, 0.5)).sum()

    compiled = torch.compile(lambda w, x: per_sample_grad(loss, randomness="different")(w, x), fullgraph=True, backend="aot_eager")
    found = compiled(W, X)
    dropped = found == 0
    torch.testing.assert_close(found, torch.where(dropped, 0, 2 * X[:, :, None]))
    assert dropped.any()
    assert not torch.equal(dropped[0], dropped[1])

    def squared(w: Tensor, x: Tensor) -> Tensor:
        return (x @ nn.functional.dropout(w, 0.5)).square().sum() / 8

    # One number of each column at most is left of this x: the derivative of the gradient is that of `x^2 w^2` where it was not dropped.
    w, x = W.clone().requires_grad_(), torch.eye(3, dtype=D)
    found = torch.compile(lambda w, x: per_sample_grad(squared, randomness="different")(w, x), fullgraph=True, backend="aot_eager")(w, x)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), w)[0], (found != 0).to(D).sum(0))


BELOW = {
    "grad": lambda w, x: (grad(lambda q: Scaled.apply(q @ w, 1.5).sum())(x) ** 2).sum(),
    "vmap": lambda w, x: vmap(lambda c: Apart.apply((c * x).sum())[0], 1)(w).sum(),
}


@pytest.mark.parametrize("name", BELOW)
def test_below_a_transform_of_the_programs_own_it_is_refused(name: str) -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"would ignore the `backward` of `(Scaled|Apart)`"):
        torch.compile(lambda w, x: per_sample_grad(BELOW[name])(w, x), fullgraph=True, backend="aot_eager")(W, X)


def test_where_the_gradients_are_differentiated_it_is_refused() -> None:
    compiled = torch.compile(lambda w, x: per_sample_grad(LOSSES["kept"])(w, x), fullgraph=True, backend="eager")
    with pytest.raises(UnsupportedError, match="being differentiated once more"):
        compiled(W.clone().requires_grad_(), X)
