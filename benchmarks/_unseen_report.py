"""Tables of what `unseen` has measured.

Shares of right answers have Wilson's interval, as `loraweave.retrieval.fusion` says; all others are the central 95 % of
bootstrap draws: each draw resamples a task's seeds and its test items, the same for all ways that are compared.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from benchmarks._control import CONTROLS
from benchmarks._data import NO_SEED, NO_SHOTS, Key, Measured, answers
from benchmarks._run import RESAMPLES, Run, Table, interval

WAYS = (
    "base",
    "in_context",
    "in_context_adapter",
    "lora_examples",
    "few_shot",
    "few_shot_begun",
    "composed_and_tuned",
    "retrieved_first",
    "best_single",
    "uniform",
    "lorahub_original",
    "similarity",
    "random",
    "greedy",
    "bayesian",
    "lorahub",
    "adamerging",
    "first_order",
    "gradient",
    "auto",
    "oracle",
    "instruction",
    "instruction_and_inputs",
    "order",
    "order+distilled",
    "any_single",
    "two_passes",
)
# these know nothing of the few examples
WITHOUT_EXAMPLES = ("base", "instruction", "instruction_and_inputs", "oracle", "any_single", "two_passes")
# these are for tasks that join two skills
OF_JOINED_SKILLS = ("order", "order+distilled", "any_single", "two_passes")
# what `auto` is to beat; behind a name, labels ranked without their prior, as `auto` ranks them
CALIBRATED = "+calibrated"
RIVALS = (
    "in_context",
    "in_context_adapter",
    "lora_examples",
    "few_shot",
    "few_shot_begun",
    "best_single",
    "lorahub_original",
    "adamerging",
    "in_context+calibrated",
    "lora_examples+calibrated",
    "few_shot+calibrated",
    "few_shot_begun+calibrated",
)
# what needs no stored adapter
WITHOUT_HUB = ("base", "in_context", "lora_examples", "few_shot", "in_context+calibrated", "lora_examples+calibrated")
# none of these is learned from the examples
UNLEARNED = ("base", "best_single", "in_context")


class Results:
    """All measurements with one number of examples; `relations` names the tasks, in the order of the tables.

    On tasks without labels, which are all but `labelled`, a calibrated way is the way itself.
    """

    def __init__(
        self, measured: Mapping[Key, Measured], shots: int, relations: Mapping[str, str], labelled: Collection[str] = ()
    ) -> None:
        self.shots = shots
        self.relations = relations
        self.by: dict[tuple[str, str], dict[int, Measured]] = {}
        for key, found in measured.items():
            if key.task in relations and key.shots in (shots, NO_SHOTS):
                self.by.setdefault((key.task, key.way), {})[key.seed] = found
        for way in [way for way in self.ways if way.endswith(CALIBRATED)]:
            for task in relations.keys() - set(labelled):
                if plain := self.by.get((task, way.removesuffix(CALIBRATED))):
                    self.by[task, way] = plain

    @property
    def ways(self) -> list[str]:
        return list(dict.fromkeys(way for _, way in self.by))

    def tasks(self, ways: Iterable[str]) -> list[str]:
        """Those in which all these ways were measured with a seed in common."""
        wanted = list(ways)
        return [task for task in self.relations if self._seeds(task, wanted)]

    def _seeds(self, task: str, ways: Sequence[str]) -> list[int]:
        if not all((task, way) in self.by for way in ways):
            return []
        drawn = [set(self.by[task, way]) for way in ways if way not in WITHOUT_EXAMPLES]
        return sorted(set.intersection(*drawn)) if drawn else [NO_SEED]

    def right_WSN(self, task: str, ways: Sequence[str]) -> np.ndarray:
        """The seeds and the items that all ways have."""
        seeds = self._seeds(task, ways)
        rows = [[self._found(task, way, seed).right_N for seed in seeds] for way in ways]
        num_items = min(len(right_N) for row in rows for right_N in row)
        return np.array([[right_N[:num_items] for right_N in row] for row in rows], dtype=np.float64)

    def num_items(self, task: str, way: str) -> int:
        """The items of the task that this way answered, with one seed."""
        return int(self.right_WSN(task, [way]).shape[-1])

    def _found(self, task: str, way: str, seed: int) -> Measured:
        return self.by[task, way][NO_SEED if way in WITHOUT_EXAMPLES else seed]

    def draws_RW(self, task: str, ways: Sequence[str]) -> np.ndarray:
        """The scores of the ways; row 0 is the measurement itself, the others are drawn."""
        right_WSN = self.right_WSN(task, ways)
        _, num_seeds, num_items = right_WSN.shape
        generator = np.random.default_rng(zlib.crc32(task.encode()))
        seeds_RS = generator.integers(0, num_seeds, (RESAMPLES, num_seeds))
        items_RN = generator.integers(0, num_items, (RESAMPLES, num_items))
        drawn_WR = right_WSN[:, seeds_RS[:, :, None], items_RN[:, None, :]].mean(axis=(2, 3))
        return np.concatenate([right_WSN.mean(axis=(1, 2))[None], drawn_WR.T])


# the bases that the unseen tasks were measured on, and the files of data that hold the answers
BASES = {"SmolLM2-135M": "unseen", "Qwen2.5-Coder-0.5B": "unseen-qwen2.5-coder-0.5b"}


def tables() -> dict[str, Table]:
    """Those of TABLES.md."""
    measured = {base: answers(file) for base, file in BASES.items()}
    first, second = measured
    return (
        report(measured[first], "unseen")
        | report(measured[second], f"unseen, {second}")
        | report(answers("left_out"), "left out")
        | {"unseen, bases": _bases(measured)}
    )


def _bases(measured: Mapping[str, Mapping[Key, Measured]]) -> Table:
    """Right answers of each way on each base, and what the hub adds, on the tasks that the last base has."""
    by_base = {base: Results(of_base, 5, relations("unseen"), labelled("unseen")) for base, of_base in measured.items()}
    *_, last = by_base.values()
    ways = [way for way in [*WAYS, "auto+noise"] if all(way in results.ways for results in by_base.values())]
    tasks = last.tasks(["base", "auto", "auto+noise"])
    table = Table(f"{len(tasks)} unseen tasks on each base", ("way", *by_base))
    for way in ways:
        table.add(way, *(_of_tasks(results, way, tasks) for results in by_base.values()))
    for label, ways_of in {
        "auto less noise": ("auto+noise", "auto"),
        "auto less lora_examples": ("lora_examples", "auto"),
    }.items():
        drawn = [[np.diff(results.draws_RW(task, ways_of))[:, 0] for task in tasks] for results in by_base.values()]
        table.add(label, *(interval(np.mean(differences, axis=0), 3) for differences in drawn))
    return table


def _of_tasks(results: Results, way: str, tasks: Sequence[str]) -> str:
    known = results.tasks([way])
    return _mean_cell(results, {task: results.draws_RW(task, [way])[:, 0] for task in tasks if task in known}, way, tasks)


def relations(name: str) -> dict[str, str]:
    """The "unseen" tasks and how they relate to the pool, or the pool's own, "left out" in turn, and their kind."""
    group, key = ("unseen", "relation") if name.startswith("unseen") else ("pool", "category")
    return {task: entry[key] for task, entry in Run().entries(group, there=False).items()}


