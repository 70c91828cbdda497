"""The example of differentially private training: its noise, its sampling, its accounting."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from pathlib import Path

import dp_accounting
import optree
import pytest
import torch
from scipy.stats import binom, kstest, norm

from test_examples import EXAMPLES, PNG, run_example


def load_example():
    spec = importlib.util.spec_from_file_location("dp_sgd", EXAMPLES / "dp_sgd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


class Nobody(example.Seeded):
    """A source that draws empty batches."""

    def uniform(self, *shape):
        return torch.ones(shape, dtype=torch.float64)


def seeded(seed=0):
    return example.Seeded(torch.Generator().manual_seed(seed))


def sources():
    return [pytest.param(seeded(), id="seeded"), pytest.param(example.Secure(), id="secure")]


def setting(n=90):
    generator = torch.Generator().manual_seed(3)
    data, _ = example.load(generator)
    return example.init(generator), example.Data(data.images[:n], data.labels[:n])


def steps(count, recipe, source, compiled=False, n=90):
    params, data = setting(n)
    return list(itertools.islice(example.train(params, data, recipe, source, compiled), count))


def flat(tree):
    return torch.cat([x.flatten() for x in optree.tree_leaves(tree)]).double()


# A bound of 4, a rate of 1/8 of 90 samples, a noise multiplier of 3 and a learning rate of 2.
RECIPE = example.Recipe(rate=1 / 8, max_norm=4.0, learning_rate=2.0, noise_multiplier=3.0)
STD = 3.0 * 4.0 / (90 / 8)


def test_an_empty_batch_moves_the_parameters_by_noise_of_the_sensitivity_alone():
    start, _ = setting()
    (after,) = steps(1, RECIPE, Nobody(torch.Generator().manual_seed(0)))
    noise = (flat(after) - flat(start)) / -RECIPE.learning_rate
    assert len(noise) > 6000
    assert kstest((noise / STD).numpy(), norm.cdf).pvalue > 1e-3
    assert noise.std().item() == pytest.approx(STD, rel=0.05)


def test_a_step_is_the_clipped_sum_of_the_batch_and_that_noise():
    params, data = setting()
    source = seeded()
    index = example.poisson_sample(90, RECIPE.rate, source)
    total = torch.zeros_like(flat(params))
    for i in index.tolist():  # a loop of plain autograd
        leaves = optree.tree_map(lambda p: p.detach().requires_grad_(), params)
        example.loss(leaves, data.images[i], data.labels[i]).backward()
        g = flat(optree.tree_map(lambda p: p.grad, leaves))
        total += g * min(1.0, RECIPE.max_norm / g.norm().item())
    noise = torch.cat([source.normal(*p.shape).flatten() for p in optree.tree_leaves(params)])
    expected = flat(params) - RECIPE.learning_rate * (total / (90 / 8) + STD * noise)
    (after,) = steps(1, RECIPE, seeded())
    torch.testing.assert_close(flat(after), expected, rtol=1e-5, atol=1e-5)


def test_the_noise_is_scaled_by_the_sensitivity_that_clipping_promises():
    clipped = example.clipped_grad(example.loss, RECIPE.max_norm, normalize_by=RECIPE.rate * 90)
    assert RECIPE.noise_multiplier * clipped.sensitivity() == pytest.approx(STD)


def test_a_seed_reproduces_and_another_does_not():
    first, second, other = (flat(steps(3, RECIPE, seeded(seed))[-1]) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)


@pytest.mark.filterwarnings("ignore")  # dynamo warns about itself
def test_padded_and_compiled_steps_equal_plain_ones(monkeypatch):
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: plain(fn, backend="aot_eager", **options))
    compiled, eager = (steps(3, RECIPE, seeded(), compiled) for compiled in (True, False))
    torch.testing.assert_close(flat(compiled[-1]), flat(eager[-1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "size"), [(0, 4), (1, 4), (4, 4), (5, 8)])
def test_padding(length, size):
    filled, is_padding = example.padded(torch.arange(10, 10 + length), 4)
    assert len(filled) == len(is_padding) == size
    assert filled[~is_padding].tolist() == list(range(10, 10 + length))


@pytest.mark.parametrize("source", sources())
def test_poisson_sampling_takes_each_sample_with_the_rate_independently(source):
    n, rate, rounds = 60, 0.3, 2000
    taken = torch.zeros(rounds, n)
    for row in taken:
        row[example.poisson_sample(n, rate, source)] = 1
    # Standard errors: the secure source has no seed, and chance shall fail this once in ten million runs.
    assert (taken.mean(0) - rate).abs().max() < 6.5 * (rate * (1 - rate) / rounds) ** 0.5
    assert abs(taken.mean().item() - rate) < 6.5 * (rate * (1 - rate) / (rounds * n)) ** 0.5
    assert (torch.corrcoef(taken.T) - torch.eye(n)).abs().max() < 6.5 / rounds**0.5
    sizes = taken.sum(1)
    assert sizes.var().item() == pytest.approx(binom(n, rate).var(), rel=0.2)


@pytest.mark.parametrize("source", sources())
def test_the_sources_draw_from_their_distributions(source):
    for _ in range(2):
        assert kstest(source.uniform(20_000).numpy(), "uniform").pvalue > 1e-7
        assert kstest(source.normal(100, 200).flatten().numpy(), norm.cdf).pvalue > 1e-7
    drawn = source.normal(200_000)
    assert drawn.std().item() == pytest.approx(1, rel=6.5 / (2 * len(drawn)) ** 0.5)
    assert source.normal(3, 4).shape == (3, 4)
    assert source.normal().shape == ()
    assert source.normal(0, 2).shape == (0, 2)
    assert source.uniform(0).dtype == source.normal(1).dtype == torch.float64
    assert not torch.equal(source.normal(5), source.normal(5))


# --- the accountant


def exact_delta(epsilon: float, mu: float) -> float:
    """Of a Gaussian mechanism (Balle & Wang, 2018)."""
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(("noise", "count"), [(2.0, 1), (5.0, 30)])
def test_epsilon_without_sampling_is_the_closed_form(noise, count):
    epsilon = example.epsilon(noise, 1.0, count, 1e-4)
    assert exact_delta(epsilon, count**0.5 / noise) == pytest.approx(1e-4, rel=0.02)


def test_epsilon_of_many_steps_agrees_with_a_simulation_of_the_privacy_loss():
    noise, rate, count, delta = 2.5, 1 / 8, 60, 1e-2
    generator = torch.Generator().manual_seed(0)
    runs = 200_000
    for_added, for_removed = torch.zeros(2, runs, dtype=torch.float64)
    for _ in range(count):
        x = torch.randn(runs, generator=generator, dtype=torch.float64) * noise
        # The log of the odds that a sample may be in the batch, at x.
        for_added -= torch.log1p(rate * torch.expm1((2 * x - 1) / (2 * noise**2)))
        shifted = x + (torch.rand(runs, generator=generator) < rate)
        for_removed += torch.log1p(rate * torch.expm1((2 * shifted - 1) / (2 * noise**2)))
    epsilon = example.epsilon(noise, rate, count, delta)
    deltas = [(1 - (epsilon - loss).exp()).clamp(min=0).mean().item() for loss in (for_added, for_removed)]
    assert max(deltas) == pytest.approx(delta, rel=0.05)


def test_epsilon_is_at_most_that_of_renyi_accounting_and_close_to_it():
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(1 / 8, dp_accounting.GaussianDpEvent(2.5)), 240)
    renyi = dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-4)
    fine = dp_accounting.pld.PLDAccountant().compose(event).get_epsilon(1e-4)
    assert fine <= example.epsilon(2.5, 1 / 8, 240, 1e-4) <= 1.01 * fine
    assert 0.8 * renyi < fine < renyi


def test_calibration_spends_the_budget_and_no_more():
    multiplier = example.calibrate(3.0, 1 / 8, 240, 1e-4)
    assert 2.99 < example.epsilon(multiplier, 1 / 8, 240, 1e-4) <= 3.0


# --- the program


def test_it_runs_and_says_what_it_spent(tmp_path: Path):
    picture = tmp_path / "new folder" / "dp_sgd.png"
    done = run_example("dp_sgd.py", "--epochs", "3", "--epsilon", "8", "--secure", "--out", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"epoch +(\d+) +epsilon ([\d.]+) +test accuracy ([\d.]+)% +without privacy ([\d.]+)%", done.stdout)
    assert [int(line[0]) for line in lines] == [1, 2, 3], done.stdout
    spent = [float(line[1]) for line in lines]
    assert spent == sorted(spent)
    assert 7.9 <= spent[-1] <= 8.0
    # By chance it would be 10 %; three epochs reach about 75 % and 90 %.
    assert float(lines[-1][2]) > 40
    assert float(lines[-1][3]) > 70
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize("options", [("--epochs", "0"), ("--epsilon", "0"), ("--delta", "1")])
def test_it_refuses_bad_options(options, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dp_sgd.py", *options])
    with pytest.raises(SystemExit, match="2"):
        example.parse()
    assert "--epsilon positive" in capsys.readouterr().err
