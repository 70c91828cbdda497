"""A bar over the samples of a call in chunks, for those who ask for one."""

from __future__ import annotations

import functools
import io
import sys
from typing import Any, ClassVar

import pytest
import torch

from per_sample import clipped_grad, explain, options, per_sample_grad, per_sample_grad_norm
from per_sample._options import current_options

W, X = torch.randn(3), torch.randn(7, 3)


def loss(w, x):
    return (w * x).square().sum()


class Bar:
    """Stands for tqdm."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.updates: list[int] = []
        self.closed = False
        Bar.made.append(self)

    def update(self, done: int) -> None:
        assert not self.closed
        self.updates.append(done)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def no_bars():
    Bar.made = []


@pytest.mark.parametrize(("chunk_size", "updates"), [(1, [1] * 7), (3, [3, 3, 1]), (6, [6, 1])])
def test_a_bar_counts_samples(chunk_size, updates):
    with options(progress=Bar):
        found = per_sample_grad(loss, chunk_size=chunk_size)(W, X)
    torch.testing.assert_close(found, 2 * W * X**2)
    (bar,) = Bar.made
    assert bar.settings == {"total": 7, "unit": " samples"}
    assert bar.updates == updates
    assert bar.closed


@pytest.mark.parametrize("chunk_size", [None, 7, 8])
def test_one_run_has_no_bar(chunk_size):
    with options(progress=Bar):
        per_sample_grad(loss, chunk_size=chunk_size)(W, X)
    assert Bar.made == []


def test_by_default_there_is_none_and_it_can_be_switched_off():
    assert current_options().progress is None
    with options(progress=Bar), options(scratch_bytes=5):
        assert current_options().progress is Bar
        with options(progress=False):
            per_sample_grad(loss, chunk_size=2)(W, X)
    assert Bar.made == []


def test_two_passes_are_two_bars():
    with options(progress=Bar):
        clipped_grad(loss, 1.0, memory="low", chunk_size=4)(W, X)
    assert [bar.updates for bar in Bar.made] == [[4, 3], [4, 3]]


def test_samples_of_a_chunk_that_run_apart_are_counted_once():
    with options(progress=Bar, split_batch=True):
        per_sample_grad(lambda w, x: loss(w, x) if x.sum() > 0 else (w * x).sum(), chunk_size=4)(W, X)
    assert [bar.updates for bar in Bar.made] == [[4, 3]]


def test_the_bar_is_closed_when_the_function_raises():
    def fails(w, x):
        if len(Bar.made[0].updates) == 1:
            raise KeyError("no more")
        return loss(w, x)

    with options(progress=Bar), pytest.raises(KeyError):
        per_sample_grad(fails, chunk_size=2)(W, X)
    assert (Bar.made[0].updates, Bar.made[0].closed) == ([2], True)


def test_explained_calls_have_bars_too():
    with options(progress=Bar):
        assert explain(loss, of=per_sample_grad_norm, chunk_size=3)(W, X).runs == 3
    assert [bar.updates for bar in Bar.made] == [[3, 3, 1]]


def test_compiled_calls_have_none():
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(w, x):
        return per_sample_grad(loss, chunk_size=3)(w, x)

    with options(progress=Bar):
        torch.testing.assert_close(compiled(W, X), 2 * W * X**2)
    assert Bar.made == []


def test_tqdm():
    tqdm = pytest.importorskip("tqdm")
    written = io.StringIO()
    with options(progress=functools.partial(tqdm.tqdm, file=written, mininterval=0)):
        per_sample_grad(loss, chunk_size=3)(W, X)
    assert "7/7" in written.getvalue()
    with options(progress=True):
        assert issubclass(current_options().progress, tqdm.tqdm)


def test_true_shows_a_bar_on_the_terminal(capsys):
    pytest.importorskip("tqdm")
    with options(progress=True):
        per_sample_grad(loss, chunk_size=3)(W, X)
    shown = capsys.readouterr()
    assert "7/7" in shown.err
    assert shown.out == ""


def test_without_tqdm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"), options(progress=True):
        pass
    with options(progress=Bar):
        per_sample_grad(loss, chunk_size=3)(W, X)
    assert Bar.made[0].closed


@pytest.mark.parametrize("progress", [1, "yes", 0.5])
def test_what_is_no_bar(progress):
    with pytest.raises(ValueError, match="must be a bool, or a function"), options(progress=progress):
        pass
