"""The rule table: what ``rule`` accepts and refuses, rules of users, and what happens to wrong ones."""

from __future__ import annotations

import pytest
import torch

import per_sample
from per_sample import _registry, explain, per_sample_grad, physical, rule
from per_sample.testing import assert_matches_reference, check_rule

aten = torch.ops.aten
W, X = torch.randn(3), torch.randn(4, 3)


@torch.library.custom_op("per_sample_tests::scale", mutates_args=())
def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


scale.register_fake(lambda x, factor: torch.empty_like(x))
scale.register_autograd(
    lambda ctx, g: (scale(g, ctx.factor), None), setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1])
)
SCALE = torch.ops.per_sample_tests.scale.default


def loss(w, x):
    return (scale(w * x, 3.0) ** 2).sum()


@pytest.fixture
def table(monkeypatch):
    """Registrations that end with the test."""
    before = dict(_registry.TABLE)
    yield
    for op in set(_registry.TABLE) | set(before):
        if _registry.TABLE.get(op) is not before.get(op):
            _registry.TABLE.pop(op, None)
            if op in before:
                _registry.TABLE[op] = before[op]
            for listener in _registry._listeners:
                listener(op)


def test_a_custom_op_works_without_a_rule():
    report = explain(loss)(W, X)
    assert report.routes()["loop"] == 2
    expected = torch.stack([torch.func.grad(lambda w, x: ((w * x * 3) ** 2).sum())(W, x) for x in X])
    torch.testing.assert_close(per_sample_grad(loss)(W, X), expected)


def test_a_custom_op_with_a_rule(table):
    @rule(SCALE)
    def scale_rule(x, factor):
        return x.physical * factor

    assert "loop" not in explain(loss)(W, X).routes()
    check_rule(SCALE, torch.randn(2, 5), 3.0)
    expected = torch.stack([torch.func.grad(lambda w, x: ((w * x * 3) ** 2).sum())(W, x) for x in X])
    torch.testing.assert_close(per_sample_grad(loss)(W, X), expected)


@pytest.mark.parametrize(
    ("wrong", "pattern"),
    [
        (lambda x, factor: x.physical[0], "shape|sample axis"),
        (lambda x, factor: x.physical.sum(1), r"shape \[4\]"),
        (lambda x, factor: x.physical.double(), "float64"),
        (lambda x, factor: (x.physical, x.physical), "2 results"),
        (lambda x, factor: 3, "int"),
        (lambda x, factor: None, "None where the op gives a tensor"),
        (lambda x, factor: (x.physical * factor,), "tuple; the op gives a tensor"),
    ],
)
def test_a_rule_that_returns_the_wrong_thing(table, wrong, pattern):
    def wrong_rule(x, factor):
        return wrong(x, factor)

    rule(SCALE)(wrong_rule)
    with pytest.raises(per_sample.RuleError, match=pattern):
        per_sample_grad(loss)(W, X)


