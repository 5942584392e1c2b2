import pytest

pytest.importorskip("tensorflow.compat.v1")

from tf_h5_callback.graph.steps import StepWatch


def test_a_run_may_be_one_increment_further_than_it_fetched():
    watch = StepWatch()
    watch.begin(20)
    assert [watch.fetched(step) for step in (20, 21, 22)] == [21, 22, 23]
    assert watch.seen == 22 and watch.possible == 23


def test_the_largest_increment_counts():
    watch = StepWatch()
    assert watch.fetched(100) == 101
    assert [watch.fetched(step) for step in (105, 106, 106)] == [110, 111, 111]
