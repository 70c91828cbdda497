"""The counterparts of `torch.nn.grad` against a loop over samples of plain autograd."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import per_sample._options
import per_sample.grad
from per_sample.grad import embedding_weight, linear_weight

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES = (8, 7, 6)


def conv_weight(d):
    return getattr(per_sample.grad, f"conv{d}d_weight")


def conv_input(d):
    return getattr(per_sample.grad, f"conv{d}d_input")


@st.composite
def convolutions(draw):
    d = draw(st.sampled_from([1, 2, 3]))

    def some(low, high):
        if draw(st.booleans()):
            return draw(st.integers(low, high))
        return tuple(draw(st.integers(low, high)) for _ in range(d))

    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = 1 if padding == "same" else some(1, 3)
    padding = some(0, 3) if padding == "numbers" else padding
    groups = draw(st.sampled_from([1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(d))
    weight_size = (groups * draw(st.integers(1, 3)), draw(st.integers(1, 2)), *kernel)
    return d, draw(st.sampled_from([0, 1, 4])), weight_size, (stride, padding, some(1, 2), groups)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=120, derandomize=True)
@given(convolutions())
def test_convolutions(case):
    d, n, weight_size, arguments = case
    x = torch.randn(n, weight_size[1] * arguments[-1], *SIZES[:d], dtype=torch.float64)
    weight = torch.randn(weight_size, dtype=torch.float64, requires_grad=True)
    grads, weights, inputs = [], [torch.zeros(0, *weight_size).double()], [torch.zeros_like(x[:0])]
    # One sample more, so that an empty batch has a shape for its output gradient.
    for sample in (*x, torch.zeros(x.shape[1:], dtype=x.dtype)):
        leaf = sample[None].clone().requires_grad_()
        out = CONV[d](leaf, weight, None, *arguments)
        grads.append(torch.randn_like(out))
        by_input, by_weight = torch.autograd.grad(out, (leaf, weight), grads[-1])
        weights.append(by_weight[None])
        inputs.append(by_input)
    g = torch.cat(grads)[:n]
    assert_close(conv_weight(d)(x, weight_size, g, *arguments), torch.cat(weights)[:n])
    assert_close(conv_input(d)(x.shape, weight.detach(), g, *arguments), torch.cat(inputs)[:n])


@pytest.mark.parametrize("d", [1, 2, 3])
def test_convolutions_sum_to_torch(d):
    x = torch.randn(4, 6, *SIZES[:d], dtype=torch.float64)
    weight = torch.randn(9, 2, *(3, 2, 4)[:d], dtype=torch.float64)
    arguments = (2, 1, 1, 3)
    g = torch.randn_like(CONV[d](x, weight, None, *arguments))
    total = getattr(torch.nn.grad, f"conv{d}d_weight")(x, weight.shape, g, *arguments)
    assert_close(conv_weight(d)(x, weight.shape, g, *arguments).sum(0), total)


@pytest.mark.parametrize("padding", ["same", 1])
def test_convolution_derivatives_and_transforms(padding):
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(F.conv2d(x, weight, padding=padding)).requires_grad_()

    def by_weight(x, g):
        return conv_weight(2)(x, weight.shape, g, padding=padding)

    def by_input(weight, g):
        return conv_input(2)(x.shape, weight, g, padding=padding)

    for function, arguments in ((by_weight, (x, g)), (by_input, (weight, g))):
        assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)
    xs, gs = torch.stack([x, x + 1, -x]).detach(), torch.stack([g, 2 * g, g]).detach()
    expected = torch.stack([by_weight(*pair) for pair in zip(xs, gs, strict=True)])
    assert_close(torch.func.vmap(by_weight)(xs, gs), expected)


def _loop(function, weight_size, inputs, grads):
    weight = torch.zeros(weight_size, dtype=grads.dtype, requires_grad=True)
    pairs = zip(inputs, grads, strict=True)
    rows = [torch.autograd.grad(function(sample, weight), weight, grad)[0][None] for sample, grad in pairs]
    return torch.cat([weight.detach().new_zeros(0, *weight_size), *rows])


@pytest.mark.parametrize("middle", [(), (1,), (7,), (7, 2), (0,)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 4])
def test_linear(n, middle):
    x = torch.randn(n, *middle, 3, dtype=torch.float64)
    g = torch.randn(n, *middle, 5, dtype=torch.float64)
    assert_close(linear_weight(x, (5, 3), g), _loop(F.linear, (5, 3), x, g))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("middle", [(), (1,), (7,), (7, 2), (0,)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_embedding(n, middle, padding_idx, scale, dtype):
    indices = torch.randint(6, (n, *middle), dtype=dtype)
    g = torch.randn(n, *middle, 3, dtype=torch.float64)

    def embed(sample, weight):
        return F.embedding(sample, weight, padding_idx, scale_grad_by_freq=scale)

    result = embedding_weight(indices, (6, 3), g, padding_idx, scale)
    assert_close(result, _loop(embed, (6, 3), indices, g))


@pytest.mark.parametrize("scale", [False, True])
def test_embedding_derivatives_and_transforms(scale):
    indices, g = torch.randint(6, (3, 5)), torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)

    def run(indices, g):
        return embedding_weight(indices, (6, 2), g, 1, scale)

    assert torch.autograd.gradcheck(lambda g: run(indices, g), (g,))
    more, gs = torch.stack([indices, 5 - indices]), torch.stack([g, g + 1]).detach()
    expected = torch.stack([run(*pair) for pair in zip(more, gs, strict=True)])
    assert_close(torch.func.vmap(run)(more, gs), expected)


@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_out_of_range_does_not_reach_another_sample(index):
    indices = torch.tensor([[0, 1], [2, index], [3, 4]])
    with pytest.raises(RuntimeError, match="out of bounds"):
        embedding_weight(indices, (6, 1), torch.ones(3, 2, 1))


def test_compiles():
    x, g = torch.randn(4, 3, 9), torch.randn(4, 5, 9)
    run = torch.compile(per_sample.grad.conv1d_weight, backend="eager", fullgraph=True)
    plain = per_sample.grad.conv1d_weight(x, (5, 3, 4), g, padding="same")
    assert_close(run(x, (5, 3, 4), g, padding="same"), plain)


def zeros(*shape):
    return torch.zeros(shape)


CONV2D_INPUT, CONV2D_WEIGHT = per_sample.grad.conv2d_input, per_sample.grad.conv2d_weight


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: CONV2D_WEIGHT(zeros(2, 3, 5), (4, 3, 2, 2), zeros(2, 4, 4, 4)),
            "`input` must have",
        ),
        (
            lambda: CONV2D_WEIGHT(zeros(2, 3, 5, 5), (4, 3, 2), zeros(2, 4, 4, 4)),
            "weight must have",
        ),
        (
            lambda: CONV2D_WEIGHT(zeros(2, 3, 5, 5), (4, 2, 2, 2), zeros(2, 4, 4, 4)),
            "needs 2 input",
        ),
        (
            lambda: CONV2D_WEIGHT(zeros(2, 3, 5, 5), (4, 3, 2, 2), zeros(2, 4, 4, 5)),
            r"`grad_output` must have the shape \(2, 4, 4, 4\); got \(2, 4, 4, 5\)",
        ),
        (
            lambda: CONV2D_WEIGHT(zeros(2, 3, 5, 5), (4, 3, 2, 2), zeros(2, 4, 4, 4), stride=0),
            "`stride` must be an integer or 2 integers, each at least 1; got 0",
        ),
        (
            lambda: CONV2D_WEIGHT(zeros(2, 3, 5, 5), (4, 3, 2, 2), zeros(2, 4, 4, 4), padding=(1, 1, 1)),
            "`padding` must be an integer or 2 integers",
        ),
        (
            lambda: CONV2D_WEIGHT(zeros(2, 3, 5, 5), (4, 3, 2, 2), zeros(2, 4, 4, 4), padding="full"),
            'must be integers, "same" or "valid"; got \'full\'',
        ),
        (
            lambda: CONV2D_WEIGHT(zeros(2, 3, 5, 5), (4, 3, 2, 2), zeros(2, 4, 4, 4), 2, "same"),
            "needs a stride of 1; got 2",
        ),
        (lambda: CONV2D_WEIGHT(zeros(2, 3, 5, 5), (4, 3, 2, 2), zeros(2, 4, 4, 4), groups=0), "got 0"),
        (
            lambda: CONV2D_INPUT((2, 3, 5), zeros(4, 3, 2, 2), zeros(2, 4, 4, 4)),
            "`input_size` must be",
        ),
        (lambda: CONV2D_INPUT((2, 3, 5, 5), zeros(4, 3, 2, 2), zeros(1, 4, 4, 4)), r"shape \(2, 4, 4, 4\)"),
        (lambda: linear_weight(zeros(2, 3), (4, 5), zeros(2, 4)), r"must be \(n, \*, 5\)"),
        (lambda: linear_weight(zeros(2, 5), (4,), zeros(2, 4)), r"`weight_size` must be \(o, i\)"),
        (lambda: linear_weight(zeros(2, 7, 5), (4, 5), zeros(2, 4)), r"shape \(2, 7, 4\); got \(2, 4\)"),
        (lambda: embedding_weight(zeros(2, 3), (4, 5), zeros(2, 3, 5)), "`indices` must be integers"),
        (lambda: embedding_weight(zeros(2, 3).long(), (4,), zeros(2, 3, 5)), r"must be \(v, d\)"),
        (lambda: embedding_weight(zeros(2, 3).long(), (4, 5), zeros(2, 3)), r"shape \(2, 3, 5\)"),
        (
            lambda: embedding_weight(zeros(2, 3).long(), (4, 5), zeros(2, 3, 5), 4),
            r"within \[-4, 4\); got 4",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("module", [per_sample.grad, per_sample._options])
def test_the_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
