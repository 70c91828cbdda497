"""``explain`` reports what a transform really does: routes, forms, bytes, ways, costs, repetitions; and prints."""

from __future__ import annotations

import dataclasses
import functools
import io
from html.parser import HTMLParser
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from per_sample import (
    ArgumentError,
    clipped_grad,
    explain,
    functional,
    grad_gram,
    grad_variance,
    options,
    per_sample_grad,
    per_sample_grad_map,
    per_sample_grad_norm,
    per_sample_jacobian,
    weighted_grad,
)
from per_sample._explanation.advice import advice_on
from per_sample._explanation.report import Op, Run
from per_sample._record import Formed

PARAMS = {"c": torch.randn(4, 2, 3, 3), "w": torch.randn(5, 36), "unused": torch.randn(2)}
X, Y = torch.randn(3, 2, 5, 5), torch.tensor([0, 4, 1])
BYTES = 4  # of a float32


def loss(p, x, y):
    h = F.relu(F.conv2d(x[None], p["c"]))
    return F.cross_entropy(F.linear(h.flatten(1), p["w"]), y[None])


def matrix_loss(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w).square().sum()


def test_ops_are_counted_by_route():
    report = explain(loss)(PARAMS, X, Y)
    counts = {(op.op, op.route): op.count for op in report.ops}
    assert counts["aten.convolution.default", "rule"] == 1
    assert counts["aten.convolution_backward.default", "rule"] == 1
    assert counts["aten.relu.default", "pointwise"] == 1
    assert (report.n, report.runs) == (3, 1)
    assert report.factors == {"c": "ConvOuter", "unused": "Dense", "w": "Outer"}
    assert not {"fallback", "loop"} & set(report.routes())
    assert report.rows == report.ops
    assert report.run.restarts == report.run.splits == ()


def test_times_are_parts_of_the_whole():
    report = explain(loss)(PARAMS, X, Y)
    parts = [op.seconds for op in report.ops] + [p.seconds for p in report.parameters]
    assert all(part >= 0 for part in parts)
    assert 0 < sum(parts) + report.run.quantity_seconds <= report.seconds
    assert sum(op.share for op in report.ops) <= 1
    assert report.ops[0].seconds == max(op.seconds for op in report.ops)


def test_bytes_of_each_parameter():
    parameters = {p.name: p for p in explain(loss)(PARAMS, X, Y).parameters}
    c, w, unused = parameters["c"], parameters["w"], parameters["unused"]
    assert (c.form, c.shape, c.samples) == ("convolution", (4, 2, 3, 3), 3)
    assert c.held_bytes == BYTES * 3 * (2 * 5 * 5 + 4 * 3 * 3)
    assert c.formed_bytes == BYTES * 3 * prod(c.shape)
    assert (w.form, w.held_bytes, w.formed_bytes) == ("outer product", BYTES * 3 * (5 + 36), BYTES * 3 * 5 * 36)
    assert (unused.form, unused.held_bytes, unused.formed_bytes) == ("zeros", BYTES, BYTES * 3 * 2)


def test_bytes_of_rows_blocks_and_sums():
    def program(p: dict[str, Tensor], i: Tensor, x: Tensor) -> Tensor:
        e = F.embedding(i, p["table"])
        tied = (e @ p["table"].T).cos().sum() + torch.bmm(x, p["blocks"]).sin().sum()
        return tied + (x[0] @ p["twice"]).sin().sum() + (x[1] @ p["twice"]).exp().sum()

    table, blocks, twice = torch.randn(11, 6), torch.randn(2, 4, 5), torch.randn(4, 3)
    params = {"table": table, "blocks": blocks, "twice": twice}
    found = {p.name: p for p in explain(program)(params, torch.randint(11, (9, 3)), torch.randn(9, 2, 8, 4)).parameters}
    assert found["blocks"].form == "sum of 8 outer products, 2 blocks"
    assert found["blocks"].held_bytes == BYTES * 9 * 2 * 8 * (4 + 5)
    assert found["twice"].form == "sum of 2 x sum of 8 outer products"
    assert found["twice"].held_bytes == BYTES * 9 * 2 * 8 * (4 + 3)
    assert found["table"].form in (
        "sum of sum of 3 outer products + 3 positions in 11 rows",
        "sum of 3 positions in 11 rows + sum of 3 outer products",
    )
    assert found["table"].held_bytes == BYTES * 9 * 3 * (11 + 6) + 9 * 3 * 8 + BYTES * 9 * 3 * 6
    rows = explain(lambda t, i: F.embedding(i, t).sin().sum())(table, torch.randint(11, (9, 3))).parameters[0]
    assert (rows.factor, rows.form, rows.held_bytes) == ("Rows", "3 positions in 11 rows", 9 * 3 * 8 + BYTES * 9 * 3 * 6)