def labelled(name: str) -> set[str]:
    """The "unseen" tasks, or the pool's own, whose answers are labels."""
    entries = Run().entries("unseen" if name.startswith("unseen") else "pool", there=False)
    return {task for task, entry in entries.items() if entry["labels"]}


def report(measured: Mapping[Key, Measured], name: str, known: Mapping[str, str] | None = None) -> dict[str, Table]:
    """Every table, for each number of examples; ways in the order of WAYS, those that were measured."""
    found: dict[str, Table] = {}
    for shots in sorted({key.shots for key in measured} - {NO_SHOTS}):
        results = Results(measured, shots, relations(name) if known is None else known, labelled(name))
        shown = [way for way in WAYS if way in results.ways] + [way for way in results.ways if way not in WAYS]
        tables = {
            "scores": _scores(results, [way for way in shown if way not in OF_JOINED_SKILLS]),
            "shares": _shares(results, [way for way in shown if way not in WITHOUT_EXAMPLES]),
            "times": _times(results, shown),
            "goals": _goals(results),
            "stored": _stored(results),
            "lacks": _loss_parts(results, shown),
            "joined": _joined(results, shown),
        }
        found |= {f"{name}, {shots} examples, {part}": table for part, table in tables.items() if table.rows}
    pays = _where_it_pays(measured, relations(name) if known is None else known, labelled(name))
    return found | ({f"{name}, where a hub pays": pays} if pays.rows else {})