@torch.library.custom_op("per_sample_tests::unknown", mutates_args=())
def unknown(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Has no kernel for shapes alone."""
    return x * factor


@pytest.mark.parametrize(
    ("wrong", "pattern"),
    [
        (lambda x, factor: x.physical.sum(-1), r"shape \[4\]; for 4 samples the op gives \[4, 3\]"),
        (lambda x, factor: x.physical.sum(-1, keepdim=True), r"shape \[4, 1\]"),
        (lambda x, factor: x.physical[:1] * factor, r"shape \[1, 3\]"),
        (lambda x, factor: (x.physical * factor).half(), "float16"),
    ],
    ids=["axis lost", "axis of size 1", "one sample", "dtype"],
)
def test_a_wrong_rule_of_an_op_that_must_run_to_tell_its_shape(table, wrong, pattern):
    def wrong_rule(x, factor):
        return wrong(x, factor)

    rule(torch.ops.per_sample_tests.unknown.default)(wrong_rule)
    with pytest.raises(per_sample.RuleError, match=pattern):
        per_sample_grad(lambda w, x: (w * unknown(x, 2.0)).sum())(W, X.clone())


def test_a_right_rule_of_an_op_that_must_run_to_tell_its_shape(table):
    @rule(torch.ops.per_sample_tests.unknown.default)
    def unknown_rule(x, factor):
        return x.physical * factor

    fn = lambda w, x: (w * unknown(x, 2.0)).sum()  # noqa: E731
    torch.testing.assert_close(per_sample_grad(fn)(W, X), 2 * X)
    torch.testing.assert_close(torch.func.vmap(per_sample_grad(fn), (0, None))(torch.stack([W, 2 * W]), X), 2 * X.expand(2, 4, 3))


def test_a_rule_with_wrong_numbers_is_found_by_check_rule(table):
    @rule(SCALE)
    def wrong_numbers(x, factor):
        return x.physical * (factor + 1)

    with pytest.raises(AssertionError, match="sample 0"):
        check_rule(SCALE, torch.randn(2, 5), 3.0)


def test_a_rule_that_mixes_samples_is_found_by_check_rule(table):
    @rule(SCALE)
    def mixing(x, factor):
        return x.physical.roll(1, 0) * factor

    with pytest.raises(AssertionError, match="sample"):
        check_rule(SCALE, torch.randn(2, 5), 3.0)


@torch.library.custom_op("per_sample_tests::pick", mutates_args=())
def pick(tables: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    return sum((t[index] for t in tables[1:]), tables[0][index])


PICK = torch.ops.per_sample_tests.pick.default


def picked(n, tables, index, rows_of=physical):
    """What the op gives to ``n`` samples."""
    rows = torch.arange(n).view(n, *[1] * index.dim())
    return sum(rows_of(t, n)[rows, physical(index, n)] for t in tables)


def of_the_first(x):
    return x.physical[0] if type(x) is per_sample.Batched else x


def as_if_dense(x, n):
    rows = physical(x, n)
    return rows.as_strided((n, 4, 2), (8, 2, 1)) if type(x) is per_sample.Batched else rows


def emptied(n, tables, index):
    out = picked(n, tables, index)
    for t in tables:
        physical(t, n).zero_()
    return out


@pytest.mark.parametrize(
    "wrong",
    [
        lambda n, tables, index: picked(n, tables, of_the_first(index)),
        lambda n, tables, index: picked(n, [tables[0], of_the_first(tables[1])], index),
        lambda n, tables, index: picked(n, tables, index) * (2 if n == 1 else 1),
        lambda n, tables, index: picked(n, tables, index) * (1 + (physical(index, n) == 0)[..., None]),
        lambda n, tables, index: picked(n, tables, index, as_if_dense),
        emptied,
    ],
    ids=["the first sample's index", "the first sample's table", "one sample", "an index of zero", "the layout", "writes"],
)
def test_check_rule_goes_into_lists_and_varies_indices(table, wrong):
    how = [picked]

    @rule(PICK)
    def pick_rule(tables, index):
        return how[0](next(a.n for a in [*tables, index] if type(a) is per_sample.Batched), tables, index)

    arguments = [torch.randn(4, 2), torch.randn(4, 2)], torch.tensor([1])
    check_rule(PICK, *arguments)
    check_rule(PICK, arguments[0], torch.tensor([3, 0]))
    how[0] = wrong
    with pytest.raises(AssertionError, match="batched, sample"):
        check_rule(PICK, *arguments)


def test_check_rule_repeats_integers_that_the_op_refuses(table):
    @torch.library.custom_op("per_sample_tests::split", mutates_args=())
    def split(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.sum() for part in x.split(sizes.tolist())])

    @rule(torch.ops.per_sample_tests.split.default)
    def split_rule(x, sizes):
        return (
            torch.stack([split(*both) for both in zip(physical(x, x.n), physical(sizes, x.n), strict=True)])
            if type(x) is per_sample.Batched
            else NotImplemented
        )

    check_rule(torch.ops.per_sample_tests.split.default, torch.randn(5), torch.tensor([2, 3]))


def test_check_rule_sees_what_an_op_writes(table):
    @torch.library.custom_op("per_sample_tests::double_", mutates_args=("x",))
    def double_(x: torch.Tensor, y: torch.Tensor) -> None:
        x.mul_(2).add_(y)

    op = torch.ops.per_sample_tests.double_.default

    @rule(op)
    def double_rule(x, y):
        double_(x.physical, physical(y, x.n))

    check_rule(op, torch.randn(3), torch.randn(3))

    @rule(op, override=True)
    def forgets_to_double(x, y):
        x.physical.add_(physical(y, x.n))

    with pytest.raises(AssertionError, match="argument 0 afterwards"):
        check_rule(op, torch.randn(3), torch.randn(3))


def test_a_rule_through_which_nan_spreads_is_found_by_check_rule(table):
    @rule(SCALE)
    def spreading(x, factor):
        return x.physical * factor + 0 * x.physical.sum(0)

    with pytest.raises(AssertionError, match="NaN in sample 1, sample 0, result 0"):
        check_rule(SCALE, torch.randn(2, 5), 3.0)


def test_a_rule_that_leaves_every_case_is_found_by_check_rule(table):
    @rule(SCALE)
    def idle(x, factor):
        return NotImplemented

    with pytest.raises(per_sample.RuleError, match="every choice"):
        check_rule(SCALE, torch.randn(2, 5), 3.0)


def test_a_rule_may_leave_a_case_to_the_fallback(table):
    @rule(SCALE)
    def only_small(x, factor):
        return NotImplemented if x.n > 2 else x.physical * factor

    assert "loop" in explain(loss)(W, X).routes()
    assert "loop" not in explain(loss)(W, X[:2]).routes()


def test_a_second_rule_needs_override(table):
    with pytest.raises(per_sample.RuleError, match="override=True"):

        @rule(aten.mm.default)
        def mm(self, mat2):
            return NotImplemented

    @rule(aten.mm.default, override=True)
    def mm_again(self, mat2):
        return NotImplemented

    report = explain(lambda w, x: (x @ w).sum())(torch.randn(3, 2), torch.randn(4, 5, 3))
    assert ("aten.mm.default", "fallback") in {(row.op, row.route) for row in report.rows}


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (lambda x, factor: x, "schema has"),
        (lambda self, mat: self, "schema has"),
        (lambda self: self, "schema has"),
    ],
)
def test_parameters_must_be_the_schemas(table, function, pattern):
    with pytest.raises(per_sample.RuleError, match=pattern):
        rule(aten.mm.default, override=True)(function)


def test_defaults_must_be_there(table):
    with pytest.raises(per_sample.RuleError, match=r"beta|default"):

        @rule(aten.addmm.default, override=True)
        def addmm(self, mat1, mat2, *, beta, alpha):
            return NotImplemented


def test_a_packet_is_not_an_overload(table):
    with pytest.raises(per_sample.RuleError, match=r"mm\.default"):
        rule(aten.mm)(lambda self, mat2: self)


def test_check_rule_wants_a_rule_and_a_tensor():
    with pytest.raises(per_sample.RuleError, match="no rule"):
        check_rule(SCALE, torch.randn(2), 1.0)
    with pytest.raises(per_sample.ArgumentError, match="tensor"):
        check_rule(aten.add.Tensor, 1.0, 2.0)


def test_assert_matches_reference_fails_where_it_should(table):
    @rule(aten.tanh.default, override=True)
    def tanh(self):
        return self.physical.tanh() * 1.01

    with pytest.raises(AssertionError):
        assert_matches_reference(lambda w, x: (w * x).tanh().sum(), W, X)


@pytest.mark.parametrize("options", [{}, {"has_aux": True}, {"argnums": (0, 1), "in_dims": (None, 1)}, {"chunk_size": 3}])
def test_an_op_that_torch_func_cannot_differentiate_is_compared_with_a_loop(table, options):
    fn = (lambda w, x: (loss(w, x), {"x": x * 2, "name": "n"})) if "has_aux" in options else loss
    x = X.T.contiguous() if "in_dims" in options else X
    assert_matches_reference(fn, W, x, **options)

    @rule(SCALE)
    def scale_rule(x, factor):
        return x.physical * factor * (1 + 1e-3 * torch.arange(x.n)[:, None])

    with pytest.raises(AssertionError):
        assert_matches_reference(fn, W, x, **options)


def test_what_vmap_fails_in_is_compared_with_a_loop():
    gru = torch.nn.GRU(3, 5)
    state = {name: p.detach() for name, p in gru.named_parameters()}

    def recurrent(p, x):
        return torch.func.functional_call(gru, p, (x,))[0].square().sum()

    assert_matches_reference(recurrent, state, torch.randn(4, 6, 3), rtol=1e-4, atol=1e-5)


def test_a_rule_for_an_op_of_a_linear_layer_is_asked(table):
    """`F.linear` is one op of the library's own only where the library's own rules would have been asked."""
    asked = []
    own = _registry.TABLE[aten.addmm.default].run

    @rule(aten.addmm.default, override=True)
    def addmm(self, mat1, mat2, *, beta=1, alpha=1):
        asked.append(mat1.shape)
        return own(self, mat1, mat2, beta=beta, alpha=alpha)

    w, b, x = torch.randn(3, 4), torch.randn(3), torch.randn(5, 2, 4)
    grads = per_sample.per_sample_grad(lambda p, x: torch.nn.functional.linear(x, *p).sin().sum())((w, b), x)
    assert asked == [(2, 4)]
    assert [tuple(grad.shape) for grad in grads] == [(5, 3, 4), (5, 3)]


def test_a_rule_may_come_from_a_namespace_without_a_name(table):
    space = {"rule": rule, "SCALE": SCALE}
    exec("@rule(SCALE)\ndef scale_rule(x, factor):\n    return x.physical * factor + 1", space)
    assert per_sample_grad(lambda w, x: scale(w * x, 3.0).sum(), has_aux=False)(W, X).shape == (4, 3)
    assert "loop" not in explain(loss)(W, X).routes()


def test_a_rule_that_forgets_a_result(table):
    @torch.library.custom_op("per_sample_tests::both", mutates_args=())
    def both(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * w, x + w

    @rule(torch.ops.per_sample_tests.both.default)
    def both_rule(x, w):
        return per_sample.physical(x, 4) * per_sample.physical(w, 4), None

    with pytest.raises(per_sample.RuleError, match="None where the op gives a tensor"):
        per_sample_grad(lambda w, x: both(x, w.detach())[0].sum() * w.sum())(W, X)


def test_a_rule_is_for_an_overload():
    with pytest.raises(per_sample.RuleError, match=r"Of `per_sample_tests\.scale`, name an overload"):
        rule(torch.ops.per_sample_tests.scale)
    with pytest.raises(per_sample.RuleError, match="A rule is for an op"):
        rule()
    with pytest.raises(per_sample.RuleError, match="keyed by an op overload"):

        @rule
        def without_parentheses(x, factor):
            return x.physical * factor
