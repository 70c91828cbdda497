"""Find the training digits that a prediction rests on, and check by training without them.

A small network is trained on scikit-learn's digits, a few labels replaced by wrong ones. For some test digits, those
that it gets wrong among them, every training digit gets a score: how much training on it spoke for the prediction, or
against it. All scores come from gradients of one function, the margin by which a label wins:

- ``kernel``: the inner product of the two digits' gradients, from ``grad_gram``. One step of training on a digit moves
  the test digit's margin by that, times the digit's doubt (the probability that its label is wrong).
- ``tracin``: the same, added over several checkpoints of the training, as it happened.
- ``trak``: the kernel asks what one step would do, but training goes on, and other digits make up for much of what one
  is missing. Dividing by the second moment of all gradients accounts for that, to first order. It is a matrix of
  parameters times parameters, so gradients are first projected at random, by ``projected_grad``.

The check is a counterfactual one: for each test digit the network is trained again without the digits that spoke most
for the prediction, and its margin should drop; without as many random digits of the same label it should stay about
where it was. ``trak`` finds what matters about twice as well as the plain kernel, most of all for the digits that the
network is sure of. The ridge of ``trak`` was chosen by this very check, on another split; a tenth of it does a little worse.

The digits that speak loudest, for or against, are mostly those with a wrong label: what the others say is said by many,
so that none of them matters much.

Source: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent (TracIn), 2020,
https://arxiv.org/abs/2002.08484; Park et al., TRAK, 2023, https://arxiv.org/abs/2303.14186.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import optree
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

from per_sample import GaussianProjector, grad_gram, projected_grad

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Params = dict[str, dict[str, Tensor]]


# --- data


class Data(NamedTuple):
    images: Tensor  # [n, 8, 8], from 0 to 1
    given: Tensor  # [n], the labels the network is trained on
    true: Tensor  # [n], the labels the data came with


def load(generator: torch.Generator, wrong: float = 0.05, test: float = 0.2) -> tuple[Data, Data]:
    """The training set, a fraction ``wrong`` of it with a wrong label, and the test set."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16)
    true = torch.from_numpy(digits.target).long()
    held_out, kept = torch.randperm(len(true), generator=generator).tensor_split([int(test * len(true))])
    given = true[kept].clone()
    planted = torch.randperm(len(kept), generator=generator)[: round(wrong * len(kept))]
    # Another digit, each of the nine as likely.
    given[planted] = (given[planted] + torch.randint(1, 10, planted.shape, generator=generator)) % 10
    return Data(images[kept], given, true[kept]), Data(images[held_out], true[held_out], true[held_out])


# --- model and training


def init(seed: int, hidden: int = 48) -> Params:
    generator = torch.Generator().manual_seed(seed)

    def layer(out: int, fan_in: int) -> dict[str, Tensor]:
        return {"w": torch.randn(out, fan_in, generator=generator) / fan_in**0.5, "b": torch.zeros(out)}

    return {"hidden": layer(hidden, 64), "out": layer(10, hidden)}


def predict(params: Params, image: Tensor) -> Tensor:
    """The ten logits of one image ``[8, 8]``, or of a batch of them."""
    x = F.linear(image.flatten(-2), params["hidden"]["w"], params["hidden"]["b"]).tanh()
    return F.linear(x, params["out"]["w"], params["out"]["b"])


def margin(params: Params, image: Tensor, label: Tensor) -> Tensor:
    """The log of the odds of the label, for ONE image or a batch of them; the loss is ``log(1 + exp(-margin))``."""
    logits = predict(params, image)
    is_label = label.unsqueeze(-1) == torch.arange(10)
    ours = torch.where(is_label, logits, 0).sum(-1)
    return ours - torch.where(is_label, -torch.inf, logits).logsumexp(-1)


