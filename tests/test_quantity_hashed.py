"""Counter-based random numbers: the published generator, on every device."""

import pytest
import torch

from per_sample._kernels.hashed import below, key, mixed, normal, signs, words

MASK = 2**64 - 1


def split_mix(state):
    """SplitMix64's output for a state, in whole numbers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def as_signed(x):
    return x - 2**64 if x >= 2**63 else x


def test_the_published_numbers():
    # The first outputs of the generator's reference program for the seed 1234567.
    states = [(1234567 + 0x9E3779B97F4A7C15 * step) & MASK for step in range(1, 4)]
    found = mixed(torch.tensor([as_signed(s) for s in states]))
    assert [x & MASK for x in found.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_mixing_agrees_with_whole_numbers():
    states = [0, 1, 2**63 - 1, 2**63, MASK, 0x0123456789ABCDEF, 0xFEDCBA9876543210]
    found = mixed(torch.tensor([as_signed(s) for s in states]))
    assert [x & MASK for x in found.tolist()] == [split_mix(s) for s in states]


def test_keys_depend_on_each_number_and_its_place():
    keys = [key(1, 2, 3), key(1, 3, 2), key(2, 1, 3), key(1, 2), key(1, 2, 3, 0), key(-1, 2, 3), key(1, 2, 2**64 - 1)]
    assert len(set(keys)) == len(keys)


def test_words_are_functions_of_their_place():
    columns = torch.tensor([[5, 0, 7], [2**40, 5, 1]])
    whole = words(key(4), 6, columns)
    assert torch.equal(words(key(4), 3, columns), whole[:3])
    assert torch.equal(words(key(4), 6, columns[:, 1:2]), whole[:, :, 1:2])
    assert torch.equal(whole[:, 0, 0], whole[:, 1, 1])
    assert whole.unique().numel() == 6 * 5


def test_limits():
    columns = torch.arange(5000)
    limits = torch.tensor([1, 3, 2**31 - 1])
    found, negative = below(key(9), limits, columns)
    assert (found >= 0).all()
    assert (found < limits[:, None]).all()
    assert found[1].unique().tolist() == [0, 1, 2]
    assert found[2].max() > 2**30
    assert negative.unique().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers_are_finite(dtype):
    x = normal(key(2), 3, torch.arange(100_000), dtype)
    assert x.dtype == dtype
    assert x.isfinite().all()
    assert abs(x.double().var() - 1) < 5 * (2 / x.numel()) ** 0.5


@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_compiled():
    def run(start):
        return signs(key(3), 70, torch.arange(start, start + 100), torch.float32)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, fullgraph=True)(7), run(7))


def test_the_op_is_well_declared():
    torch.library.opcheck(words, (key(3), 5, torch.arange(7)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    columns = torch.arange(10_000)
    assert torch.equal(words(key(3), 5, columns.cuda()).cpu(), words(key(3), 5, columns))
    assert torch.equal(signs(key(3), 70, columns.cuda(), torch.float32).cpu(), signs(key(3), 70, columns, torch.float32))
    torch.testing.assert_close(normal(key(3), 5, columns.cuda(), torch.float64).cpu(), normal(key(3), 5, columns, torch.float64))
