"""Convolution weight gradients against a loop over samples of plain autograd."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from per_sample._kernels.conv import ALGORITHMS, ConvGeometry, choose_conv, conv_weight_grad
from per_sample._kernels.conv_choice import plan_conv, sample_bytes
from per_sample._options import CONV_ALGORITHMS, options

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DIFFERENTIABLE = [name for name in CONV_ALGORITHMS if name != "onednn"]
SQUARE = ConvGeometry((3, 2), (2, 1), (1, 2), (1, 2), 1)
GROUPED = ConvGeometry((2, 3), (1, 2), (2, 0), (2, 1), 2)


def loop(x, g, geometry):
    """The oracle: each sample by itself, by plain autograd."""
    shape = geometry.weight_shape(x.shape, g.shape)
    convolution, grads = CONV[len(geometry.kernel)], [torch.zeros(0, *shape, dtype=x.dtype)]
    for image, grad in zip(x, g, strict=True):
        weight = torch.zeros(shape, dtype=x.dtype, requires_grad=True)
        if image.shape[0] == 0:
            grads.append(weight.detach()[None])
            continue
        arguments = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        out = convolution(image, weight, None, *arguments)
        grads.append(torch.autograd.grad(out, weight, grad)[0][None])
    return torch.cat(grads)


def operands(geometry, n=3, b=1, sizes=(9, 7), i=2, o=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    locations = geometry.locations(sizes)
    x = torch.randn(n, b, i * geometry.groups, *sizes, dtype=dtype, generator=generator)
    g = torch.randn(n, b, o * geometry.groups, *locations, dtype=dtype, generator=generator)
    return x, g


@st.composite
def cases(draw):
    d = draw(st.sampled_from([1, 2, 3]))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(d))

    kernel, stride, dilation = each(1, 5), each(1, 3), each(1, 3)
    padding, groups = each(0, 6), draw(st.sampled_from([1, 1, 2, 3]))
    geometry = ConvGeometry(kernel, stride, padding, dilation, groups)
    # Sizes from the smallest that gives a location, so some inputs are smaller than the kernel.
    axes = zip(kernel, padding, dilation, strict=True)
    least = [max(1, step * (k - 1) + 1 - 2 * p) for k, p, step in axes]
    sizes = tuple(low + draw(st.integers(0, 5)) for low in least)
    n, b = draw(st.sampled_from([0, 1, 3])), draw(st.integers(0, 2))
    return geometry, n, b, sizes, draw(st.integers(1, 3)), draw(st.integers(1, 4))


def serves(name, geometry, dtype):
    return name != "onednn" or (geometry.groups == 1 and dtype == torch.float32)


def test_every_algorithm_has_a_name_among_the_options():
    assert set(ALGORITHMS) == set(CONV_ALGORITHMS)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(cases(), st.sampled_from([1, 3000, 2**26]))
def test_every_algorithm_agrees_with_the_loop(case, scratch):
    geometry, n, b, sizes, i, o = case
    x, g = operands(geometry, n, b, sizes, i, o)
    expected, before = loop(x, g, geometry), (x.clone(), g.clone())
    for name in (None, *DIFFERENTIABLE):
        with options(conv_algorithm=name, scratch_bytes=scratch):
            for functional in (False, True):
                assert_close(conv_weight_grad(x, g, geometry, functional=functional), expected)
    assert_close((x, g), before, rtol=0, atol=0)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(cases())
def test_every_algorithm_in_single_precision(case):
    geometry, n, b, sizes, i, o = case
    x, g = operands(geometry, n, b, sizes, i, o, torch.float32)
    expected = loop(x.double(), g.double(), geometry).float()
    for name in (None, *CONV_ALGORITHMS):
        if name is None or serves(name, geometry, torch.float32):
            with options(conv_algorithm=name):
                assert_close(conv_weight_grad(x, g, geometry), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [(6, 6, 6), (6, 12, 6), (12, 6, 6), (32, 48, 16)], ids=str)
@pytest.mark.parametrize("name", [None, *DIFFERENTIABLE])
def test_depthwise_and_narrow_groups(channels, name):
    inputs, outputs, groups = channels
    geometry = ConvGeometry((3, 3), (2, 1), (1, 1), (1, 1), groups)
    x, g = operands(geometry, 2, 1, (9, 8), inputs // groups, outputs // groups)
    with options(conv_algorithm=name):
        assert_close(conv_weight_grad(x, g, geometry), loop(x, g, geometry))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [None, *DIFFERENTIABLE])
def test_half_precision(name, dtype):
    x, g = operands(GROUPED, dtype=dtype)
    expected = loop(x.double(), g.double(), GROUPED)
    with options(conv_algorithm=name):
        result = conv_weight_grad(x, g, GROUPED)
    assert result.dtype == dtype
    assert_close(result.double(), expected, rtol=3e-2, atol=1e-1)


@pytest.mark.parametrize("geometry", [SQUARE, GROUPED], ids=["square", "grouped"])
def test_complex_conjugates_the_input_as_autograd_does(geometry):
    x, g = operands(geometry, b=2, dtype=torch.complex128)
    assert_close(conv_weight_grad(x, g, geometry), loop(x, g, geometry))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_strided_operands(name):
    x, g = operands(GROUPED, b=2)
    x_strided = x.movedim(2, -1).contiguous().movedim(-1, 2)
    g_strided = g.transpose(0, -1).contiguous().transpose(0, -1)
    with options(conv_algorithm=name):
        assert_close(conv_weight_grad(x_strided, g_strided, GROUPED), loop(x, g, GROUPED))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_product_of_a_stem_is_taken_transposed(groups, monkeypatch):
    geometry = ConvGeometry((3, 2), (1, 2), (1, 0), (1, 1), groups)
    x, g = operands(geometry, 3, 2, (9, 12), 3, 16)
    seen = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda left, right, **kwargs: seen.append(left.shape[1]) or bmm(left, right, **kwargs))
    with options(conv_algorithm="unfold"):
        assert_close(conv_weight_grad(x, g, geometry), loop(x, g, geometry))
    assert seen == [3 * 3 * 2]


def test_transposed_convolution_exchanges_the_roles():
    # Output padding as large as the stride gives more locations than the small operand has.
    stride, padding, dilation, output_padding = (2, 1), (1, 2), (3, 2), (2, 1)
    image = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    expected, grads = [], []
    weight = torch.randn(4, 7, 2, 3, dtype=torch.float64, requires_grad=True)
    for sample in image:
        out = F.conv_transpose2d(sample[None], weight, None, stride, padding, output_padding, 1, dilation)
        grads.append(torch.randn_like(out))
        expected += torch.autograd.grad(out, weight, grads[-1])
    geometry = ConvGeometry((2, 3), stride, padding, dilation, 1)
    result = conv_weight_grad(torch.stack(grads), image[:, None], geometry)
    assert_close(result, torch.stack(expected))


@pytest.mark.parametrize("geometry", [SQUARE, GROUPED], ids=["square", "grouped"])
@pytest.mark.parametrize("name", [None, *DIFFERENTIABLE])
@pytest.mark.parametrize("scratch", [1, 2**26])
def test_derivatives_of_the_gradient(name, geometry, scratch):
    x, g = operands(geometry, 2, 2, (5, 4), 1, 2)
    x.requires_grad_()
    g.requires_grad_()
    with options(conv_algorithm=name, scratch_bytes=scratch):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda *args: conv_weight_grad(*args, geometry), (x, g), fast_mode=True)


# torch's forward-mode rules are scripted.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("geometry", [SQUARE, GROUPED], ids=["square", "grouped"])
@pytest.mark.parametrize("name", [None, *DIFFERENTIABLE])
def test_functorch_transforms(name, geometry):
    x, g = operands(geometry, 2, 2, (6, 5), 1, 2)
    xs, gs = torch.stack([x, 2 * x, x - 1]), torch.stack([g, g + 1, -g])

    def run(x, g):
        return conv_weight_grad(x, g, geometry)

    with options(conv_algorithm=name, scratch_bytes=2000):
        expected = torch.stack([loop(*pair, geometry) for pair in zip(xs, gs, strict=True)])
        assert_close(torch.func.vmap(run)(xs, gs), expected)
        # The map is linear in each operand, so its derivative along one is its value there.
        assert_close(torch.func.jvp(lambda x: run(x, g), (x,), (xs[2],))[1], loop(xs[2], g, geometry))
        cotangent = loop(x, g, geometry)
        (pulled,) = torch.func.vjp(lambda g: run(x, g), g)[1](cotangent)
        assert_close((pulled * gs[1]).sum(), (cotangent * loop(x, gs[1], geometry)).sum())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_and_traces(dynamic):
    x, g = operands(SQUARE)
    compiled = torch.compile(lambda x, g: conv_weight_grad(x, g, SQUARE), backend="eager", dynamic=dynamic)
    assert_close(compiled(x, g), loop(x, g, SQUARE))
    assert_close(compiled(x[:2], g[:2]), loop(x[:2], g[:2], SQUARE))


def test_meta_tensors():
    x, g = operands(GROUPED)
    assert conv_weight_grad(x.to("meta"), g.to("meta"), GROUPED).shape == loop(x, g, GROUPED).shape


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators create and that are still alive."""

    def __init__(self, *inputs):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.seen:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("name", CONV_ALGORITHMS)
