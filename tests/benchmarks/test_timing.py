"""The arithmetic of comparisons on a clock that only moves when a way runs."""

from __future__ import annotations

import pytest

from benchmarks import _timing as timing
from benchmarks._run import Run


class Clock:
    """Ways whose runs take the given seconds, the last of them for ever; `log` has every call in its order."""

    def __init__(self, seconds):
        self.now = 0.0
        self.log = []
        self.ways = {name: timing.Way(self._run(name, list(each)), self._prepare(name)) for name, each in seconds.items()}

    def __call__(self):
        return self.now

    def _run(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds.pop(0) if len(seconds) > 1 else seconds[0]

        return run

    def _prepare(self, name):
        def prepare():
            self.log.append(f"prepare {name}")
            self.now += 1000.0

        return prepare


def measured(seconds, rounds=3, budget=1e9):
    clock = Clock(seconds)
    return clock, timing.interleaved(clock.ways, rounds=rounds, seconds=budget, clock=clock)


def test_the_first_run_of_every_way_is_not_counted():
    _, taken = measured({"a": [50.0, 1.0], "b": [70.0, 2.0]})
    assert taken == {"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]}


def test_preparing_is_not_timed():
    clock, taken = measured({"a": [1.0]}, rounds=1)
    assert clock.log == ["prepare a", "a"] * 2
    assert taken == {"a": [1.0]}


def test_each_round_begins_with_the_next_way():
    clock, _ = measured({"a": [1.0], "b": [1.0], "c": [1.0]}, rounds=4)
    runs = "".join(name for name in clock.log if len(name) == 1)
    assert runs == "abc" + "abc" + "bca" + "cab" + "abc"


def test_no_round_begins_that_would_end_after_the_budget():
    # warm-up 1001, then 1001 a round: the third would end at 4004
    _, taken = measured({"a": [1.0]}, rounds=10, budget=4003.0)
    assert taken == {"a": [1.0, 1.0]}


def test_one_round_is_made_whatever_the_budget():
    _, taken = measured({"a": [1.0]}, rounds=10, budget=0.0)
    assert taken == {"a": [1.0]}


def test_a_ratio_is_the_median_over_rounds_of_the_quotient_within_a_round():
    # the machine slows down tenfold in the last round, which changes no quotient: 2, 3, 4, 5 and 9
    taken = {"a": [1.0, 1.0, 2.0, 1.0, 10.0], "b": [2.0, 3.0, 8.0, 5.0, 90.0]}
    first, second = timing.ratios(taken, reference="a")
    assert (first.median, first.low, first.high) == (1.0, 1.0, 1.0)
    assert (second.name, second.low, second.median, second.high) == ("b", 3.0, 4.0, 5.0)


def test_a_rate_is_work_over_time():
    taken = {"a": [8.0], "b": [2.0]}
    _, faster = timing.ratios(taken, reference="a", work={"a": 4.0, "b": 3.0}, rate=True)
    assert faster.median == (3.0 / 2.0) / (4.0 / 8.0)
    _, cheaper = timing.ratios(taken, reference="a", work={"a": 4.0, "b": 3.0})
    assert cheaper.median == (2.0 / 3.0) / (8.0 / 4.0)


@pytest.mark.parametrize("difference", [1.1e-4, float("inf"), float("nan")])
def test_a_red_gate_ends_the_benchmark_and_is_named(difference):
    gates = [timing.Gate("losses equal", 0.0, 1e-4), timing.Gate("logits equal", difference, 1e-4)]
    with pytest.raises(SystemExit, match="logits equal"):
        timing.require(gates)


def test_a_difference_at_the_limit_is_green(capsys):
    timing.require([timing.Gate("logits equal", 1e-4, 1e-4)])
    assert "green" in capsys.readouterr().out


@pytest.mark.parametrize(("rounds", "warned"), [(2, True), (3, False)])
def test_a_table_of_too_few_rounds_says_so(capsys, rounds, warned):
    timing.compare(Run(), "t", {"a": timing.Way(lambda: None)}, {"time": ("a", False)}, rounds=rounds)
    assert ("no figures to quote" in capsys.readouterr().out) is warned


def test_a_table_has_a_row_for_every_way_and_says_how_many_rounds(capsys):
    ways = {"fast way": timing.Way(lambda: None), "slow way": timing.Way(lambda: None)}
    timing.compare(Run(), "some title", ways, {"time, fast = 1": ("fast way", False)}, rounds=2)
    printed = capsys.readouterr().out
    assert "some title, 2 rounds" in printed
    assert [line.split()[1] for line in printed.splitlines() if " way " in line and "25" not in line] == ["fast", "slow"]
