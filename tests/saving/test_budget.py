import re
import time

import pytest

from tf_h5_callback.saving.budget import OverheadBudget, SavingCost


class Run:
    """A simulated training run; returns what saving has added, as a fraction of the time without.

    Args:
      budget: of the saves.
      step: seconds of a step, a function of the number of steps taken.
      stall, writing, slower: of a save: for how long training waits, for how long the file is
        written, by how much steps are slower meanwhile. Each is a function of the number of steps.
      after: by how much they are slower for as long again after that.
    """

    def __init__(
        self, budget, step=0.1, stall=0.05, writing=1.0, slower=0.2, after=0.0, save_steps=None
    ):
        self.budget, self.after, self.save_steps = budget, after, save_steps
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
            self.budget.step_taken(seconds + extra, busy)
            self.useful, self.added = self.useful + seconds, self.added + extra
            self.clock += seconds + extra
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


def test_what_is_told_of_the_cost():
    cost = SavingCost()
    for _ in range(2):
        with cost.stalling():
            time.sleep(0.01)
        with cost.stalling():
            time.sleep(0.005)
        assert cost.stall >= 0.015
        cost.saved(cost.paid)
        assert cost.stall == 0
    told = re.match(r"training waited (\S+) s for 2 checkpoints, (\S+) % of (\S+) s", str(cost))
    waited, percent, total = map(float, told.groups())
    assert 0.03 <= waited <= total and percent == pytest.approx(100 * waited / total, rel=0.1)


def test_the_budget_hears_of_steps_and_saves():
    heard = []

    class Budget:
        pays = True

        def step_taken(self, seconds, writing):
            heard.append((seconds >= 0.005, writing))

        def saved(self, stall, unpaid):
            heard.append((stall >= 0.005, unpaid))

    cost = SavingCost(Budget(), is_writing=lambda: True)
    cost.step_ends()  # no step has begun
    cost.step_begins()
    time.sleep(0.005)
    cost.step_ends()
    with cost.stalling():
        time.sleep(0.005)
    cost.saved(cost.paid)
    cost.saved(paid=False)
    assert heard == [(True, True), (True, False), (False, True)]
