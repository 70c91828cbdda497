"""Train a digit classifier that gives away little about any one of its training digits (DP-SGD).

Every sample's gradient is clipped to length 1, noise is added to the sum, and an accountant turns the two into a
guarantee: whatever is done with the trained parameters, adding or removing one training digit changes the probability
of any outcome by a factor of at most ``exp(epsilon)``, except with probability ``delta``. The noise is calibrated so
that the whole training spends the epsilon asked for. The same training without privacy runs alongside, to compare.

What the guarantee rests on, and this file does:

- Each step takes every digit with the same probability, independently (Poisson sampling). Batches of shuffled data are
  something else, and need more noise. So batches vary in size, may be empty, and the sum is divided by the *expected*
  size: the actual one is private. For a compiled step they are padded (``--compile``).
- The images are scaled by constants, not by statistics of the data.
- The clipping bound that training uses and the one that noise is scaled by are one number, ``sensitivity()``.

What it does not cover:

- The learning rate, the bound and the sampling rate were chosen by hand, on other random splits of these digits. Neither
  that nor the choice of the model is counted in epsilon.
- The comparison is not private, and nothing is promised to the test digits; they are used to report, not to train or
  to stop. The number of training digits counts as public.
- The noise of a seeded generator can be reproduced by whoever guesses the seed. ``--secure`` takes noise and sampling
  from the operating system instead.
- Arithmetic is rounded. A clipped gradient may exceed the bound in the last digits, and which floating-point numbers a
  noisy sum can attain depends a little on the sum (Mironov, On Significance of the Least Significant Bits for
  Differential Privacy, 2012). ``--secure`` makes that much harder to use, not impossible. How long a step takes
  depends on the size of its batch.

Source: Abadi et al., Deep Learning with Differential Privacy, 2016, https://arxiv.org/abs/1607.00133; tanh: Papernot et
al., Tempered Sigmoid Activations for Deep Learning with Differential Privacy, 2020, https://arxiv.org/abs/2007.14191.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import dp_accounting
import optree
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor

from per_sample import clipped_grad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Params = dict[str, dict[str, Tensor]]


# --- data and model


class Data(NamedTuple):
    images: Tensor  # [n, 1, 8, 8], from -1 to 1
    labels: Tensor  # [n]


def load(generator: torch.Generator, test: float = 0.2) -> tuple[Data, Data]:
    """The training set and the test set."""
    digits = load_digits()
    # The pixels are known to go from 0 to 16.
    images = torch.from_numpy(digits.images).float().sub(8).div(8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    held_out, kept = torch.randperm(len(labels), generator=generator).tensor_split([int(test * len(labels))])
    return Data(images[kept], labels[kept]), Data(images[held_out], labels[held_out])


def init(generator: torch.Generator) -> Params:
    def layer(out: int, *fan_in: int) -> dict[str, Tensor]:
        return {"w": torch.randn(out, *fan_in, generator=generator) / torch.Size(fan_in).numel() ** 0.5, "b": torch.zeros(out)}

    # A last layer of zeros starts with all digits equally likely, and every clipped gradient points away from there.
    return {"conv1": layer(16, 1, 3, 3), "conv2": layer(32, 16, 3, 3), "dense": {"w": torch.zeros(10, 128), "b": torch.zeros(10)}}


def predict(params: Params, image: Tensor) -> Tensor:
    """The ten logits of one image ``[1, 8, 8]``, or of a batch of them."""
    x = F.conv2d(image, params["conv1"]["w"], params["conv1"]["b"], padding=1).tanh()
    x = F.conv2d(F.avg_pool2d(x, 2), params["conv2"]["w"], params["conv2"]["b"], padding=1).tanh()
    return F.linear(F.max_pool2d(x, 2).flatten(-3), params["dense"]["w"], params["dense"]["b"])


def loss(params: Params, image: Tensor, label: Tensor) -> Tensor:
    """The loss of ONE sample."""
    return F.cross_entropy(predict(params, image), label)


def accuracy(params: Params, data: Data) -> float:
    return (predict(params, data.images).argmax(-1) == data.labels).float().mean().item()


# --- randomness


class Source(Protocol):
    """Random numbers in float64."""

    def uniform(self, *shape: int) -> Tensor: ...

    def normal(self, *shape: int) -> Tensor: ...


class Seeded:
    """The same numbers for the same seed: for experiments, not for secrets."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


