"""``explain`` counts every op by its route, and prints."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from per_sample import explain, per_sample_grad

PARAMS = {"c": torch.randn(4, 2, 3, 3), "w": torch.randn(5, 36), "unused": torch.randn(2)}
X, Y = torch.randn(3, 2, 5, 5), torch.tensor([0, 4, 1])


def loss(p, x, y):
    h = F.relu(F.conv2d(x[None], p["c"]))
    return F.cross_entropy(F.linear(h.flatten(1), p["w"]), y[None])


def test_the_table_counts_ops_by_route():
    report = explain(loss)(PARAMS, X, Y)
    counts = {(row.op, row.route): row.count for row in report.rows}
    assert counts["aten.convolution.default", "rule"] == 1
    assert counts["aten.convolution_backward.default", "rule"] == 1
    assert counts["aten.relu.default", "pointwise"] == 1
    assert report.n == 3
    assert report.factors == {"c": "ConvOuter", "unused": "Dense", "w": "Outer"}
    assert not {"fallback", "loop"} & set(report.routes())
    assert all(row.seconds >= 0 for row in report.rows)


def test_the_chosen_convolution_algorithm_shows():
    rows = {row.op: row.route for row in explain(loss)(PARAMS, X, Y).rows}
    assert rows["ConvOuter"] not in ("materialize", "")


def test_fallbacks_show():
    report = explain(lambda w, x: (w * x).sum() * x.clone().bernoulli_(0.5).sum(), randomness="different")(torch.ones(3), torch.randn(4, 3))
    assert report.routes()["fallback"] >= 1
    assert "per_sample.rule" in str(report)


def test_it_prints_in_a_terminal_and_in_a_notebook():
    report = explain(loss)(PARAMS, X, Y)
    lines = str(report).splitlines()
    assert lines[0].startswith("3 samples")
    assert any("convolution_backward" in line and "rule" in line for line in lines)
    assert report._repr_html_().count("<tr>") == len(report.rows) + 1


def test_explaining_changes_nothing():
    before = per_sample_grad(loss)(PARAMS, X, Y)
    explain(loss)(PARAMS, X, Y)
    torch.testing.assert_close(per_sample_grad(loss)(PARAMS, X, Y), before)