def train(data: Data, keep: Tensor, seed: int, steps: int) -> list[Params]:
    """Train on what is kept, by gradient descent with momentum; returns five checkpoints, the last of them the result.

    Whole batches: two trainings that differ by a few samples then differ by what these samples did, and not by the order
    of all the others.
    """
    images, labels = data.images[keep], data.given[keep]
    params, checkpoints = init(seed), []
    momentum = optree.tree_map(torch.zeros_like, params)
    gradient = torch.func.grad(lambda params: F.cross_entropy(predict(params, images), labels))
    for step in range(1, steps + 1):
        momentum = optree.tree_map(lambda m, g, p: 0.9 * m + g + 1e-3 * p, momentum, gradient(params), params)
        params = optree.tree_map(lambda p, m: p - 0.3 * m, params, momentum)
        if step * 5 % steps < 5:
            checkpoints.append(params)
    return checkpoints


# --- scores, [test digits, training digits]: positive where training on the second spoke for the first's prediction


def kernel_scores(params: Params, data: Data, images: Tensor, predicted: Tensor) -> Tensor:
    gram = grad_gram(margin, other=(data.images, data.given))(params, images, predicted)
    return gram * doubt(params, data)


def doubt(params: Params, data: Data) -> Tensor:
    """By how much each sample's loss asks for a larger margin: the derivative of the one with respect to the other."""
    return torch.sigmoid(-margin(params, data.images, data.given))


def tracin_scores(checkpoints: list[Params], data: Data, images: Tensor, predicted: Tensor) -> Tensor:
    return torch.stack([kernel_scores(params, data, images, predicted) for params in checkpoints]).sum(0)


def trak_scores(params: Params, data: Data, images: Tensor, predicted: Tensor, size: int = 512, ridge: float = 1.0) -> Tensor:
    projected = projected_grad(margin, GaussianProjector(size))
    theirs, ours = projected(params, data.images, data.given), projected(params, images, predicted)
    moment = theirs.T @ theirs
    # In units of the mean eigenvalue.
    moment = moment + ridge * moment.diagonal().mean() * torch.eye(size)
    return ours @ torch.linalg.solve(moment, theirs.T) * doubt(params, data)


# --- the check


def without(indices: Tensor, n: int) -> Tensor:
    """Which samples are kept when these are left out."""
    keep = torch.ones(n, dtype=torch.bool)
    keep[indices] = False
    return keep


