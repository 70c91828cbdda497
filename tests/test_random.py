"""Random ops draw the numbers that torch.vmap draws under the same seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from per_sample import RandomnessError, per_sample_grad, reference
from per_sample.testing import assert_matches_reference

W = torch.randn(2, 3)
X = torch.randn(4, 3)

DRAWS = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.4, inplace=True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "feature dropout": lambda x: F.dropout1d(x.view(1, 3, 1), 0.4).view(3),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn_like": lambda x: x + torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.5),
    "normal_": lambda x: x * torch.empty_like(x).normal_(),
    "randn": lambda x: x + torch.randn(3),
    "rand": lambda x: x * torch.rand(3),
    "randint": lambda x: x * torch.randint(5, (3,)),
    "randperm": lambda x: x[torch.randperm(3)],
    "normal": lambda x: x + torch.normal(0.0, 1.0, (3,)),
    "several": lambda x: F.dropout(x + torch.randn(3), 0.3) * torch.rand_like(x),
    "attention with dropout": lambda x: F.scaled_dot_product_attention(
        x.view(1, 1, 3, 1), x.view(1, 1, 3, 1), x.view(1, 1, 3, 1), dropout_p=0.3
    ).view(3),
}


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("name", DRAWS)
def test_same_numbers_as_vmap(name, randomness):
    draw = DRAWS[name]
    try:
        torch.vmap(draw, randomness=randomness)(X)
    except RuntimeError as err:
        pytest.skip(f"torch.vmap refuses: {err}")
    torch.manual_seed(0)
    assert_matches_reference(lambda w, x: (w @ draw(x)).square().sum(), W, X, randomness=randomness)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_chunks_draw_as_vmap_in_chunks(randomness):
    torch.manual_seed(0)
    fn = lambda w, x: (w @ F.dropout(x, 0.4)).square().sum()  # noqa: E731
    assert_matches_reference(fn, W, X, randomness=randomness, chunk_size=3)


def test_different_samples_differ_and_same_samples_agree():
    x = X[:1].expand(4, 3)
    fn = lambda w, x: (w @ F.dropout(x, 0.5)).sum()  # noqa: E731
    torch.manual_seed(0)
    different = per_sample_grad(fn, randomness="different")(W, x)
    same = per_sample_grad(fn, randomness="same")(W, x)
    assert not torch.equal(different, different[:1].expand_as(different))
    torch.testing.assert_close(same, same[:1].expand_as(same))


def test_no_random_number_is_drawn_twice_when_the_run_begins_again():
    """A closed-over tensor that requires grad is noticed after the dropout has drawn its numbers."""
    c = torch.randn(3, requires_grad=True)

    def run(psg):
        torch.manual_seed(0)
        out = psg(lambda w, x: (w @ F.dropout(x, 0.5)).sum() * (c * x).sum(), randomness="different")(W, X)
        return out, torch.autograd.grad(out.square().sum(), c)[0], torch.rand(1)

    torch.testing.assert_close(run(per_sample_grad), run(reference.per_sample_grad))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout_on_a_parameter_that_the_samples_share(randomness):
    torch.manual_seed(0)
    assert_matches_reference(lambda w, x: (F.dropout(w, 0.5) @ x).square().sum(), W, X, randomness=randomness)


DISTRIBUTIONS = {
    "normal": lambda x: torch.distributions.Normal(x, x.exp()).rsample(),
    "laplace": lambda x: torch.distributions.Laplace(x, torch.ones(3)).rsample(),
    "student": lambda x: torch.distributions.StudentT(torch.tensor(4.0), x).rsample(),
    "multivariate normal": lambda x: torch.distributions.MultivariateNormal(x, torch.eye(3)).rsample(),
    "init": lambda x: x * torch.nn.init.normal_(torch.empty(3)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_tensor_that_is_filled_inside_is_each_samples_own(name):
    """As in the distributions of torch, which make theirs from nothing; `torch.vmap` refuses that."""
    x = X[:1].expand(4, 3)
    loss = lambda w, x: (DISTRIBUTIONS[name](x * w)).square().sum()  # noqa: E731
    transformed = per_sample_grad(loss, randomness="different")
    torch.manual_seed(0)
    first = transformed(W[0], x)
    torch.manual_seed(0)
    assert torch.equal(transformed(W[0], x), first)
    assert len({tuple(row.tolist()) for row in first}) == 4
    same = per_sample_grad(loss, randomness="same")(W[0], x)
    torch.testing.assert_close(same, same[:1].expand(4, 3))


@pytest.mark.parametrize("draw", [lambda x: torch.distributions.Gamma(x.exp(), 1.0).rsample(), lambda x: torch.multinomial(x.exp(), 1)])
def test_draws_that_cannot_be_the_same_for_all_samples_are_refused(draw):
    with pytest.raises(RandomnessError, match="pass randomness='different'"):
        per_sample_grad(lambda w, x: (w * draw(x * w)).sum(), randomness="same")(W[0], X)


def test_noise_that_is_filled_inside_enters_the_gradient():
    """The gradient of ``(x w + e exp(x w))^2`` in terms of the ``e`` that was drawn."""
    x = X[:, 0]

    def loss(w, x):
        e = torch.empty(()).normal_()
        return (x * w + e * (x * w).exp()) ** 2, e

    w = torch.tensor(0.7)
    grads, e = per_sample_grad(loss, has_aux=True, randomness="different")(w, x)
    assert len(set(e.tolist())) == 4
    torch.testing.assert_close(grads, 2 * (x * w + e * (x * w).exp()) * (x + e * x * (x * w).exp()))


def test_numbers_drawn_into_a_shared_tensor_by_name_are_refused() -> None:
    out = torch.zeros(3)

    def fn(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (w * x * torch.normal(torch.zeros(3), torch.ones(3), out=out)).sum()

    with pytest.raises(RandomnessError):
        per_sample_grad(fn, randomness="different")(torch.ones(3), torch.ones(4, 3))
