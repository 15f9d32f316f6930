"""Answers tasks that no adapter was trained for with few examples each, and compares the ways to do it.

    python -m benchmarks --out runs/unseen --data DATA unseen
    python -m benchmarks --out runs/unseen --data DATA unseen --ways auto,gradient --shots 5,20 --seeds 0,1,2,3,4
    python -m benchmarks --out runs/unseen --report unseen                  (the tables of what has been measured so far)
    python -m benchmarks --out runs/unseen --report --save unseen unseen    (writes data/unseen.json)

The ways: the base model without an example (`base`) and with the examples in its prompt (`in_context`); a LoRA trained on
the examples alone (`lora_examples`), and one that begins as a composition (`composed_and_tuned`); the adapter that
retrieval puts first (`retrieved_first`); the published LoraHub recipe (`lorahub_original`: 20 adapters at random, A and B
mixed apart, 40 evaluations by nevergrad's NGOpt, the loss as its authors coded it); a LoRA trained on the whole training
set (`oracle`); for joined skills the adapter that is best on the test items (`any_single`), and both skills one after the
other (`two_passes`); and every method of `compose()` by its name.

Every measurement is kept in --out as it is made, so that an interrupted run goes on; it goes on, too, from what
data/unseen.json holds. Several processes share the work by --part. --again measures ways anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import loraweave as lw
from benchmarks._run import Run, pairs
from benchmarks._store import DATA, NO_SEED, NO_SHOTS, Key, Measured, Store
from benchmarks._unseen_report import report
from benchmarks._unseen_ways import OF_JOINED_SKILLS, WAYS, WITHOUT_EXAMPLES, Case, find
from loraweave.demo import fast_dtype, load_task, read_rows

app = typer.Typer()


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

    def wanted(self) -> Iterator[Key]:
        for shots in self.shots:
            for seed in self.seeds:
                for task, relation in self.relations.items():
                    for way in self.ways:
                        if way in OF_JOINED_SKILLS and relation != "compositional":
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
) -> None:
    """Right answers, the share of what training could gain, and the time to choose."""
    run: Run = context.obj
    store = Store(run.folder(), DATA / "unseen.json")
    if not run.report:
        number, count = (int(each) for each in part.split("/"))
        relations = {task: entry["relation"] for task, entry in run.entries("unseen").items()}
        chosen = [task for task in relations if not tasks or task in tasks.split(",")][number - 1 :: count]
        numbers = ([int(each) for each in text.split(",")] for text in (seeds, shots))
        asked = Asked({task: relations[task] for task in chosen}, ways.split(","), *numbers, k, budget, num_test)
        measure(run, asked, store, again.split(","))
    store.close(run, lambda known: list(report(known).values()))


def measure(run: Run, asked: Asked, store: Store, again: list[str]) -> None:
    known = Store(store.folder).all() if any(again) else {}
    known |= {key: found for key, found in store.all().items() if key.way not in again}
    model, tokenizer = lw.load_base(dtype=fast_dtype())
    with run.hub() as hub:
        for key in track([key for key in asked.wanted() if key not in known], "measuring"):
            store.keep(_measured(_case(run, asked, model, tokenizer, hub, key), key))


def _case(run: Run, asked: Asked, model: Any, tokenizer: Any, hub: lw.Hub, key: Key) -> Case:
    unseen = load_task(run.data, key.task, key.seed, asked.num_test, num_examples=max(key.shots, 1))
    training = pairs(read_rows(run.data / "unseen" / f"{key.task}.jsonl"), "train")
    return Case(model, tokenizer, hub, unseen, training, key.seed, asked.k, asked.budget)


def _measured(case: Case, key: Key) -> Measured:
    started, cpu_started = time.perf_counter(), time.process_time()
    found = find(case, key.way)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    score = case.score(found)
    right_N = torch.tensor(score.right).to(torch.uint8).numpy()
    return Measured(key, right_N, score.loss, seconds, cpu_seconds, found.notes)