def test_the_algorithm_of_a_convolution():
    with options(conv_algorithm="group"):
        c = explain(loss)(PARAMS, X, Y).parameters[0]
    assert [(q.question, q.way, q.count) for q in c.questions] == [("materialize", "group", 1)]


@pytest.mark.parametrize(("positions", "way"), [(1, "product"), (4, "gram"), (600, "pieces")])
def test_the_way_to_norms_and_what_it_costs(positions, way):
    n, i, o = 5, 300, 200
    report = explain(matrix_loss, of=per_sample_grad_norm)(torch.randn(i, o), torch.randn(n, positions, i))
    (w,) = report.parameters
    (question,) = w.questions
    assert (question.question, question.way) == ("sq_norm", way)
    assert min(question.ways, key=lambda name: question.ways[name].multiply_adds) == way
    assert question.saves is not None
    assert question.saves > 1
    arithmetic = {"pieces": n * positions * i * o, "gram": n * positions**2 * (i + o), "product": n * (i + o)}
    for name, cost in question.ways.items():
        assert arithmetic[name] <= cost.multiply_adds <= 10 * arithmetic[name]
    assert question.ways["pieces"].scratch_bytes % (BYTES * i * o) == 0
    assert question.ways[way].scratch_bytes == {"product": 0, "gram": BYTES * n * 3 * positions**2}.get(way, BYTES * 8 * i * o * 5 // 8)


def test_clipped_sums_in_one_pass_and_in_two():
    w, x = torch.randn(400, 500), torch.randn(5, 3, 400)
    fast = explain(matrix_loss, of=functools.partial(clipped_grad, max_norm=1.0))(w, x)
    assert [q.question for q in fast.parameters[0].questions] == ["settled", "sq_condition", "weighted_sum"]
    assert fast.runs == 1
    low = explain(matrix_loss, of=functools.partial(clipped_grad, max_norm=1.0, memory="low"))(w, x)
    assert [q.question for q in low.parameters[0].questions] == ["sq_norm", "sq_condition", "weighted_sum"]
    assert low.runs == 2
    sums = explain(matrix_loss, of=functools.partial(weighted_grad, weights=torch.rand(5)))(w, x)
    assert [(q.question, q.way) for q in sums.parameters[0].questions] == [("weighted_sum", "product")]


@pytest.mark.parametrize(
    ("of", "questions"),
    [
        (grad_variance, {"moments"}),
        (grad_gram, {"gram"}),
        (functools.partial(per_sample_grad_map, leaf=lambda grads: grads.norm(1) + grads.sq_norm()), {"norm", "sq_norm"}),
    ],
)
def test_other_transforms(of, questions):
    w, x = torch.randn(400, 500), torch.randn(5, 3, 400)
    parameter = explain(matrix_loss, of=of)(w, x).parameters[0]
    assert {q.question for q in parameter.questions} == questions


def test_jacobians_have_a_form_for_each_output():
    (w,) = explain(lambda w, x: x @ w, of=per_sample_jacobian)(torch.randn(4, 3), torch.randn(5, 4)).parameters
    assert w.form.startswith("3 outputs: ")
    assert w.formed_bytes == BYTES * 3 * 5 * 4 * 3


def test_chunks():
    report = explain(loss, of=per_sample_grad_norm, chunk_size=2)(PARAMS, X, Y)
    assert (report.n, report.runs) == (3, 2)
    w = report.parameters[2]
    assert (w.name, w.samples, w.formed_bytes) == ("w", 2, BYTES * 2 * 5 * 36)
    assert {op.op: op.count for op in report.ops}["aten.convolution.default"] == 2


def test_several_arguments_are_named_by_number():
    report = explain(lambda p, w, x: (x @ p["a"] @ w).sum(), argnums=(0, 1))({"a": torch.ones(3, 2)}, torch.ones(2), torch.randn(5, 3))
    assert [p.name for p in report.parameters] == ["0.a", "1"]
    assert [p.name for p in explain(matrix_loss)(torch.ones(3, 2), torch.randn(5, 4, 3)).parameters] == ["argument 0"]


def test_an_empty_batch():
    report = explain(loss)(PARAMS, X[:0], Y[:0])
    assert report.n == 0
    assert all(p.formed_bytes == p.held_bytes == 0 for p in report.parameters)
    assert "0 samples" in str(report)


def test_without_memory_for_anything():
    with FakeTensorMode():
        (w,) = explain(matrix_loss)(torch.randn(30_000, 40_000), torch.randn(512, 64, 30_000)).parameters
    assert (w.held_bytes, w.formed_bytes) == (BYTES * 512 * 64 * 70_000, BYTES * 512 * 30_000 * 40_000)


# Advice


def advice(report) -> str:
    return "\n".join(item.text for item in report.advice)


def test_a_function_without_faults_gets_no_advice():
    w, x = torch.randn(400, 500), torch.randn(64, 8, 400)
    report = explain(matrix_loss, of=per_sample_grad_norm)(w, x)
    # How long Python takes between the ops is up to the machine.
    assert [item.text for item in report.advice if "between the ops" not in item.text] == []


# A first call takes long between few ops, which is no reason to compile it.
@pytest.mark.parametrize(("count", "measured", "share"), [(10_000, 0.4, 0.6), (10_000, 0.6, None), (100, 0.4, None)])
def test_time_between_the_ops(count, measured, share):
    run = Run(1, 2.0, 0.0, 0.0, (), (), False)
    found = advice_on([Op("aten.add.Tensor", "rule", count, 2 * measured, measured)], [], run, [])
    assert [item.share for item in found] == ([] if share is None else [pytest.approx(share)])
    assert "torch.compile" in "".join(item.text for item in found) or share is None


def test_fallbacks_and_loops():
    @torch.library.custom_op("per_sample_explain::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.register_autograd(lambda ctx, g: twice(g))
    report = explain(lambda w, x: twice(w * x).sum())(torch.ones(3), torch.randn(4, 3))
    assert report.routes()["loop"] == 2
    assert "`per_sample_explain.twice.default` runs once for each sample" in advice(report)

    def random(w, x):
        return (w * x).sum() * x.clone().bernoulli_(0.5).sum()

    report = explain(random, randomness="different")(torch.ones(3), torch.randn(4, 3))
    assert report.routes()["fallback"] >= 1


def test_advice_comes_by_share():
    with options(split_batch=True):
        found = explain(lambda w, x: (w * x).sum() if x.sum() > 0 else w.sum())(torch.ones(3), torch.tensor([[1.0] * 3, [-1.0] * 3] * 4))
    assert [item.share for item in found.advice] == sorted((item.share for item in found.advice), reverse=True)


def test_samples_that_ran_apart():
    w, x = torch.ones(3), torch.tensor([[1.0] * 3, [-1.0] * 3, [2.0] * 3])
    with options(split_batch=True):
        report = explain(lambda w, x: (w * x).sum() if x.sum() > 0 else (2 * w * x).sum())(w, x)
    assert report.runs == 2
    assert len(report.run.splits) == 1
    assert report.run.lost_seconds > 0
    assert "ran apart, 2 runs" in advice(report)
    assert explain(lambda w, x: (w * x).sum())(w, x).run.splits == ()


RESTARTS = {
    "copies": (lambda w, x: (w * x.mul_(2)).sum(), "writes in place into its arguments"),
    "expands": (lambda w, x: (w * torch.zeros(3).copy_(x)).sum(), "a tensor that it made itself"),
}


@pytest.mark.parametrize("need", RESTARTS)
def test_a_function_that_begins_again(need):
    fn, text = RESTARTS[need]
    report = explain(fn)(torch.ones(3), torch.randn(4, 3))
    assert report.run.restarts == ((need,),)
    assert report.run.lost_seconds > 0
    assert report.runs == 1
    assert text in advice(report)
    # Nothing of the run that was given up is counted.
    assert {op.op: op.count for op in report.ops}["aten.mul.Tensor"] <= 3
    assert [q.count for q in report.parameters[0].questions] == [1]


@pytest.mark.parametrize("need", RESTARTS)
def test_chunks_begin_again_once(need):
    fn, _ = RESTARTS[need]
    x = torch.randn(5, 3)
    report = explain(fn, chunk_size=2)(torch.ones(3), x.clone())
    assert report.run.restarts == ((need,),)
    assert report.runs == 3
    expected = torch.func.vmap(torch.func.grad(lambda w, x: (w * x).sum()), (None, 0))(torch.ones(3), 2 * x if need == "copies" else x)
    torch.testing.assert_close(per_sample_grad(fn, chunk_size=2)(torch.ones(3), x), expected)


def test_tensors_that_require_grad():
    w, x = torch.ones(3, requires_grad=True), torch.randn(4, 3)
    report = explain(lambda w, x: (w * x).sum())(w, x)
    assert report.run.differentiable
    assert "detach them" in advice(report)
    with torch.no_grad():
        assert not explain(lambda w, x: (w * x).sum())(w, x).run.differentiable
    closed_over = explain(lambda v, x: (w * v * x).sum())(torch.ones(3), x)
    assert closed_over.run.restarts == ((),)
    assert "pass that as an argument, or detach it" in advice(closed_over)


def test_a_function_that_calls_a_transform_is_told_from_a_loss():
    step = lambda w, x, y: per_sample_grad_norm(lambda w, x, y: ((x @ w).sum() - y) ** 2)(w, x, y)  # noqa: E731
    with pytest.raises(ArgumentError, match=r"one sample's already: a transform \(or `explain`\) runs around"):
        explain(step)(torch.randn(3, 2), torch.randn(5, 3), torch.randn(5))


@pytest.mark.parametrize(("size", "seconds", "told"), [(10**5, 0.3, True), (10**5, 0.1, False), (10**8, 0.1, True)])
def test_gradients_formed_count_by_time_or_by_size(size, seconds, told):
    found = advice_on([], [], Run(1, 2.0, 0.0, 1.9, (), (), False), [Formed("Outer", "aten.mul.Tensor", size, seconds)])
    assert ["has gradients formed" in item.text for item in found] == [True] * told


def test_gradients_that_an_op_wants_formed():
    def sliced(w: Tensor, x: Tensor) -> Tensor:
        a, b = w.chunk(2, dim=1)
        return (x @ a).sin().sum() + (x @ b).cos().sum()

    w, x = torch.randn(500, 600), torch.randn(32, 2, 500)
    report = explain(sliced, of=per_sample_grad_norm)(w, x)
    assert report.factors == {"argument 0": "Dense"}
    assert "has gradients formed, 19.2 MB at once" in advice(report)
    assert "has gradients formed" not in advice(explain(sliced)(w, x))
    assert "has gradients formed" not in advice(explain(lambda w, x: (x @ w).sin().sum(), of=per_sample_grad_norm)(w, x))


def test_gradients_that_are_very_large(monkeypatch):
    from per_sample._explanation import advice as rules

    monkeypatch.setattr(rules, "_LARGE_BYTES", 3 * 5 * 36 * BYTES)
    assert "The gradients themselves take" in advice(explain(loss)(PARAMS, X, Y))
    w, x = torch.randn(400, 500), torch.randn(5, 3, 400)
    assert "memory='low'" in advice(explain(matrix_loss, of=functools.partial(clipped_grad, max_norm=1.0))(w, x))
    low = functools.partial(clipped_grad, max_norm=1.0, memory="low")
    assert "memory='low'" not in advice(explain(matrix_loss, of=low)(w, x))


# How it is called


@pytest.mark.parametrize(
    ("transform", "questions"),
    [
        (functools.partial(clipped_grad, max_norm=1.0), ["settled", "sq_condition", "weighted_sum"]),
        (functools.partial(weighted_grad, weights=torch.rand(5)), ["weighted_sum"]),
        (per_sample_grad_norm, ["sq_norm"]),
        (per_sample_grad, ["materialize"]),
        (grad_gram, ["gram"]),
    ],
)
def test_what_a_transform_returned_is_explained_as_it_is(transform, questions):
    w, x = torch.randn(400, 500), torch.randn(5, 3, 400)
    (parameter,) = explain(transform(matrix_loss))(w, x).parameters
    assert [q.question for q in parameter.questions] == questions
    chunked = explain(transform(matrix_loss, chunk_size=5))(w, x)
    assert [q.question for q in chunked.parameters[0].questions] == questions


@pytest.mark.parametrize("options", [{"argnums": 1}, {"of": per_sample_grad_norm}, {"chunk_size": 2}])
def test_options_of_what_a_transform_returned_are_its_own(options):
    with pytest.raises(ArgumentError, match="whose options are its own"):
        explain(clipped_grad(matrix_loss, 1.0), **options)


def test_methods_partials_and_modules_are_losses():
    class Model:
        def loss(self, w: Tensor, x: Tensor) -> Tensor:
            return matrix_loss(w, x)

    w, x = torch.randn(4, 3), torch.randn(5, 2, 4)
    linear = functional(torch.nn.Linear(4, 1), F.mse_loss)
    cases = [(Model().loss, w, x), (functools.partial(matrix_loss), w, x), (linear, linear.params, x[:, 0], torch.randn(5, 1))]
    for fn, *arguments in cases:
        assert explain(fn)(*arguments).n == 5


def test_packed_sequences_are_told_from_branches():
    lstm = torch.nn.LSTM(3, 4)
    state = {name: p.detach() for name, p in lstm.named_parameters()}

    def packed_loss(params, packed):
        return torch.func.functional_call(lstm, params, (packed,))[1][0].sum()

    batch = torch.nn.utils.rnn.pack_sequence([torch.randn(length, 3) for length in (4, 2, 4)], enforce_sorted=False)
    report = explain(packed_loss)(state, batch)
    assert report.runs == 2
    assert "Leave sequences padded" in advice(report)


@pytest.mark.parametrize("of", [clipped_grad, "norms", lambda: None, None])
def test_what_is_no_transform(of):
    with pytest.raises(ArgumentError, match="`of` must be a transform"):
        explain(loss, of=of)


def test_what_runs_no_transform():
    with pytest.raises(ArgumentError, match="was not seen to run"):
        explain(loss, of=lambda fn: fn)(PARAMS, X[0], Y[0])


def test_wrong_options():
    with pytest.raises(ArgumentError, match="randomness"):
        explain(loss, randomness="some")


def test_a_transform_inside_the_function_is_made_of_ops():
    def outer(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return per_sample_grad(lambda v, z: (v * z).square().sum())(w, torch.stack([x, y])).sum()

    report = explain(outer)(torch.ones(3), torch.randn(4, 3), torch.randn(4, 3))
    assert (report.n, report.runs, len(report.parameters)) == (4, 1, 1)


def test_explaining_changes_nothing():
    before = per_sample_grad(loss)(PARAMS, X, Y)
    copies = {name: p.clone() for name, p in PARAMS.items()}
    explain(loss)(PARAMS, X, Y)
    torch.testing.assert_close(per_sample_grad(loss)(PARAMS, X, Y), before)
    torch.testing.assert_close(PARAMS, copies, rtol=0, atol=0)


def test_a_recorded_transform_finds_the_same_numbers():
    found = []

    def keeping(fn, **given):
        def transformed(*args):
            found.append(clipped_grad(fn, max_norm=0.5, **given)(*args))

        return transformed

    explain(loss, of=keeping)(PARAMS, X, Y)
    torch.testing.assert_close(found[0], clipped_grad(loss, max_norm=0.5)(PARAMS, X, Y), rtol=0, atol=0)
    assert explain(loss)(PARAMS, X, Y).runs == 1, "nothing stays recorded"


# How it prints


class Tags(HTMLParser):
    """Checks that tags are closed, and counts them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_text():
    report = explain(loss, of=per_sample_grad_norm)(PARAMS, X, Y)
    lines = str(report).splitlines()
    assert lines[0].startswith("3 samples in 1 run(s)")
    assert repr(report) == str(report)
    assert any("4x2x3x3" in line and "convolution" in line for line in lines)
    assert max(map(len, lines)) < 200


@pytest.mark.parametrize("number", [7, 30])
def test_small_parameters_are_one_line_where_there_are_many(number):
    report = explain(loss, of=per_sample_grad_norm)(PARAMS, X, Y)
    w = dataclasses.replace(report.parameters[2], questions=())
    bias = dataclasses.replace(w, name="bias", held_bytes=7, formed_bytes=8)
    shown = str(dataclasses.replace(report, parameters=(w, *[bias] * number)))
    assert f"{number} small ones" in shown if number == 30 else "small ones" not in shown
    assert shown.count("bias") == (0 if number == 30 else number)
    assert "210 B 240 B" in " ".join(shown.split()) or number == 7


def test_html_is_escaped_and_well_formed():
    report = explain(escaped)({"<b>&": torch.ones(3)}, X[:, 0, 0, :3])
    fragment = report._repr_html_()
    assert "&lt;b&gt;&amp;" in fragment
    assert "<b>" not in fragment
    counts = Tags(fragment).counts
    assert counts["table"] == 2
    page = report.to_html()
    assert page.startswith("<!DOCTYPE html>")
    assert "color-scheme" in page
    Tags(page)


def escaped(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return (p["<b>&"] * x).sum()


def test_rich():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=io.StringIO())
    report = explain(escaped)({"<b>&": torch.ones(3)}, X[:, 0, 0, :3])
    console.print(report)
    shown = console.export_text()
    assert "3 samples in 1 run(s)" in shown
    assert "<b>&" in shown
    assert "aten.mul.Tensor" in shown


def test_text_and_html_need_no_rich(monkeypatch):
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    report = explain(loss)(PARAMS, X, Y)
    assert "aten.convolution.default" in str(report)
    assert "aten.convolution.default" in report._repr_html_()
    with pytest.raises(ImportError):
        report.__rich__()


def test_sizes_for_people():
    from per_sample._explanation.display import size

    assert [size(x) for x in (0, 999, 1000, 12_345, 999_000, 2.5e9, 3e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "12.3 kB",
        "999 kB",
        "2.5 GB",
        "3000 TB",
    ]
    assert size(1.5e6, "") == "1.5 M"


def test_there_is_no_rule_to_write_for_random_numbers() -> None:
    def dropped(w: Tensor, x: Tensor) -> Tensor:
        return (torch.nn.functional.dropout(w * x, 0.5)).sum()

    report = explain(dropped, randomness="different")(torch.ones(30, 300), torch.ones(5, 30, 300))
    assert any("bernoulli" in op.op and op.route == "fallback" for op in report.ops)
    assert not any("bernoulli" in advice.text for advice in report.advice)