def _where_it_pays(measured: Mapping[Key, Measured], known: Mapping[str, str], of_labels: Collection[str]) -> Table:
    """Right answers in each situation, and what the hub adds to the best way without one, and to itself in noise."""
    columns = ("situation", "tasks", "base", "best without a hub", "with it", "over noise", "oracle", "what the hub adds")
    table = Table("where a hub pays", (*columns, "less noise", "processor seconds", "of the best without"))
    kinds = {
        "two skills joined": [task for task in known if known[task] == "compositional"],
        "one skill": [task for task in known if known[task] != "compositional"],
    }
    counts = sorted({key.shots for key in measured} - {NO_SHOTS})
    by_count = {count: Results(measured, count, known, of_labels) for count in counts}
    situations = [("no example", 5, "instruction_and_inputs", ("base",))] if 5 in counts else []
    situations += [(f"{count} example{'s' * (count > 1)}", count, "auto", WITHOUT_HUB) for count in counts]
    for label, count, way, rivals in situations:
        for kind, of_kind in kinds.items():
            _add_situation(table, by_count[count], f"{label}, {kind}", way, rivals, of_kind)
    return table


def _add_situation(
    table: Table, results: Results, label: str, way: str, without_hub: Collection[str], of_kind: Collection[str]
) -> None:
    noisy, rivals = f"{way}+noise", [name for name in without_hub if name in results.ways]
    tasks = [task for task in results.tasks(["base", *rivals, way, noisy, "oracle"]) if task in of_kind]
    if not tasks or not rivals:
        return
    means = {name: float(np.mean([results.draws_RW(task, [name])[0, 0] for task in tasks])) for name in rivals}
    best = max(means, key=lambda name: means[name])
    ways = ("base", best, way, noisy, "oracle")
    drawn_RW = np.mean([results.draws_RW(task, ways) for task in tasks], axis=0)
    base, rival, with_it, over_noise, oracle = (f"{mean:.3f}" for mean in drawn_RW[0])
    added = [interval(drawn_RW[:, 2] - drawn_RW[:, place], 3) for place in (1, 3)]
    spent = [f"{_mean_cpu_seconds(results, name, tasks):.0f}" for name in (way, best)]
    table.add(label, str(len(tasks)), base, f"{rival} ({best})", with_it, over_noise, oracle, *added, *spent)


def _scores(results: Results, ways: Sequence[str]) -> Table:
    table = Table("right answers on test items [95 % interval]", ("task", "relation", *ways, "auto chose"))
    tasks = results.tasks(["base"])
    drawn = {way: {task: results.draws_RW(task, [way])[:, 0] for task in results.tasks([way])} for way in ways}
    for task in tasks:
        chosen = Counter(found.notes["chosen"] for found in results.by.get((task, "auto"), {}).values())
        cells = [
            interval(drawn[way][task], share_of=results.num_items(task, way)) if task in drawn[way] else "-" for way in ways
        ]
        table.add(
            task, results.relations[task], *cells, ", ".join(f"{name} {count}" for name, count in chosen.most_common())
        )
    groups = {
        f"mean of {relation}": [task for task in tasks if results.relations[task] == relation]
        for relation in dict.fromkeys(results.relations[task] for task in tasks)
    }
    for label, group in {**groups, "mean of all": tasks}.items():
        table.add(label, "", *(_mean_cell(results, drawn[way], way, group) for way in ways), "")
    return table


def _mean_cell(results: Results, drawn: Mapping[str, np.ndarray], way: str, group: Sequence[str]) -> str:
    known = [drawn[task] for task in group if task in drawn]
    if len(known) < len(group):
        return f"({len(known)} of {len(group)})"
    return interval(np.mean(known, axis=0), 3, share_of=sum(results.num_items(task, way) for task in group))


