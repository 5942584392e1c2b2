import pytest

from tf_h5_callback.saving.timer import SaveTimer


def fires(timer, steps):
    fired = []
    for step in steps:
        if timer.is_due(step):
            timer.update(step)
            fired.append(step)
    return fired


def test_needs_a_trigger():
    with pytest.raises(ValueError, match="save_steps .* save_secs"):
        SaveTimer()


@pytest.mark.parametrize("kwargs", [{"save_steps": 0}, {"save_secs": 0}, {"save_secs": -1.0}])
def test_out_of_range(kwargs):
    with pytest.raises(ValueError, match="must be"):
        SaveTimer(**kwargs)


def test_every_second_step_beginning_with_the_first():
    assert fires(SaveTimer(2), range(1, 7)) == [1, 3, 5]


def test_steps_that_jump():
    assert fires(SaveTimer(10), range(5, 31, 5)) == [5, 15, 25]
    assert fires(SaveTimer(10), [1, 8, 19, 20, 29]) == [1, 19, 29]


def test_primed_by_a_restore():
    timer = SaveTimer(10)
    timer.update(100)
    assert timer.last_step == 100
    assert fires(timer, range(101, 125)) == [110, 120]


def test_never_twice_at_one_step(clock):
    timer = SaveTimer(save_secs=1)
    assert fires(timer, [7, 7]) == [7]
    clock.now += 5
    assert fires(timer, [7, 8, 8]) == [8]


def test_seconds(clock):
    timer = SaveTimer(save_secs=60)
    fired = []
    for step in range(1, 200):
        fired += fires(timer, [step])
        clock.now += 1
    assert fired == [1, 61, 121, 181]


def test_both_whichever_comes_first(clock):
    timer = SaveTimer(save_steps=10, save_secs=60)
    timer.update(0)
    assert fires(timer, range(1, 12)) == [10]
    clock.now += 59
    assert fires(timer, [12]) == []
    clock.now += 1
    assert fires(timer, [13, 14]) == [13]
    assert fires(timer, range(15, 24)) == [23]
