"""Tests that the stopwatch counts the time of the innermost function only."""

import time

import pytest

from benchmarks.stopwatch import Stopwatch


class Work:
    def outer(self):
        time.sleep(0.05)
        self.inner()
        time.sleep(0.05)
        self.inner()

    def inner(self):
        time.sleep(0.1)

    def fail(self):
        time.sleep(0.05)
        raise ValueError


def test_time_is_counted_once_under_the_innermost_function():
    original = Work.outer
    with Stopwatch() as watch:
        for name in ("outer", "inner", "fail"):
            watch.time(Work, name, name)
        Work().outer()
        with pytest.raises(ValueError):
            Work().fail()
        Work().inner()
    assert watch.seconds["outer"] == pytest.approx(0.1, abs=0.05)
    assert watch.seconds["inner"] == pytest.approx(0.3, abs=0.05)
    assert watch.seconds["fail"] == pytest.approx(0.05, abs=0.04)
    assert Work.outer is original