def gaining(results: Results) -> tuple[list[str], list[str]]:
    """The tasks on which the oracle gains beyond its interval, and the others."""
    known = results.tasks(["base", "oracle"])
    gains = {task: np.diff(results.draws_RW(task, ["base", "oracle"]), axis=1)[1:, 0] for task in known}
    kept = [task for task in known if np.percentile(gains[task], 2.5) > 0]
    return kept, [task for task in known if task not in kept]


def share_draws(results: Results, way: str, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """(way - base) / (oracle - base) by task, draw by draw."""
    found = {}
    for task in tasks:
        base_R, way_R, oracle_R = results.draws_RW(task, ["base", way, "oracle"]).T
        # a draw in which the oracle gains nothing says nothing of a share
        gain_R = np.where(oracle_R > base_R, oracle_R - base_R, np.nan)
        found[task] = (way_R - base_R) / gain_R
    return found


def _shares(results: Results, ways: Sequence[str]) -> Table:
    kept, left_out = gaining(results)
    table = Table("share of the oracle's gain over the base that is recovered", ("task", *ways))
    by_way = {way: share_draws(results, way, [task for task in results.tasks([way]) if task in kept]) for way in ways}
    for task in kept:
        table.add(task, *(_share_cell(by_way[way].get(task)) for way in ways))
    table.add("mean", *(_mean_share(by_way[way], kept) for way in ways))
    pooled = [_share_cell(_pooled(results, way, kept)) if 0 < len(kept) == len(by_way[way]) else "-" for way in ways]
    table.add("of the summed gains", *pooled)
    for task in left_out:
        base_R, oracle_R = results.draws_RW(task, ["base", "oracle"]).T
        table.add(f"(left out: {task}, oracle {oracle_R[0]:.2f} against base {base_R[0]:.2f})", *[""] * len(ways))
    return table


def _pooled(results: Results, way: str, tasks: Sequence[str]) -> np.ndarray:
    drawn = np.sum([results.draws_RW(task, ["base", way, "oracle"]) for task in tasks], axis=0)
    pooled: np.ndarray = (drawn[:, 1] - drawn[:, 0]) / (drawn[:, 2] - drawn[:, 0])
    return pooled


def _share_cell(draws_R: np.ndarray | None) -> str:
    if draws_R is None:
        return "-"
    return interval(draws_R, unit=lambda share: f"{share:.0%}")


def _mean_share(by_task: Mapping[str, np.ndarray], tasks: Sequence[str]) -> str:
    if len(by_task) < len(tasks) or not tasks:
        return f"({len(by_task)} of {len(tasks)})"
    return _share_cell(np.nanmean(list(by_task.values()), axis=0))


def _stored(results: Results) -> Table:
    """What the stored adapters add: each way less the same way over a hub in which nothing is stored."""
    columns = ("way", "tasks", "over the hub", "over the control", "what the stored adapters add")
    table = Table("what the stored adapters add to a way", columns)
    for controlled in (way for way in results.ways if way.rpartition("+")[2] in CONTROLS):
        way, _, control = controlled.rpartition("+")
        tasks = results.tasks([way, controlled])
        relations = dict.fromkeys(results.relations[task] for task in tasks)
        groups = {relation: [task for task in tasks if results.relations[task] == relation] for relation in relations}
        for label, group in {**groups, "all": tasks}.items():
            drawn_RW = np.mean([results.draws_RW(task, [way, controlled]) for task in group], axis=0)
            means = (f"{mean:.3f}" for mean in drawn_RW[0])
            added = interval(drawn_RW[:, 0] - drawn_RW[:, 1], 3)
            table.add(f"{way} less {control}", f"{len(group)} {label}", *means, added)
    return table


def _times(results: Results, ways: Sequence[str]) -> Table:
    columns = ("way", "seconds", "processor seconds", "test loss", "measured", "tasks", "seeds")
    table = Table("to choose, and the loss on test items", columns)
    for way in ways:
        found = [one for (_, its), by_seed in results.by.items() if its == way for one in by_seed.values()]
        seconds, cpu, loss = (np.mean([getattr(one, name) for one in found]) for name in ("seconds", "cpu_seconds", "loss"))
        counts = [len({one.key.task for one in found}), len({one.key.seed for one in found})]
        table.add(way, f"{seconds:.1f}", f"{cpu:.1f}", f"{loss:.3f}", str(len(found)), *map(str, counts))
    return table


def _goals(results: Results) -> Table:
    """What `auto` is meant to do, over the tasks and seeds that both sides of each comparison have."""
    table = Table("the goals", ("goal", "found"))
    rivals = [way for way in RIVALS if way in results.ways]
    if tasks := results.tasks(["auto", *rivals]):
        means = {way: float(np.mean([results.draws_RW(task, [way])[0] for task in tasks])) for way in rivals}
        best = max(means, key=lambda way: means[way]) if means else "base"
        _add_margin(table, results, f"above the best rival, {best}, by .04", best, tasks)
    if tasks := results.tasks(["auto", "lora_examples"]):
        _add_margin(table, results, "above lora_examples by .10", "lora_examples", tasks)
        spent, allowed = (_mean_cpu_seconds(results, way, tasks) for way in ("auto", "lora_examples"))
        table.add("takes at most its processor time", f"{spent / allowed:.2f} times ({spent:.1f} s against {allowed:.1f} s)")
    kept = [task for task in gaining(results)[0] if task in results.tasks(["auto"])]
    if kept:
        table.add("80 % of the oracle's summed gains", f"{_share_cell(_pooled(results, 'auto', kept))} ({len(kept)} tasks)")
    known = [way for way in UNLEARNED if way in results.ways]
    if tasks := results.tasks(["auto", *known]):
        worse = [cell for task in tasks if (cell := _worse(results, task, known))]
        table.add(f"below the best of {', '.join(known)} on no task", ", ".join(worse) or "none")
    return table


def _add_margin(table: Table, results: Results, goal: str, way: str, tasks: Sequence[str]) -> None:
    drawn = [np.diff(results.draws_RW(task, [way, "auto"]))[:, 0] for task in tasks]
    table.add(goal, f"{interval(np.mean(drawn, axis=0), 3)} ({len(tasks)} tasks)")


def _loss_parts(results: Results, ways: Sequence[str]) -> Table:
    """Where `auto` falls short of the oracle: another way was better on the test items, or none of them was good enough."""
    parts = ("auto", "best way", "of", "oracle", "another way was better by", "all ways fell short by")
    table = Table("what `auto` lacks, and why", ("task", *parts))
    learning = [way for way in ways if way not in WITHOUT_EXAMPLES]
    for task in results.tasks(["auto", "oracle"]):
        known = [way for way in learning if task in results.tasks([way, "auto", "oracle"])]
        scores = dict(zip(known, results.draws_RW(task, known)[0], strict=True))
        oracle = results.draws_RW(task, ["oracle"])[0, 0]
        best = max(scores, key=lambda way: (scores[way], way == "auto"))
        lacks = scores[best] - scores["auto"], max(0.0, oracle - scores[best])
        table.add(task, f"{scores['auto']:.2f}", best, f"{scores[best]:.2f}", f"{oracle:.2f}", *(f"{x:.2f}" for x in lacks))
    return table


def _mean_cpu_seconds(results: Results, way: str, tasks: Sequence[str]) -> float:
    return float(np.mean([np.mean([one.cpu_seconds for one in results.by[task, way].values()]) for task in tasks]))


def _worse(results: Results, task: str, ways: Sequence[str]) -> str:
    """How much worse than the best of these ways, or nothing when the interval reaches 0."""
    *others_WR, auto_R = results.draws_RW(task, [*ways, "auto"]).T
    best_R = max(others_WR, key=lambda way_R: way_R[0])
    return f"{task} {interval(auto_R - best_R)}" if np.percentile((auto_R - best_R)[1:], 97.5) < 0 else ""


def _joined(results: Results, ways: Sequence[str]) -> Table:
    """On tasks that join two skills: every way less the adapter that is best on the test items."""
    title = "two skills of the pool joined, above the adapter that is best on the test items"
    table = Table(title, ("task", "any_single", *(way for way in ways if way != "any_single")))
    for task in results.tasks(["any_single"]):
        if results.relations[task] != "compositional":
            continue
        cells = []
        for way in ways:
            if way != "any_single":
                known = task in results.tasks([way])
                cells.append(interval(np.diff(results.draws_RW(task, ["any_single", way]))[:, 0]) if known else "-")
        (single,) = results.by[task, "any_single"].values()
        table.add(task, f"{single.right_N.mean():.2f} ({single.notes['chosen']})", *cells)
    return table
