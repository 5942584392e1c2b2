import random

import numpy as np
import pytest

from tf_h5_callback.saving import budget
from tf_h5_callback.saving.budget import OverheadBudget, SavingCost


class Run:
    """A simulated training run; returns what saving has added, as a fraction of the time without.

    Args:
      budget: of the saves.
      step: seconds of a step, a function of the number of steps taken.
      stall, writing, slower: of a save: for how long training waits, for how long the file is
        written, by how much steps are slower meanwhile. Each is a function of the number of steps.
      after: by how much they are slower for as long again after that.
      pause: seconds that pass before a step's end besides, and are no training.
    """

    def __init__(
        self,
        budget,
        step=0.1,
        stall=0.05,
        writing=1.0,
        slower=0.2,
        after=0.0,
        save_steps=None,
        pause=lambda n, busy: 0.0,
    ):
        self.budget, self.after, self.save_steps = budget, after, save_steps
        self.pause = pause
        self.given = [
            v if callable(v) else lambda n, v=v: v for v in (step, stall, writing, slower)
        ]
        self.saves, self.useful, self.added = [], 0.0, 0.0
        self.until, self.over, self.clock = 0.0, 0.0, 0.0

    def train(self, steps):
        useful, added = self.useful, self.added
        for n in range(steps):
            seconds, stall, writing, slower = (f(n) for f in self.given)
            busy = self.clock < self.until
            extra = seconds * (slower if busy else self.after if self.clock < self.over else 0.0)
            pause = self.pause(n, busy)
            self.budget.step_taken(seconds + extra + pause, busy)
            self.useful, self.added = self.useful + seconds, self.added + extra
            self.clock += seconds + extra + pause
            forced = self.save_steps is not None and n % self.save_steps == 0
            if self.budget.pays or forced:
                self.budget.saved(stall, unpaid=not self.budget.pays)
                self.saves.append(n)
                self.added += stall
                self.clock += stall
                self.until = self.clock + writing
                self.over = self.until + writing
        return (self.added - added) / (self.useful - useful)


@pytest.mark.parametrize("max_overhead", [0.01, 0.03, 0.1])
@pytest.mark.parametrize(
    "costs",
    [
        {},
        {"stall": 0.5, "slower": 0.0},
        {"stall": 0.001, "writing": 3.0},
        {"step": 5.0, "writing": 0.3},
        {"step": lambda n: 0.05 + 0.1 * (n * 7 % 11) / 11},
        {"step": 0.001, "stall": 0.002, "writing": 0.004},
        {"step": 0.002, "stall": 0.002, "writing": 0.012, "slower": 0.6, "after": 0.15},
    ],
    ids=str,
)
def test_the_budget_is_kept_and_used(max_overhead, costs):
    run = Run(OverheadBudget(max_overhead), **costs)
    run.train(2000)  # learns
    assert run.train(40000) == pytest.approx(max_overhead, rel=0.2)


def test_a_disk_that_becomes_slower_and_faster_again():
    run = Run(OverheadBudget(0.05), writing=lambda n: 6.0 if 20000 <= n < 40000 else 0.5)
    added = run.train(60000)
    assert added == pytest.approx(0.05, rel=0.2)
    in_third = [sum(a <= n < a + 20000 for n in run.saves) for a in (0, 20000, 40000)]
    assert in_third[1] < in_third[0] / 2
    assert in_third[2] == pytest.approx(in_third[0], rel=0.1)


def test_other_triggers_do_not_starve_it():
    """Saves that somebody else asked for are not debited: it goes on as often as by itself."""
    alone = Run(OverheadBudget(0.02))
    alone.train(20000)
    both = Run(OverheadBudget(0.02), save_steps=10)
    both.train(20000)
    assert len(both.saves) > len(alone.saves) + 1000


def test_saves_that_cost_nothing_come_at_each_step():
    run = Run(OverheadBudget(0.01), stall=0.0, slower=0.0, writing=0.0)
    run.train(100)
    assert len(run.saves) > 95


@pytest.mark.parametrize("max_overhead", [0, -0.1])
def test_out_of_range(max_overhead):
    with pytest.raises(ValueError, match="max_overhead is .*must be above 0"):
        OverheadBudget(max_overhead)


