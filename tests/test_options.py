"""The options that steer speed and memory."""

import pytest

from per_sample._options import Options, current_options, options


def test_options_nest_and_end():
    assert current_options() == Options()
    with options(conv_algorithm="fold", scratch_bytes=5) as outer:
        with options(scratch_bytes=9):
            assert current_options() == Options("fold", 9)
        assert current_options() is outer
    assert current_options() == Options()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv_algorithm": "quick"}, r"one of 'fold', .*; got 'quick'"),
        ({"scratch_bytes": 0}, "positive integer; got 0"),
        ({"scratch_bytes": 1.5}, r"positive integer; got 1\.5"),
        ({"scratch_bytes": True}, "positive integer; got True"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message), options(**arguments):
        pass
