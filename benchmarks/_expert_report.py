"""The tables of `experts`: right answers of each kind, interference, and what later tasks leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks._expert_kinds import ALL_RATES, KINDS, with_rate, without_rate
from benchmarks._run import RESAMPLES, Table, interval
from benchmarks._store import Measured, answers

ONE_LORA = "one_lora"
# endings of kinds that are another measurement of the kind without it
ALONE, THEN = "_alone", "_then"

# the share of the seeds in which each item of a task was answered right
ByTask = Mapping[str, np.ndarray]


def tables() -> dict[str, Table]:
    """Those of TABLES.md."""
    return report(list(answers("experts").values()))


def report(found: Sequence[Measured]) -> dict[str, Table]:
    """Means over tasks, and over the seeds of each, with 95 % intervals by bootstrap over the items of each task."""
    kinds: dict[str, list[Measured]] = {}
    for each in found:
        kinds.setdefault(each.key.way, []).append(each)
    by_task = {name: _by_task(own) for name, own in kinds.items()}
    first = list(by_task.get(ONE_LORA, {}))
    chosen = _chosen(kinds, first)
    tried = [kind for kind in chosen if sum(with_rate(kind, rate) in by_task for rate in ALL_RATES) > 1]
    variants = [chosen[kind] for kind in chosen if kind not in tried]
    return {
        "experts": _scores(kinds, by_task, [chosen[kind] for kind in tried], chosen.get(ONE_LORA, ONE_LORA), first),
        "experts, rates": _rates(kinds, by_task, tried, first),
        "experts, variants": _scores(kinds, by_task, variants, ONE_LORA, first),
        "experts, interference": _interference(by_task),
        "experts, retention": _retention(kinds, by_task, first),
    }


def _chosen(kinds: Mapping[str, Sequence[Measured]], first: Sequence[str]) -> dict[str, str]:
    """The name of each kind with the rate, of those it was tried with, whose last steps had the lowest mean loss.

    Their rows had not been seen before: no item of a test is looked at. Seeds count that all rates of the kind have.
    """
    losses: dict[str, dict[str, dict[tuple[int, str], float]]] = {}
    for name, own in kinds.items():
        kind, _ = without_rate(name)
        if kind == "base" or name.endswith((ALONE, THEN)) or {each.key.task for each in own} < set(first):
            continue
        last = {(each.key.seed, each.key.task): each.notes["last_loss"] for each in own if "last_loss" in each.notes}
        losses.setdefault(kind, {})[name] = last
    found = {}
    for kind, rates in losses.items():
        common = set.intersection(*map(set, rates.values()))
        found[kind] = min(rates, key=lambda name: sum(rates[name][key] for key in common))
    return found


def _scores(
    kinds: Mapping[str, Sequence[Measured]],
    by_task: Mapping[str, ByTask],
    names: Sequence[str],
    one_lora: str,
    first: Sequence[str],
) -> Table:
    """Each kind at its rate, above this one LoRA."""
    columns = ("kind", "rate", "seeds", "task given", "M parameters", "right answers", "by seed")
    title = f"each kind at its rate, beside {one_lora}"
    table = Table(title, (*columns, f"above {one_lora}", "loss", "least above, by task"))
    for name in sorted(names, key=lambda name: -_mean(_of(by_task[name], first))):
        kind, rate = without_rate(name)
        own = [each for each in kinds[name] if each.key.task in first]
        above = _difference(_of(by_task[name], first), by_task[one_lora])
        least = min(above, key=lambda task: float(above[task].mean()))
        table.add(
            kind,
            rate,
            str(_num_seeds(own)),
            "yes" if KINDS[kind].given else "",
            f"{own[0].notes.get('parameters', 0) / 1e6:.1f}",
            _interval(_of(by_task[name], first)),
            _range(own),
            "" if name == one_lora else _interval(above),
            f"{np.mean([each.loss for each in own]):.3f}",
            "" if name == one_lora else f"{least} {above[least].mean():+.2f}",
        )
    return table


def _rates(
    kinds: Mapping[str, Sequence[Measured]], by_task: Mapping[str, ByTask], tried: Sequence[str], first: Sequence[str]
) -> Table:
    """Right answers at each rate, with how many seeds, and the loss that one was chosen by."""
    columns = (f"{rate}: right answers (seeds), last loss" for rate in ALL_RATES)
    table = Table("at other rates", ("kind", *columns))
    for kind in tried:
        cells = []
        for name in (with_rate(kind, rate) for rate in ALL_RATES):
            own = [each for each in kinds.get(name, ()) if each.key.task in first]
            last = [each.notes["last_loss"] for each in own if "last_loss" in each.notes]
            loss = f", {np.mean(last):.2f}" if last else ""
            cells.append(f"{_mean(_of(by_task[name], first)):.3f} ({_num_seeds(own)}){loss}" if own else "")
        table.add(kind, *cells)
    return table


def _interference(by_task: Mapping[str, ByTask]) -> Table:
    """Right answers in the mixture above those alone on as many rows of the task: below 0, tasks are in each other's way."""
    names = [name for name in by_task if set(by_task.get(name + ALONE, ())) == set(by_task[name])]
    tasks = list(by_task[names[0]]) if names else []
    table = Table("interference", ("in the mixture above alone", "all tasks", *tasks))
    for name in names:
        above = _difference(by_task[name], by_task[name + ALONE])
        table.add(name, _interval(above), *(_interval({task: above[task]}) for task in tasks))
    return table


def _retention(kinds: Mapping[str, Sequence[Measured]], by_task: Mapping[str, ByTask], first: Sequence[str]) -> Table:
    """The first tasks before and after the others were trained, by the seeds that have both, and those others."""
    table = Table("retention", ("kind", "seeds", "before", "after", "after above before", "the later tasks"))
    for name in by_task:
        if not set(by_task.get(name + THEN, ())) > set(first):
            continue
        seeds = {each.key.seed for each in kinds[name + THEN]}
        before = _of(_by_task([each for each in kinds[name] if each.key.seed in seeds]), first)
        after = _of(by_task[name + THEN], first)
        later = {task: values for task, values in by_task[name + THEN].items() if task not in first}
        cells = [_interval(each) for each in (before, after, _difference(after, before), later)]
        table.add(name, str(len(seeds)), *cells)
    return table


def _num_seeds(found: Sequence[Measured]) -> int:
    return len({each.key.seed for each in found})


def _by_task(found: Sequence[Measured]) -> dict[str, np.ndarray]:
    tasks = dict.fromkeys(each.key.task for each in found)
    return {task: np.mean([each.right_N for each in found if each.key.task == task], axis=0) for task in tasks}


def _of(by_task: ByTask, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    return {task: by_task[task] for task in tasks}


def _difference(by_task: ByTask, other: ByTask) -> dict[str, np.ndarray]:
    return {task: by_task[task] - other[task] for task in other}


def _mean(by_task: ByTask) -> float:
    return float(np.mean([values.mean() for values in by_task.values()]))


def _range(found: Sequence[Measured]) -> str:
    """The lowest and the highest mean of a seed."""
    seeds = {each.key.seed for each in found}
    means = [_mean(_by_task([each for each in found if each.key.seed == seed])) for seed in seeds]
    return f"{min(means):.3f} to {max(means):.3f}"


def _interval(by_task: ByTask) -> str:
    generator = np.random.default_rng(0)
    drawn = [
        _mean({task: values[generator.integers(0, len(values), len(values))] for task, values in by_task.items()})
        for _ in range(RESAMPLES)
    ]
    return interval(np.array([_mean(by_task), *drawn]), 3)
