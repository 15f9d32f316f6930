"""Answers tasks that no adapter was trained for with few examples each, and compares the ways to do it.

    python -m benchmarks --out runs/unseen --data DATA unseen
    python -m benchmarks --out runs/unseen --data DATA unseen --ways auto,gradient --shots 5,20 --seeds 0,1,2,3,4
    python -m benchmarks --out runs/unseen --data DATA unseen --ways auto --control noise  (over a hub of noise)
    python -m benchmarks --out runs/unseen --report unseen                  (the tables of what has been measured so far)
    python -m benchmarks --out runs/unseen --report --save unseen unseen    (writes data/unseen.json)
    python -m benchmarks --out runs/qwen --pool runs/qwen-pool --data DATA unseen --base qwen2.5-coder-0.5b --in-context DIR
    python -m benchmarks --out runs/left-out --data DATA unseen --left-out  (the pool's own tasks: what choices are made by)

The ways: the base model without an example (`base`) and with the examples in its prompt (`in_context`); a LoRA trained
on the examples alone (`lora_examples`), and one that begins as a composition (`composed_and_tuned`); the adapter that
retrieval puts first (`retrieved_first`); the published LoraHub recipe (`lorahub_original`: 20 adapters at random, A and
B mixed apart, 40 evaluations by nevergrad's NGOpt, the loss as its authors coded it); AdaMerging, which learns from
the first 20 test inputs without their answers (`adamerging`); a LoRA trained on the whole
training set (`oracle`); the program of adapters that `lw.order` finds (`order`); the base with the shipped in-context
adapter and the examples in its prompt (`in_context_adapter`), and the training that begins there (`few_shot_begun`;
`few_shot` begins from nothing);
`compose()` without an example, by the instruction alone (`instruction`) and with the first 20 test inputs, without answers
(`instruction_and_inputs`); for joined skills the adapter that is best on the test items
(`any_single`), and both skills one after the other (`two_passes`); and every method of `compose()` by its name. With
`+shown` behind its name, a way learns and answers under prompts that show the other examples with their answers; with
`+calibrated`, on tasks with labels, it ranks them without their prior on the examples, as `auto` does.

--control noise replaces the factors of the stored adapters by noise of the same norms, --control shuffled by those of
another adapter (`_control.py`); cards and the in-context adapter stay. Its name stands behind the way's (`auto+noise`).

--base names the model that --pool and --in-context were made for; its figures are data/unseen-BASE.json.

--left-out takes each task of the pool as if it were unseen: its own adapter and those of the same skill are not in the hub,
the in-context adapter is the one of `examples/make_in_context.py --folds` that was trained without it, and its examples and
test items are training rows. Methods, rates and budgets are chosen there, before the unseen tasks.

Every measurement is kept in --out as it is made, so that an interrupted run goes on; it goes on, too, from what
data/unseen.json holds. Several processes share the work by --part. --again repeats ways.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import loraweave as lw
from benchmarks._control import CONTROLS
from benchmarks._data import DATA, NO_SEED, NO_SHOTS, Key, Measured, Store
from benchmarks._run import ROOT, Run, pairs
from benchmarks._unseen_report import OF_JOINED_SKILLS, WAYS, WITHOUT_EXAMPLES, report
from benchmarks._unseen_ways import FORMS, Case, endings, find, plain_way
from loraweave.extensions.tour import DemoTask, load_task
from loraweave.hub.base import fast_dtype

app = typer.Typer()


# tasks of the pool that teach one skill on other texts
SAME_SKILL = (("sentiment_movie", "sentiment_tweet"),)
SHIPPED_READER = ROOT / "examples" / "in_context"


@dataclass(frozen=True)
class Asked:
    """What is measured: every way on every task with one seed, before the next seed."""

    relations: Mapping[str, str]
    ways: list[str]
    seeds: list[int]
    shots: list[int]
    k: int
    budget: int
    num_test: int
    labelled: Set[str] = frozenset()
    left_out: bool = False
    in_context: Path | None = None
    control: str | None = None
    base: str | None = None

    def without(self, task: str) -> tuple[str, ...]:
        """What the hub may not have: the adapters of the task's own skill."""
        return same_skill(task) if self.left_out else ()

    def reader(self, without: tuple[str, ...]) -> list[Path]:
        """The folder of the in-context adapter that was not trained on these tasks, if there is one."""
        if not self.left_out:
            return [self.in_context or SHIPPED_READER]
        folds = sorted(self.in_context.iterdir()) if self.in_context is not None else []
        cards = {fold: json.loads((fold / "loraweave.json").read_text(encoding="utf-8")) for fold in folds}
        found = [fold for fold, card in cards.items() if set(without) <= set(card["left_out"])]
        if folds and not found:
            raise typer.BadParameter(f"no adapter of {self.in_context} was trained without {', '.join(without)}")
        return found[:1]

    def wanted(self) -> Iterator[Key]:
        ending = f"+{self.control}" if self.control else ""
        for shots in self.shots:
            for seed in self.seeds:
                for task, relation in self.relations.items():
                    for way in (f"{name}{ending}" for name in self.ways):
                        if plain_way(way) in OF_JOINED_SKILLS and relation != "compositional":
                            continue
                        if "calibrated" in endings(way) and task not in self.labelled:
                            continue
                        if way not in WITHOUT_EXAMPLES:
                            yield Key(task, way, shots, seed)
                        elif (shots, seed) == (self.shots[0], self.seeds[0]):
                            yield Key(task, way, NO_SHOTS, NO_SEED)


