"""Compares ways of doing one thing: interleaved in one process, as ratios to the first, and only if their results agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks._run import Run, Table, console

# with fewer, a pause of the machine in one of them moves the median
ENOUGH_ROUNDS = 3


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Way:
    """One way to do it. `prepare` runs before each `run` and is not timed; `work` is how much of it one run does."""

    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    work: float = 1.0


@dataclass(frozen=True)
class Gate:
    """Two results that must be equal: `difference` is relative to the size of the values, `limit` the most that is right."""

    what: str
    difference: float
    limit: float

    @property
    def green(self) -> bool:
        # so that NaN is red
        return self.difference <= self.limit


@dataclass(frozen=True)
class Ratio:
    """A way's cost or speed relative to the reference: the median over rounds and the 25 and 75 % quantiles."""

    name: str
    median: float
    low: float
    high: float


def require(gates: Sequence[Gate]) -> None:
    """Prints each gate. Raises SystemExit, so that nothing is measured, when one is red."""
    for gate in gates:
        colour = "green" if gate.green else "red"
        console.print(f"[{colour}]{colour}[/] {gate.what}: {gate.difference:.1e}, at most {gate.limit:.0e}")
    red = [gate.what for gate in gates if not gate.green]
    if red:
        raise SystemExit(f"nothing is reported, since the results differ: {'; '.join(red)}")


def interleaved(
    ways: Mapping[str, Way],
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    timer: Callable[[], float] | None = None,
    label: str = "rounds",
) -> dict[str, list[float]]:
    """Seconds of every way in every round, by `timer`; the budget is kept by `clock`, which by default is the timer too.

    All ways run once without being timed, then once in each round. A round begins with another way each time, so that none
    always follows the same one. It ends after `rounds`, or before a round that would go beyond `seconds` (warm-up included)
    if it took as long as the last; one round is always made.
    """
    timer = timer or clock
    names = list(ways)
    taken: dict[str, list[float]] = {name: [] for name in names}
    started = clock()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.add_task(label, total=rounds)
        for way in ways.values():
            way.prepare()
            way.run()
        last = 0.0
        for number in range(rounds):
            begun = clock()
            if number and begun - started + last > seconds:
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                ways[name].prepare()
                before = timer()
                ways[name].run()
                taken[name].append(timer() - before)
            last = clock() - begun
            progress.advance(shown)
    return taken


def ratios(
    taken: Mapping[str, Sequence[float]], *, reference: str, work: Mapping[str, float] | None = None, rate: bool = False
) -> list[Ratio]:
    """Time per unit of work relative to `reference`, divided within each round; `rate` inverts it to work per time."""
    per_unit = {name: np.asarray(values) / (work or {}).get(name, 1.0) for name, values in taken.items()}
    found = []
    for name, values in per_unit.items():
        each = per_unit[reference] / values if rate else values / per_unit[reference]
        low, median, high = np.percentile(each, [25, 50, 75])
        found.append(Ratio(name, float(median), float(low), float(high)))
    return found


def compare(
    run: Run,
    title: str,
    ways: Mapping[str, Way],
    tables: Mapping[str, tuple[str, bool]],
    *,
    rounds: int = 15,
    seconds: float = 60.0,
) -> None:
    """Measures and shows. `tables`: heading -> (the way that is 1, whether more is better: work per time).

    `rounds` and `seconds` are those of this measurement unless the run was asked for others. --cpu counts the process's
    processor time, which leaves out its pauses on a busy machine; it means something for one thread only, since the times
    of all threads are summed.
    """
    taken = timed(run, title, ways, rounds=rounds, seconds=seconds)
    num_rounds = len(next(iter(taken.values())))
    work = {name: way.work for name, way in ways.items()}
    headings = (cell for heading in tables for cell in (heading, "25-75 %"))
    clock, threads = " of processor time" if run.cpu else "", f"{run.threads or 'all'} thread(s)"
    table = Table(f"{title}, {num_rounds} rounds{clock}, {threads}", ("way", *headings))
    columns = [ratios(taken, reference=reference, work=work, rate=rate) for reference, rate in tables.values()]
    for row in zip(*columns, strict=True):
        cells = (cell for ratio in row for cell in (f"{ratio.median:.2f}", f"{ratio.low:.2f}-{ratio.high:.2f}"))
        table.add(row[0].name, *cells)
    run.show(table)
    if num_rounds < ENOUGH_ROUNDS:
        console.print(f"[red]fewer than {ENOUGH_ROUNDS} rounds: no figures to quote[/]; raise --seconds")


def timed(run: Run, title: str, ways: Mapping[str, Way], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of every way in every round, as many as the run was asked for and by its clock."""
    timer = time.process_time if run.cpu else time.perf_counter
    rounds, seconds = run.rounds or rounds, run.seconds or seconds
    return interleaved(ways, rounds=rounds, seconds=seconds, timer=timer, label=title)