class Secure:
    """Numbers made from the operating system's cryptographic generator."""

    def uniform(self, *shape: int) -> Tensor:
        """From 0, inclusive, to 1, in steps of ``2**-53``."""
        count = math.prod(shape)
        if count == 0:
            return torch.zeros(shape, dtype=torch.float64)
        bits = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64) & (2**53 - 1)
        return (bits.double() * 2.0**-53).reshape(shape)

    def normal(self, *shape: int) -> Tensor:
        """Box and Muller's method.

        A sum of four, halved, has the same distribution as one; but to recover what was drawn from the digits of the
        result takes a search through all combinations of the four (Holohan & Braghin, Secure Random Sampling in
        Differential Privacy, 2021, https://arxiv.org/abs/2107.10138).
        """
        radius = (-2 * torch.log1p(-self.uniform(4, *shape))).sqrt()
        return (radius * torch.cos(2 * math.pi * self.uniform(4, *shape))).sum(0) / 2


# --- privacy


class Recipe(NamedTuple):
    """How to train; fixed before training, and public."""

    rate: float = 1 / 8  # the probability of each sample to be in a batch
    max_norm: float = 1.0
    learning_rate: float = 1.0
    noise_multiplier: float = 0.0  # the noise's standard deviation, as a multiple of the sensitivity


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """What so many steps spend, for datasets that differ by one sample, by the privacy loss distribution."""
    return _accountant().compose(_event(noise_multiplier, rate, steps)).get_epsilon(delta)


def calibrate(target: float, rate: float, steps: int, delta: float) -> float:
    """The smallest noise multiplier with which so many steps spend at most the target."""
    bracket = dp_accounting.LowerEndpointAndGuess(0.2, 2.0)
    return dp_accounting.calibrate_dp_mechanism(_accountant, lambda z: _event(z, rate, steps), target, delta, bracket, tol=1e-3)


def _accountant() -> dp_accounting.pld.PLDAccountant:
    # Coarser than the default and many times as fast; it rounds epsilon up.
    return dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)


def _event(noise_multiplier: float, rate: float, steps: int) -> dp_accounting.DpEvent:
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    return dp_accounting.SelfComposedDpEvent(step, steps)


# --- training


def poisson_sample(n: int, rate: float, source: Source) -> Tensor:
    """The indices of a batch: each of ``n`` is in it with probability ``rate``, whatever the others are."""
    return (source.uniform(n) < rate).nonzero().squeeze(1)