@pytest.mark.parametrize("geometry", [SQUARE, GROUPED], ids=["square", "grouped"])
@pytest.mark.parametrize("samples", [0.5, 1, 3, 4.5])
def test_scratch_bound(name, geometry, samples):
    dtype = torch.float32
    if not serves(name, geometry, dtype):
        pytest.skip("one group only")
    x, g = operands(geometry, 16, 2, (19, 17), 3, 5, dtype)
    one = sample_bytes(name, tuple(x.shape), tuple(g.shape), geometry, 4)
    result_bytes = 4 * 16 * g[0, 0, :, 0, 0].numel() * 3 * 6
    with (
        options(conv_algorithm=name, scratch_bytes=int(samples * one)),
        torch.no_grad(),
        _LiveBytes(x, g) as count,
    ):
        conv_weight_grad(x, g, geometry)
    # A few bytes for the placeholder of the weight.
    assert result_bytes < count.peak <= result_bytes + max(1, samples) * one + 256


@pytest.mark.parametrize(
    ("name", "geometry", "dtype", "functional", "message"),
    [
        ("onednn", SQUARE, torch.float64, False, "float64, only torch.float32"),
        ("onednn", SQUARE, torch.float32, True, "differentiable operators"),
        ("onednn", GROUPED, torch.float32, False, "2 groups, only one"),
        ("fold", SQUARE, torch.complex64, False, "has no torch.complex64; allowed: 'unfold'"),
    ],
)
def test_an_override_that_cannot_serve(name, geometry, dtype, functional, message):
    x, g = operands(geometry, dtype=dtype)
    with options(conv_algorithm=name), pytest.raises(ValueError, match=message):
        conv_weight_grad(x, g, geometry, functional=functional)