@app.command()
def main(
    context: typer.Context,
    tasks: Annotated[str | None, typer.Option(help="a,b: only these tasks")] = None,
    ways: Annotated[str, typer.Option(help="a,b: only these ways")] = ",".join(WAYS),
    seeds: Annotated[str, typer.Option(help="of the examples and the searches")] = "0,1,2,3,4",
    shots: Annotated[str, typer.Option(help="numbers of examples")] = "5",
    k: Annotated[int, typer.Option(help="adapters that retrieval brings")] = 20,
    budget: Annotated[int, typer.Option(help="evaluations of each search")] = 40,
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 100,
    part: Annotated[str, typer.Option(help="2/3 is the second of three processes that share the tasks")] = "1/1",
    again: Annotated[str, typer.Option(help="a,b: ways whose earlier measurements do not count")] = "",
    left_out: Annotated[bool, typer.Option(help="the pool's own tasks, each without its adapter")] = False,
    in_context: Annotated[Path | None, typer.Option(help="in-context adapter, or folder of folds")] = None,
    control: Annotated[str | None, typer.Option(help="noise or shuffled: in place of what is stored")] = None,
    base: Annotated[str | None, typer.Option(help="base that --pool was made for, as load_base names it")] = None,
) -> None:
    """Right answers, the share of what training could gain, and the time to choose."""
    run: Run = context.obj
    name = "left_out" if left_out else "unseen"
    store = Store(run.folder(), DATA / (f"{name}.json" if base is None else f"{name}-{Path(base).name}.json"))
    entries = run.entries("pool" if left_out else "unseen")
    kinds = {task: entry["category" if left_out else "relation"] for task, entry in entries.items()}
    if not run.report:
        if control not in (None, *CONTROLS):
            raise typer.BadParameter(f"there is no control {control!r}; there are {', '.join(CONTROLS)}")
        number, count = (int(each) for each in part.split("/"))
        chosen = [task for task in kinds if not tasks or task in tasks.split(",")][number - 1 :: count]
        of_seeds, of_shots = ([int(each) for each in text.split(",")] for text in (seeds, shots))
        relations = {task: kinds[task] for task in chosen}
        labelled = {task for task in chosen if entries[task]["labels"]}
        limits = k, budget, num_test, labelled, left_out, in_context, control, base
        asked = Asked(relations, ways.split(","), of_seeds, of_shots, *limits)
        measure(run, asked, store, again.split(","))
    store.close(run, lambda known: list(report(known, name.replace("_", " ")).values()))


def measure(run: Run, asked: Asked, store: Store, again: list[str]) -> None:
    known = Store(store.folder).all() if any(again) else {}
    known |= {key: found for key, found in store.all().items() if key.way not in again}
    model, tokenizer = lw.load_base(asked.base, dtype=fast_dtype())
    keys = [key for key in asked.wanted() if key not in known]
    with ExitStack() as stack:
        hubs: dict[tuple[tuple[str, ...], int], lw.Hub] = {}
        for key in track(keys, "measuring"):
            # each seed draws new numbers for the control
            without, seed = asked.without(key.task), key.seed if asked.control else 0
            if (without, seed) not in hubs:
                opened = run.hub(without, *asked.reader(without), control=asked.control, seed=seed)
                hubs[without, seed] = stack.enter_context(opened)
            store.keep(_measured(open_case(run, asked, model, tokenizer, hubs[without, seed], key), key))


def same_skill(task: str) -> tuple[str, ...]:
    """The pool's tasks that teach what this one does, itself among them."""
    return next((tasks for tasks in SAME_SKILL if task in tasks), (task,))


def open_case(run: Run, asked: Asked, model: Any, tokenizer: Any, hub: lw.Hub, key: Key) -> Case:
    training = pairs(run.rows(key.task), "train")
    num_examples = max(key.shots, 1)
    if asked.left_out:
        drawn = random.Random(key.seed).sample(training, len(training))
        entry = run.entries("pool")[key.task]
        task = lw.Task(drawn[:num_examples], instruction=entry["definition"], labels=entry["labels"])
        test = [(text, [target]) for text, target in drawn[-asked.num_test :]]
        training = drawn[: -asked.num_test]
        unseen = DemoTask(key.task, task, test, [])
    else:
        unseen = load_task(run.data, key.task, key.seed, asked.num_test, num_examples=num_examples)
    for form in endings(key.way):
        if form in FORMS:
            unseen = replace(unseen, task=FORMS[form](unseen.task))
    return Case(model, tokenizer, hub, unseen, training, key.seed, asked.k, asked.budget)


def _measured(case: Case, key: Key) -> Measured:
    started, cpu_started = time.perf_counter(), time.process_time()
    found = find(case, plain_way(key.way))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    score = case.score(found)
    right_N = torch.tensor(score.right).to(torch.uint8).numpy()
    return Measured(key, right_N, score.loss, seconds, cpu_seconds, found.notes)
