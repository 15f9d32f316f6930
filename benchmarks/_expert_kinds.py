"""What `experts` compares: recipes at about as many parameters, LoRAs without a mixture, and the tables of their answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks._data import Measured, answers
from benchmarks._models import ALL
from benchmarks._run import RESAMPLES, Table, interval

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# 32 rank rows at each layer, in experts of rank 4, as far as a recipe can; those of feed-forward layers have 48
NUM_EXPERTS, RANK, FORWARD_RANK = 8, 4, 6
# the gates of a mixture are about 4 rank rows more
ONE = {"num_experts": (1,), "top_k": 1, "balance": 0.0}
# all experts have the same scale, twice the rank over the rank
DEFAULTS = {"target_modules": ALL, "alpha": None, "dropout": 0.0}


@dataclass(frozen=True)
class Kind:
    """A recipe with its options.

    `given` says that a call names each row's task, `apart` that each task has a model alone, for its share of the steps,
    `shares` that the tasks, which are the experts, share the rank rows, `then` that other tasks are trained after these, and
    `federated` that each task is a client, which exchanges experts with the others. `lr` is another than the recipe's.
    """

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    given: bool = False
    apart: bool = False
    shares: bool = False
    then: bool = False
    federated: bool = False
    lr: float | None = None

    def all_options(self, num_tasks: int) -> dict[str, Any]:
        rank = {"rank": NUM_EXPERTS * RANK // num_tasks} if self.shares else {}
        return {**DEFAULTS, **rank, **self.options}


def experts(rank: int = RANK, num_experts: Any = NUM_EXPERTS, **options: Any) -> dict[str, Any]:
    return {"rank": rank, "num_experts": num_experts, **options}


def forward_experts(rank: int = FORWARD_RANK, num_experts: int = NUM_EXPERTS, **options: Any) -> dict[str, Any]:
    return experts(rank, num_experts, target_modules=FEED_FORWARD, **options)


ONE_LORA = {**ONE, "rank": NUM_EXPERTS * RANK + 4}
# where moral and loramoe have theirs
ONE_FORWARD_LORA = {**ONE, "rank": NUM_EXPERTS * FORWARD_RANK + 4, "target_modules": FEED_FORWARD}
MOLA = experts(num_experts=(8, 8, 8, 8))
OCTAVIUS = experts(2 * RANK, NUM_EXPERTS // 2)
# its layers are one product more for each rank
FLORA = {"rank": 2, "mode": "multiplicative"}

_AT_3E_3: Mapping[str, Kind] = {
    "one_lora": Kind("mola", ONE_LORA),
    "one_forward_lora": Kind("mola", ONE_FORWARD_LORA),
    "one_lora_active": Kind("mola", {**ONE, "rank": 2 * RANK}),
    "separate": Kind("mola", ONE, given=True, apart=True, shares=True),
    "mola_8888": Kind("mola", MOLA),
    "mola_2468": Kind("mola", experts(6, (2, 4, 6, 8))),
    "mola_5555": Kind("mola", experts(6, (5, 5, 5, 5))),
    "mola_8642": Kind("mola", experts(6, (8, 6, 4, 2))),
    "switch": Kind("switch", experts()),
    "switch_prioritised": Kind("switch", experts(prioritised=True)),
    "switch_unlimited": Kind("switch", experts(capacity=None)),
    "mixtral": Kind("mixtral", experts()),
    "sira": Kind("sira", experts(top_k=2)),
    "sira_first": Kind("sira", experts(top_k=2, prioritised=False)),
    "sira_unlimited": Kind("sira", experts(top_k=2, capacity=None)),
    "hydralora": Kind("hydralora", experts(12, 4)),
    "octavius": Kind("octavius", OCTAVIUS),
    "multilora": Kind("multilora", experts(2 * RANK, NUM_EXPERTS // 2)),
    # each place of a factor has its own key for every one of the pool
    "mixlora_conditional": Kind("mixlora_conditional", experts(num_experts=NUM_EXPERTS)),
    "mixture_of_loras": Kind("mixture_of_loras", shares=True),
    "mixture_of_loras_oracle": Kind("mixture_of_loras", {"oracle": True}, given=True, shares=True),
    "mocle": Kind("mocle", experts(num_experts=NUM_EXPERTS - 1, num_clusters=8)),
    "mocle_by_task": Kind("mocle", experts(num_experts=NUM_EXPERTS - 1, by_task=True), given=True),
    "moelora": Kind("moelora", experts(NUM_EXPERTS * RANK), given=True),
    "flora": Kind("flora", FLORA, given=True),
    "flora_additive": Kind("flora", {"mode": "additive"}, given=True, shares=True),
    "moral": Kind("moral", forward_experts()),
    "loramoe": Kind("loramoe", forward_experts()),
    "llava_mole": Kind("llava_mole", forward_experts(16, 3)),
    "mixlora": Kind("mixlora", {**forward_experts(), "target_modules": ("mlp",)}),
    "fedms": Kind("fedms", {"rank": 6}, given=True, federated=True),
    "local_and_shared": Kind("local_and_shared", {"shared_rank": 4, "rank": 7}, given=True, federated=True),
    "one_lora_alone": Kind("mola", ONE_LORA, given=True, apart=True),
    "mola_8888_alone": Kind("mola", MOLA, given=True, apart=True),
    "octavius_alone": Kind("octavius", OCTAVIUS, given=True, apart=True),
    "one_lora_then": Kind("mola", ONE_LORA, then=True),
    "one_forward_lora_then": Kind("mola", ONE_FORWARD_LORA, then=True),
    "moral_then": Kind("moral", forward_experts(), then=True),
    "loramoe_then": Kind("loramoe", forward_experts(), then=True),
}

# those tried for all, the first of which is in no name; and one more that some were tried with
RATES = ("3e-3", "1e-3")
ALL_RATES = (*RATES, "3e-4")
_NAMED = re.compile(f"_({'|'.join(ALL_RATES[1:])})(?=$|_alone$|_then$)")


def with_rate(name: str, rate: str) -> str:
    """The name of a kind with another rate: it comes before an ending."""
    return name if rate == RATES[0] else re.sub("(_alone|_then)?$", rf"_{rate}\1", name, count=1)


def without_rate(name: str) -> tuple[str, str]:
    """The name of a kind without its rate, and that."""
    found = _NAMED.search(name)
    return (_NAMED.sub("", name), found[1]) if found else (name, RATES[0])


KINDS: Mapping[str, Kind] = {
    with_rate(name, rate): kind if rate == RATES[0] else replace(kind, lr=float(rate))
    for rate in ALL_RATES
    for name, kind in _AT_3E_3.items()
}


# what all kinds are held against
CONTROL = "one_lora"
# endings of kinds that are another measurement of the kind without it
ALONE, THEN = "_alone", "_then"

# the share of the seeds in which each item of a task was answered right
ByTask = Mapping[str, np.ndarray]


def tables() -> dict[str, Table]:
    """Those of TABLES.md."""
    return report(list(answers("experts").values()))


def report(found: Sequence[Measured]) -> dict[str, Table]:
    """Means over tasks, and over the seeds of each, with 95 % intervals of draws of the items: Wilson's for shares."""
    kinds: dict[str, list[Measured]] = {}
    for each in found:
        kinds.setdefault(each.key.way, []).append(each)
    by_task = {name: _by_task(own) for name, own in kinds.items()}
    first = list(by_task.get(CONTROL, {}))
    chosen = _chosen(kinds, first)
    tried = [kind for kind in chosen if sum(with_rate(kind, rate) in by_task for rate in ALL_RATES) > 1]
    variants = [chosen[kind] for kind in chosen if kind not in tried]
    return {
        "experts": _scores(kinds, by_task, [chosen[kind] for kind in tried], chosen.get(CONTROL, CONTROL), first),
        "experts, rates": _rates(kinds, by_task, tried, first),
        "experts, variants": _scores(kinds, by_task, variants, CONTROL, first),
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
            _interval(_of(by_task[name], first), are_shares=True),
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
        share_cells = [_interval(each, are_shares=True) for each in (before, after, later)]
        table.add(name, str(len(seeds)), *share_cells[:2], _interval(_difference(after, before)), share_cells[2])
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


def _interval(by_task: ByTask, *, are_shares: bool = False) -> str:
    generator = np.random.default_rng(0)
    places = [[generator.integers(0, len(values), len(values)) for values in by_task.values()] for _ in range(RESAMPLES)]
    means = [
        values[np.stack(own_RN)].mean(axis=1)
        for values, own_RN in zip(by_task.values(), zip(*places, strict=True), strict=True)
    ]
    drawn = np.stack(means, axis=1).mean(axis=1)
    count = sum(map(len, by_task.values())) if are_shares else None
    return interval(np.array([_mean(by_task), *drawn]), 3, share_of=count)