@pytest.mark.parametrize("shape", [(3, 1, 5, 9, 9), (2, 1, 5, 5, 10)])
def test_shapes_that_do_not_fit(shape):
    x, _ = operands(SQUARE)
    with pytest.raises(ValueError, match=r"not fit the input \(3, 1, 2, 9, 7\): expected \(3, 1, 5, 5, 9\)"):
        conv_weight_grad(x, torch.zeros(shape, dtype=x.dtype), SQUARE)


def choice(x, g, geometry, dtype=torch.float32, device="cpu", functional=True):
    return choose_conv(x, g, geometry, dtype, torch.device(device), functional, 2**26)


def test_the_choice_is_stable():
    def square(kernel, groups=1, padding=0):
        return ConvGeometry((kernel,) * 2, (1, 1), (padding,) * 2, (1, 1), groups)

    large, small = (8, 1, 64, 32, 32), (8, 1, 256, 8, 8)
    assert choice(large, large, square(3, padding=1)) == "fold"
    assert choice(small, small, square(3, padding=1)) == "unfold"
    assert choice(large, large, square(1)) == "unfold"
    assert choice(large, large, square(3, 64, 1)) == "fold"
    assert choice(large, large, square(7, 64, 3)) == "group"
    assert choice(large, large, square(3, 16, 1)) == "fold_merged"
    assert choice(small, small, square(3, 4, 1)) == "fold"
    assert choice(large, large, square(3, padding=1), torch.complex64) == "unfold"
    grey, few, wide = (8, 1, 1, 32, 32), (8, 1, 3, 32, 32), (8, 1, 3, 64, 64)
    assert choice(grey, large, square(3, padding=1)) == "unfold"
    assert choice(grey, large, square(7, padding=3)) == "unfold"
    assert choice(grey, large, square(8, padding=4)) == "group"
    assert choice(few, large, square(3, padding=1)) == "unfold"
    assert choice(wide, (8, 1, 64, 64, 64), square(3, padding=1)) == "fold"
    assert choice(large, grey, square(3, padding=1)) == "group"
    assert choice(large, few, square(3, padding=1)) == "unfold"
    assert choice(large, (8, 1, 128, 32, 32), square(3, 64, 1)) == "unfold"
    line, volume = (8, 1, 64, 200), (8, 1, 3, 8, 9, 10)
    for kernel, expected in ((7, "group"), (31, "group"), (33, "unfold")):
        depthwise = ConvGeometry((kernel,), (1,), (kernel // 2,), (1,), 64)
        assert choice(line, line, depthwise) == expected
    assert choice(volume, volume, ConvGeometry((3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3, 1)) == "group"
    assert choice(large, large, square(3, padding=1), device="cuda") == "unfold"


@settings(deadline=None, max_examples=100, derandomize=True)
@given(cases(), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.complex64]))
def test_the_choice_always_serves(case, functional, dtype):
    geometry, n, b, sizes, i, o = case
    x = (n + 1, b + 1, i * geometry.groups, *sizes)
    g = (n + 1, b + 1, o * geometry.groups, *geometry.locations(sizes))
    arguments = (x, g, geometry, dtype, torch.device("cpu"), functional, 2**20)
    name, step = plan_conv(*arguments)
    assert 1 <= step <= n + 1
    assert plan_conv(*arguments, name) == (name, step)
