"""Each misuse gets a typed error that names what was received and what to do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import per_sample
from per_sample import per_sample_grad, per_sample_grad_and_value

W = torch.randn(2, 3)
X = torch.randn(4, 3)


def linear_loss(w, x):
    return (w @ x).sum()


def grads_of(fn, *args, **options):
    return per_sample_grad(fn, **options)(*(args or (W, X)))


@pytest.mark.parametrize(
    ("fn", "options", "pattern"),
    [
        (lambda w, x: w @ x, {}, r"shape \[2\].*keep_batch_dim=True"),
        (lambda w, x: (x @ w.T).sum(1), {"keep_batch_dim": True}, r"shape \[1\].*Reduce"),
        (lambda w, x: 1.0, {}, "float"),
        (lambda w, x: ((w @ x).sum(), x), {}, "has_aux=True"),
        (lambda w, x: (w @ x).sum() > 0, {}, "torch.bool"),
        (lambda w, x: torch.complex((w @ x).sum(), x.sum()), {}, "complex"),
    ],
)
def test_not_a_scalar_loss(fn, options, pattern):
    with pytest.raises(per_sample.NotScalarError, match=pattern):
        grads_of(fn, **options)


@pytest.mark.parametrize("result", [lambda w, x: (w @ x).sum(), lambda w, x: ((w @ x).sum(), x, x)])
def test_aux_is_not_a_pair(result):
    with pytest.raises(per_sample.ArgumentError, match="pair"):
        grads_of(result, has_aux=True)


def test_batch_sizes_differ():
    with pytest.raises(per_sample.BatchSizeError, match="argument 1 has 4, argument 2 has 5"):
        grads_of(lambda w, x, y: linear_loss(w, x + y), W, X, torch.randn(5, 3))


@pytest.mark.parametrize(("args", "in_dims"), [((W,), None), ((W, X), (None, None))])
def test_no_batched_argument(args, in_dims):
    with pytest.raises(per_sample.BatchSizeError, match="No argument is batched"):
        per_sample_grad(lambda w, *x: w.sum(), in_dims=in_dims)(*args)


def test_integer_parameters():
    with pytest.raises(per_sample.ArgumentError, match=r"Argument 0 .*torch.int64"):
        grads_of(linear_loss, torch.ones(2, 3, dtype=torch.int64), X)


def test_parameter_that_is_no_tensor():
    with pytest.raises(per_sample.ArgumentError, match="type float"):
        grads_of(lambda p, x: (p["w"] @ x).sum() * p["s"], {"w": W, "s": 2.0}, X)


@pytest.mark.parametrize("argnums", [2, -3, (0, 5)])
def test_argnums_out_of_range(argnums):
    with pytest.raises(per_sample.ArgumentError, match=r"2 positional argument"):
        grads_of(linear_loss, argnums=argnums)


@pytest.mark.parametrize(
    "options",
    [
        {"argnums": "0"},
        {"argnums": ()},
        {"argnums": True},
        {"randomness": "maybe"},
        {"chunk_size": 0},
        {"chunk_size": 2.0},
    ],
)
def test_options_are_refused_when_the_transform_is_made(options):
    (name,) = options
    with pytest.raises(per_sample.ArgumentError, match=name):
        per_sample_grad_and_value(linear_loss, **options)


def test_fn_is_not_callable():
    with pytest.raises(per_sample.ArgumentError, match="callable"):
        per_sample_grad(W)


def test_an_argument_named_twice():
    with pytest.raises(per_sample.ArgumentError, match="twice"):
        grads_of(linear_loss, argnums=(0, -2))


@pytest.mark.parametrize(
    ("in_dims", "pattern"),
    [
        ((None, 0, 0), "2 positional"),
        ((None, {"a": 0}), "prefix"),
        ((None, 7), "no axis 7"),
        ((None, "0"), "ints or None"),
        ("0", "int or a tuple"),
    ],
)
def test_bad_in_dims(in_dims, pattern):
    with pytest.raises(per_sample.ArgumentError, match=pattern):
        grads_of(linear_loss, in_dims=in_dims)


def test_a_scalar_argument_has_no_sample_axis():
    with pytest.raises(per_sample.ArgumentError, match=r"shape \[\].*None in `in_dims`"):
        grads_of(lambda w, x, s: linear_loss(w, x) * s, W, X, torch.tensor(2.0))


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: (w @ x).sum() if x.sum() > 0 else (w @ x).square().sum(),
        lambda w, x: (w @ x).sum() * x.sum().item(),
        lambda w, x: (w @ x).sum() * float(x[0]),
        lambda w, x: (w @ x).sum() * int(x[0]),
        lambda w, x: (w @ x[x > 0].sum().expand(3)).sum(),
        lambda w, x: (w @ x).sum() * len((x > 0).nonzero()),
        lambda w, x: (w @ x).sum() * x.tolist()[0],
        lambda w, x: (w @ x).sum() * torch.equal(x > 0, torch.tensor([True, False, False])),
        lambda w, x: (w @ x).sum() * float(x.detach().numpy()[0]),
    ],
)
def test_branches_on_data(fn):
    x = torch.tensor([[1.5, -2.5, -3.5], [-4.5, 5.5, 6.5]])
    with pytest.raises(per_sample.DataDependentError, match="differs between samples"):
        grads_of(fn, W, x)


def test_branches_on_shared_values_are_fine():
    grads = grads_of(lambda w, x: (w @ x).sum() if w.sum() == W.sum() else x.sum())
    torch.testing.assert_close(grads, X[:, None].expand(4, 2, 3))


@pytest.mark.parametrize(
    "write",
    [
        lambda buffer, x: buffer.add_(x),
        lambda buffer, x: buffer[0].copy_(x[0]),
        lambda buffer, x: buffer.__setitem__(0, x[0]),
        lambda buffer, x: buffer.index_put_((torch.tensor([0]),), x[:1]),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_writing_a_per_sample_value_into_a_tensor_from_outside(write, grad):
    closed_over = torch.zeros(3, requires_grad=grad)

    def fn(w, x):
        with torch.no_grad():
            write(closed_over, x)
        return (w @ x).sum() + closed_over.sum()

    with pytest.raises(per_sample.SharedWriteError, match="all samples share"):
        grads_of(fn, W, X)
    assert not closed_over.any()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda buffer, x: buffer.add_(x),
        lambda buffer, x: buffer[0].copy_(x[0]),
        lambda buffer, x: buffer.view(1, 3)[0, 1:].mul_(x[1:]),
        lambda buffer, x: torch.mul(x, 2, out=buffer),
    ],
)
def test_writing_a_per_sample_value_into_a_shared_argument(write, recorded):
    def fn(w, x, buffer):
        write(buffer, x)
        return (w @ (x * buffer)).square().sum()

    argument = torch.ones(3)
    grads = per_sample_grad(fn, in_dims=(None, 0, None))(W.clone().requires_grad_(recorded), X, argument)
    assert torch.equal(argument, torch.ones(3))
    for g, x in zip(grads, X, strict=True):
        torch.testing.assert_close(g, torch.func.grad(fn)(W, x, torch.ones(3)))


def test_a_shared_argument_is_never_modified():
    w = W.clone()

    def fn(w, x):
        w.detach().mul_(2)
        return (w @ x).sum()

    # The function writes into a copy, and each sample sees the argument as it was.
    grads, values = per_sample_grad_and_value(fn)(w, X)
    torch.testing.assert_close(w, W)
    torch.testing.assert_close(values, 2 * X @ W.sum(0))
    torch.testing.assert_close(grads, X[:, None].expand(4, 2, 3))


def test_batch_norm_in_training_mode():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    p = {k: v.detach() for k, v in net.named_parameters()}

    def fn(p, x):
        return torch.func.functional_call(net, p, (x,)).square().sum()

    with pytest.raises(per_sample.BatchNormError, match=r"(?s)mixes samples.*eval\(\)"):
        per_sample_grad(fn, keep_batch_dim=True)(p, torch.randn(4, 1, 5, 5))
    net.eval()
    per_sample.testing.assert_matches_reference(fn, p, torch.randn(4, 1, 5, 5), keep_batch_dim=True)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: x + torch.randn(3),
        lambda x: x + torch.rand_like(x),
        lambda x: x * torch.bernoulli(x.sigmoid()),
        lambda x: x + torch.empty(3).normal_(),
        lambda x: x[torch.randperm(3)],
    ],
)
def test_randomness_must_be_chosen(draw):
    with pytest.raises(per_sample.RandomnessError, match="randomness='different'"):
        grads_of(lambda w, x: (w @ draw(x)).sum())


def test_filling_a_shared_tensor_with_different_numbers():
    with pytest.raises(per_sample.RandomnessError, match="same numbers"):
        grads_of(lambda w, x: (w @ (x + torch.empty(3, dtype=torch.int64).random_(5))).sum(), randomness="different")


def test_a_tensor_that_escapes():
    kept = []
    grads_of(lambda w, x: (kept.append(x), (w @ x).sum())[1])
    with pytest.raises(per_sample.EscapedError, match="has_aux"):
        kept[0] + 1


def test_an_op_that_fails_says_which():
    with pytest.raises((per_sample.UnsupportedError, RuntimeError), match=r"mm|size"):
        grads_of(lambda w, x: (w @ x.reshape(1, 3) @ w).sum())


def test_an_error_of_torch_has_the_shapes_of_one_sample_below_it():
    with pytest.raises(RuntimeError, match="invalid for input of size 12") as caught:
        grads_of(lambda w, x: (w @ x.reshape(1, 5)).sum())
    (note,) = caught.value.__notes__
    assert "`aten.view.default` for 4 samples" in note
    assert note.endswith("shapes [3].")


def test_an_error_of_the_function_itself_is_left_as_it_is():
    with pytest.raises(ZeroDivisionError) as caught:
        grads_of(lambda w, x: (w @ x).sum() / (0 // 0))
    assert not hasattr(caught.value, "__notes__")


def test_out_argument_of_another_shape():
    with pytest.raises(per_sample.UnsupportedError, match=r"`out` has shape \[2\], the result \[3\]"):
        grads_of(lambda w, x: torch.add(x, x, out=torch.zeros(2)).sum() + (w @ x).sum())


def test_a_branch_that_samples_take_differently_is_shown_with_its_groups():
    def branching(w, x):
        if x.sum() > middle:
            return (w @ x).sum()
        return (w @ x).mean()

    middle = X.sum(1).median()
    with pytest.raises(per_sample.DataDependentError, match=r"test_errors\.py, line \d+ \(`if x.sum\(\) > middle:`\)") as caught:
        grads_of(branching, W, X[X.sum(1).argsort()])
    assert str(caught.value).endswith("here in 2 groups.")


def test_code_for_a_batch_is_told_what_one_sample_looks_like():
    with pytest.raises(IndexError) as caught:
        grads_of(lambda w, x: (w @ x[:, 0]).sum())
    (note,) = caught.value.__notes__
    assert "sees ONE sample" in note
    assert note.endswith("shapes [3].")


def grouped(bounds):
    """Clipped by groups of the parameters ``a.0``, ``a.1`` and ``b``."""
    params = {"a.0": W, "a.1": 2 * W, "b": 3 * W}
    return per_sample.clipped_grad(lambda p, x: sum((w @ x).sum() for w in p.values()), bounds)(params, X)


def test_code_of_a_module_that_has_its_batch_axis_is_not():
    def loss_fn(output, target):
        raise RuntimeError("mine")

    loss = per_sample.functional(torch.nn.Linear(3, 2), loss_fn)
    with pytest.raises(RuntimeError, match="mine") as caught:
        per_sample_grad(loss)(loss.params, torch.ones(4, 3), torch.ones(4, 2))
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda: per_sample_grad(linear_loss, {"w": W}), "got a dict. The function's own arguments go to"),
        (lambda: per_sample.clipped_grad(lambda p, x: (p["a"] @ x).sum(), {"b": 1.0})({"a": W}, X), r"nothing for \['a'\].*\['b'\]\.$"),
        (lambda: grouped({"a": 1.0}), r"structure: nothing for \['b'\]\.$"),
        (lambda: grouped({"a": 1.0, "b": 1.0, "c": 1.0}), r"structure: not among its keys \['c'\]\.$"),
        (lambda: grouped({"a": 1.0, "a.0": 1.0, "b": 1.0}), r"structure: more than one entry for \['a.0'\]\.$"),
        (lambda: per_sample.clipped_grad(lambda p, x: (p["a"] @ x).sum(), [1.0])({"a": W}, X), r"it is a list, the argument a dict\.$"),
        (lambda: per_sample_grad(lambda w, xs: sum((w @ x).sum() for x in xs))(W, [X[0], torch.ones(5)]), "stack them"),
        (lambda: per_sample.functional(torch.nn.Linear(3, 2), torch.nn.MSELoss), r"make one: `MSELoss\(\)`"),
    ],
)
def test_the_first_mistakes_are_told_with_a_remedy(call, pattern):
    with pytest.raises(per_sample.PerSampleError, match=pattern):
        call()
