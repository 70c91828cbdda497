"""How many samples a batched kernel takes at a time."""

from hypothesis import given
from hypothesis import strategies as st

from per_sample._kernels.threads import samples_at_once

sizes = st.integers(1, 1000)


@given(st.integers(0, 100), sizes, sizes, st.integers(1, 10000), st.integers(1, 16))
def test_memory_is_bounded_and_threads_are_even(n, one, cache, scratch, workers):
    at_once = samples_at_once(n, one, cache, scratch, workers)
    assert 1 <= at_once <= max(1, n)
    assert at_once == 1 or at_once * one <= scratch
    if at_once < n and scratch >= workers * one:
        assert at_once % workers == 0
        assert at_once == workers or at_once * one <= workers * cache


def test_pieces_are_of_one_size():
    assert samples_at_once(8, 1, 7, 100, 1) == 4
    assert samples_at_once(9, 1, 7, 100, 1) == 5
    assert samples_at_once(8, 10, 9, 100, 2) == 2
    assert samples_at_once(8, 10, 9, 10, 2) == 1
    assert samples_at_once(64, 1, 16, 100, 2) == 32
    assert samples_at_once(64, 1, 20, 100, 2) == 32
    assert samples_at_once(5, 1, 1, 3, 2) == 2
    assert samples_at_once(3, 1, 5, 3, 2) == 3