class Clock:
    """Stands in for the ``time`` module."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    return clock


def test_what_is_told_of_the_cost(clock):
    cost = SavingCost()
    for _ in range(2):
        with cost.stalling():
            clock.now += 0.25
        with cost.stalling():
            clock.now += 0.5
        assert cost.stall == 0.75
        cost.saved(cost.paid)
        assert cost.stall == 0
        clock.now += 2.25
    assert str(cost) == "training waited 1.5 s for 2 checkpoints, 25 % of 6 s"


def test_the_budget_hears_of_steps_and_saves(clock):
    heard = []

    class Budget:
        pays = True

        def step_taken(self, seconds, writing):
            heard.append((seconds, writing))

        def saved(self, stall, unpaid):
            heard.append((stall, unpaid))

    cost = SavingCost(Budget(), is_writing=lambda: True)
    cost.step_ends()  # no step has begun
    cost.step_begins()
    clock.now += 0.25
    cost.step_ends()
    with cost.stalling():
        clock.now += 0.5
    cost.saved(cost.paid)
    cost.saved(paid=False)
    assert heard == [(0.25, True), (0.5, False), (0, True)]


# What is no training


def longest_distance(saves, start=0):
    after = [n for n in saves if n >= start]
    return max(np.diff([start, *after]))


@pytest.mark.parametrize("pause", [60, 600, 43200])
@pytest.mark.parametrize("at", [0, 5, 3000])
@pytest.mark.parametrize(
    "costs",
    [{}, {"writing": 0.0, "slower": 0.0, "stall": 0.2}, {"writing": 20.0, "slower": 0.1}],
    ids=["background", "foreground", "slow disk"],
)
def test_a_pause_between_two_steps_changes_nothing(pause, at, costs):
    """A closed laptop, a debugger; or the first step, or the sixth, compiles."""
    usual = Run(OverheadBudget(0.03), **costs)
    usual.train(20000)
    run = Run(OverheadBudget(0.03), pause=lambda n, busy: pause if n == at else 0, **costs)
    assert run.train(20000) == pytest.approx(0.03, rel=0.2)
    distance = longest_distance(usual.saves, 3000)
    assert longest_distance(run.saves, max(at, 3000)) <= 3 * distance
    assert len(run.saves) == pytest.approx(len(usual.saves), rel=0.15)


@pytest.mark.parametrize("pause", [60, 600, 43200])
def test_a_pause_while_a_file_is_written(pause):
    paused = []

    def once(n, busy):
        if n < 3000 or not busy or paused:
            return 0
        paused.append(n)
        return pause

    usual = Run(OverheadBudget(0.03))
    usual.train(20000)
    run = Run(OverheadBudget(0.03), pause=once)
    assert run.train(20000) == pytest.approx(0.03, rel=0.2)
    distance = longest_distance(usual.saves, 3000)
    assert longest_distance(run.saves, paused[0]) <= 4 * distance


@pytest.mark.parametrize("max_overhead", [0.01, 0.03])
def test_an_evaluation_now_and_then(max_overhead):
    run = Run(OverheadBudget(max_overhead), pause=lambda n, busy: 5 if n % 1000 == 999 else 0)
    run.train(2000)
    assert run.train(40000) == pytest.approx(max_overhead, rel=0.2)


def test_steps_of_two_kinds():
    """One in ten takes three times as long: a median would not see it."""
    added = []
    for seed in range(8):
        rng = random.Random(seed)
        run = Run(
            OverheadBudget(0.03), step=lambda n, rng=rng: 0.1 * (3 if rng.random() < 0.1 else 1)
        )
        run.train(2000)
        added.append(run.train(40000))
    # Which steps a file is written beside is chance.
    assert sum(added) / len(added) == pytest.approx(0.03, rel=0.25)


def test_steps_that_become_ten_times_faster_or_slower_for_good():
    run = Run(OverheadBudget(0.03), step=lambda n: 1.0 if 20000 <= n < 40000 else 0.1)
    run.train(60000)
    assert run.added / run.useful == pytest.approx(0.03, rel=0.2)
    for start in (0, 20000, 40000):
        assert sum(start <= n < start + 20000 for n in run.saves) > 50
