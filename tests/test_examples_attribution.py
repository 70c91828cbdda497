"""The example of data attribution: its scores, and that they foretell what training without the digits does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import optree
import pytest
import torch

from per_sample import GaussianProjector, reference
from test_examples import EXAMPLES, PNG, run_example


def load_example():
    spec = importlib.util.spec_from_file_location("attribution", EXAMPLES / "attribution.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


def setting():
    data, test = example.load(torch.Generator().manual_seed(5))
    data, test = (
        example.Data(*(x[:count].double() if x.is_floating_point() else x[:count] for x in y)) for y, count in ((data, 17), (test, 5))
    )
    params = optree.tree_map(lambda p: p.double(), example.init(seed=1, hidden=7))
    return params, data, test


def gradients(fn, params, images, labels):
    """A loop of plain autograd, ``[n, parameters]``."""
    rows = []
    for image, label in zip(images, labels, strict=True):
        leaves = optree.tree_map(lambda p: p.detach().requires_grad_(), params)
        fn(leaves, image, label).backward()
        rows.append(torch.cat([p.grad.flatten() for p in optree.tree_leaves(leaves)]))
    return torch.stack(rows)


def loss(params, image, label):
    return torch.nn.functional.cross_entropy(example.predict(params, image), label)


def test_the_kernel_score_is_what_a_step_of_training_on_the_loss_does_to_the_margin():
    params, data, test = setting()
    of_margins = gradients(example.margin, params, test.images, test.given)
    downhill = -gradients(loss, params, data.images, data.given)
    scores = example.kernel_scores(params, data, test.images, test.given)
    torch.testing.assert_close(scores, of_margins @ downhill.T)
    others = optree.tree_map(lambda p: 1.5 * p, params)
    both = scores + example.kernel_scores(others, data, test.images, test.given)
    torch.testing.assert_close(example.tracin_scores([params, others], data, test.images, test.given), both)


def test_the_trak_score_divides_by_the_second_moment_of_the_projections():
    params, data, test = setting()
    projected = reference.projected_grad(example.margin, GaussianProjector(6))
    ours, theirs = projected(params, test.images, test.given), projected(params, data.images, data.given)
    values, vectors = torch.linalg.eigh(theirs.T @ theirs)
    inverse = vectors @ torch.diag(1 / (values + 0.5 * values.mean())) @ vectors.T
    expected = torch.stack([g @ inverse @ theirs.T for g in ours]) * example.doubt(params, data)
    torch.testing.assert_close(example.trak_scores(params, data, test.images, test.given, size=6, ridge=0.5), expected)


def test_margin_and_doubt_are_those_of_the_loss():
    params, data, _ = setting()
    margins = example.margin(params, data.images, data.given)
    losses = torch.nn.functional.cross_entropy(example.predict(params, data.images), data.given, reduction="none")
    torch.testing.assert_close(torch.nn.functional.softplus(-margins), losses)
    torch.testing.assert_close(example.doubt(params, data), 1 - (-losses).exp())


@pytest.mark.parametrize("steps", [5, 7, 200])
def test_training_returns_five_checkpoints_the_last_at_the_end(steps):
    data, _ = example.load(torch.Generator().manual_seed(5))
    data = example.Data(*(x[:30] for x in data))
    keep = example.without(torch.tensor([3, 4]), 30)
    assert keep.sum() == 28
    checkpoints = example.train(data, keep, 0, steps)
    assert len(checkpoints) == 5
    kept = example.Data(*(x[keep] for x in data))
    again = example.train(kept, torch.ones(28, dtype=torch.bool), 0, steps)
    for one, another in zip(optree.tree_leaves(checkpoints), optree.tree_leaves(again), strict=True):
        assert torch.equal(one, another)


def test_removing_what_spoke_for_a_prediction_lowers_its_margin(tmp_path: Path):
    picture = tmp_path / "new folder" / "attribution.png"
    done = run_example("attribution.py", "--tests", "3", "--steps", "60", "--seed", "3", "--out", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"margin drops by ([-\d.]+); without 20 random ones of its label by ([-\d.]+)", done.stdout)
    assert found, done.stdout
    chosen, random = map(float, found.groups())
    # About 1.2 and 0.2.
    assert chosen > 2 * random + 0.5, done.stdout
    loud = re.search(r"(\d+)% have a planted label", done.stdout)
    assert loud, done.stdout
    assert int(loud[1]) > 25, done.stdout  # 5 % of all digits have
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize("options", [("--tests", "0"), ("--steps", "4"), ("--remove", "0")])
def test_it_refuses_bad_options(options, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attribution.py", *options])
    with pytest.raises(SystemExit, match="2"):
        example.parse()
    assert "--tests must be at least 1" in capsys.readouterr().err