def chosen(params: Params, test_set: Data, count: int) -> Tensor:
    """The test digits to explain: up to half of them predicted wrong, the rest right; the first ones, in random order as they are."""
    is_wrong = predict(params, test_set.images).argmax(-1) != test_set.true
    wrong = is_wrong.nonzero().squeeze(1)[: count // 2]
    return torch.cat([wrong, (~is_wrong).nonzero().squeeze(1)[: count - len(wrong)]])


# --- picture

INK, FOR, AGAINST, PLANTED = "#222222", "#2A7F62", "#4C78A8", "#D1495B"


def draw(data: Data, images: Tensor, true: Tensor, predicted: Tensor, scores: Tensor, title: str, path: Path) -> None:
    """A row for each test digit: the digit, and the training digits with the highest and the lowest scores."""
    rows, columns = len(images), 6
    figure = Figure(figsize=(14, 1.35 * rows + 1.6), dpi=120, layout="constrained")
    legend = "above each training digit: its label, and its score times 1000; red: the label is a planted wrong one"
    figure.suptitle(f"{title}\n{legend}", fontsize=12, color=INK)
    tests, _, helpful, _, harmful = figure.subfigures(1, 5, width_ratios=(1.3, 0.15, columns, 0.15, columns))
    tests.suptitle("prediction", fontsize=11, color=INK)
    for row, (axes,) in enumerate(tests.subplots(rows, 1, squeeze=False)):
        verdict = "right" if predicted[row] == true[row] else f"not {true[row]}"
        _digit(axes, images[row], f"{predicted[row]}, {verdict}", INK)
    for side, colour, largest, caption in ((helpful, FOR, True, "spoke most for it"), (harmful, AGAINST, False, "spoke most against it")):
        side.suptitle(f"training digits that {caption}", fontsize=11, color=colour)
        for row, line in enumerate(side.subplots(rows, columns, squeeze=False)):
            found = scores[row].topk(columns, largest=largest)
            for axes, i, score in zip(line, found.indices.tolist(), found.values.tolist(), strict=True):
                wrong = data.given[i] != data.true[i]
                _digit(axes, data.images[i], f"{data.given[i]}   {1000 * score:+.1f}", PLANTED if wrong else colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _digit(axes: Axes, image: Tensor, caption: str, colour: str) -> None:
    axes.imshow(image.numpy(), cmap="gray_r", interpolation="nearest")
    axes.set_title(caption, fontsize=9, color=colour, pad=3)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=colour, linewidth=1.6)


# --- command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find the training digits that a prediction rests on.")
    parser.add_argument("--tests", type=int, default=8, help="test digits to explain; default: %(default)s")
    parser.add_argument("--remove", type=int, default=20, help="training digits to leave out in the check; default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="of training; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("attribution.png"), help="where the picture goes")
    options = parser.parse_args()
    if options.tests < 1 or options.steps < 5 or not 0 < options.remove < 1000:
        parser.error("--tests must be at least 1, --steps at least 5, and --remove from 1 to 999")
    return options


def main() -> None:
    options = parse()
    console = Console(highlight=False)
    generator = torch.Generator().manual_seed(options.seed)
    train_set, test_set = load(generator)
    n, k = len(train_set.given), options.remove

    checkpoints = train(train_set, without(torch.tensor([], dtype=torch.long), n), options.seed, options.steps)
    params = checkpoints[-1]
    right = (predict(params, test_set.images).argmax(-1) == test_set.true).float().mean()
    is_planted = train_set.given != train_set.true
    console.print(f"{n} training digits, {int(is_planted.sum())} of them with a planted wrong label")
    console.print(f"test accuracy {right:.1%}")

    tests = chosen(params, test_set, options.tests)
    images, true = test_set.images[tests], test_set.true[tests]
    predicted = predict(params, images).argmax(-1)
    scores = {
        "kernel": kernel_scores(params, train_set, images, predicted),
        "tracin": tracin_scores(checkpoints, train_set, images, predicted),
        "trak": trak_scores(params, train_set, images, predicted),
    }

    def drop(removed: Tensor, row: int) -> Tensor:
        again = train(train_set, without(removed, n), options.seed, options.steps)[-1]
        return before[row] - margin(again, images[row], predicted[row])

    def random(row: int) -> Tensor:
        """Digits of the label that was predicted: they matter more to the prediction than the others."""
        same = (train_set.given == predicted[row]).nonzero().squeeze(1)
        return same[torch.randperm(len(same), generator=generator)[:k]]

    before = margin(params, images, predicted)
    drops = {"random": torch.stack([drop(random(row), row) for row in range(len(tests))])}
    for method in track(scores, "training again", console=console):
        drops[method] = torch.stack([drop(s.topk(k).indices, row) for row, s in enumerate(scores[method])])

    table = Table("test digit", "predicted", "margin", *drops, title=f"the margin drops by so much without {k} training digits")
    for row in range(len(tests)):
        table.add_row(f"{true[row]}", f"{predicted[row]}", f"{before[row]:.2f}", *(f"{x[row]:.2f}" for x in drops.values()))
    table.add_section()
    table.add_row("mean", "", f"{before.mean():.2f}", *(f"{x.mean():.2f}" for x in drops.values()))
    console.print(table)
    verdict = f"without the {k} training digits that spoke most for it, a prediction's margin drops by {drops['trak'].mean():.2f}"
    verdict += f"; without {k} random ones of its label by {drops['random'].mean():.2f}"
    console.print(f"[bold]{verdict}[/bold]", soft_wrap=True)
    loudest = scores["trak"].abs().topk(10).indices
    console.print(f"of the ten loudest digits for each prediction, {is_planted[loudest].float().mean():.0%} have a planted label")
    draw(train_set, images, true, predicted, scores["trak"], verdict, options.out)
    console.print(f"picture: {options.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