def padded(index: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """The batch filled up with sample 0, and which places were filled: compiled code runs for few sizes only."""
    size = max(1, -(-len(index) // multiple)) * multiple
    filled = F.pad(index, (0, size - len(index)))
    return filled, torch.arange(size) >= len(index)


def noisy(grads: Params, std: float, source: Source) -> Params:
    """The sum with noise. Rounded once, after the noise was added, so that rounding sees nothing the noise does not cover."""
    return optree.tree_map(lambda g: (g.double() + std * source.normal(*g.shape)).to(g.dtype), grads)


def train(params: Params, data: Data, recipe: Recipe, source: Source, compiled: bool = False) -> Iterator[Params]:
    """Train for ever; yields the parameters after each step."""
    n = len(data.labels)
    clipped = clipped_grad(loss, recipe.max_norm, normalize_by=recipe.rate * n)
    # Without clipping the sensitivity is infinite, and there is no noise to add.
    std = recipe.noise_multiplier * clipped.sensitivity() if recipe.noise_multiplier else 0.0
    summed = _compiled(clipped) if compiled else clipped
    while True:
        index, is_padding = poisson_sample(n, recipe.rate, source), None
        if compiled:
            index, is_padding = padded(index, multiple=256)
        grads = noisy(summed(params, data.images[index], data.labels[index], is_padding=is_padding), std, source)
        params = optree.tree_map(lambda p, g: p - recipe.learning_rate * g, params, grads)
        yield params


def _compiled(clipped: Callable[..., Params]) -> Callable[..., Params]:
    return torch.compile(lambda *args, is_padding: clipped(*args, is_padding=is_padding), fullgraph=True, dynamic=False)


# --- picture

INK, PRIVATE, PLAIN = "#222222", "#D1495B", "#4C78A8"


def draw(spent: list[float], private: list[float], plain: list[float], title: str, path: Path) -> None:
    """Accuracy against the epsilon spent, one point for each epoch."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(spent, plain, color=PLAIN, marker="o", markersize=3, linewidth=1.2, label="without privacy, after as many epochs")
    axes.plot(spent, private, color=PRIVATE, marker="o", markersize=4, linewidth=1.8, label="private")
    axes.set_title(title, fontsize=12, color=INK, loc="left", pad=12)
    axes.set(xlabel="epsilon spent", ylabel="test accuracy", xlim=(0, 1.03 * spent[-1]), ylim=(min(0.5, *private, *plain), 1))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# --- command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a digit classifier with differential privacy.")
    parser.add_argument("--epsilon", type=float, default=3.0, help="the budget; default: %(default)s")
    parser.add_argument("--delta", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the first parameters and, without --secure, all else")
    parser.add_argument("--secure", action="store_true", help="noise and sampling from the operating system's generator")
    parser.add_argument("--compile", action="store_true", help="padded batches and compiled steps")
    parser.add_argument("--out", type=Path, default=Path("dp_sgd.png"), help="where the picture goes")
    options = parser.parse_args()
    if options.epochs < 1 or not 0 < options.epsilon < math.inf or not 0 < options.delta < 1:
        parser.error("--epochs must be at least 1, --epsilon positive, and --delta between 0 and 1")
    return options


def main() -> None:
    options = parse()
    console = Console(highlight=False)
    generator = torch.Generator().manual_seed(options.seed)
    train_set, test_set = load(generator)
    params = init(generator)
    recipe = Recipe()
    epoch_steps = round(1 / recipe.rate)  # as many as it takes for each sample to be drawn once, on average
    recipe = recipe._replace(noise_multiplier=calibrate(options.epsilon, recipe.rate, options.epochs * epoch_steps, options.delta))
    sizes = f"{len(train_set.labels)} training digits, {len(test_set.labels)} test digits"
    console.print(f"{sizes}; noise multiplier {recipe.noise_multiplier:.3f}")

    source = Secure() if options.secure else Seeded(generator)
    private_run = train(params, train_set, recipe, source, options.compile)
    plain_source = Seeded(torch.Generator().manual_seed(options.seed + 1))
    plain_run = train(params, train_set, recipe._replace(max_norm=math.inf, noise_multiplier=0.0), plain_source)
    spent, private, plain = [], [], []
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=options.epochs)
        for epoch in range(1, options.epochs + 1):
            # One `next` is one step: the runs never take a step that is not counted.
            for curve, run in ((private, private_run), (plain, plain_run)):
                curve.append(accuracy([next(run) for _ in range(epoch_steps)][-1], test_set))
            spent.append(epsilon(recipe.noise_multiplier, recipe.rate, epoch * epoch_steps, options.delta))
            progress.advance(task)
            reached = f"test accuracy {private[-1]:.1%}   without privacy {plain[-1]:.1%}"
            progress.console.print(f"epoch {epoch:3d}   epsilon {spent[-1]:.2f}   {reached}")

    verdict = f"test accuracy {private[-1]:.1%} at epsilon {spent[-1]:.2f}, delta {options.delta:g}; {plain[-1]:.1%} without privacy"
    console.print(f"[bold]{verdict}[/bold]", soft_wrap=True)
    draw(spent, private, plain, verdict, options.out)
    console.print(f"picture: {options.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
