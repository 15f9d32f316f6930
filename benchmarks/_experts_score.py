"""What trainable mixtures answer after joint training on several tasks, beside one LoRA of at least as many parameters."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _experts_federated import federated
from _experts_kinds import KINDS, RATES, without_rate
from _experts_report import THEN, print_report
from _experts_training import Data, num_parameters, stream, train
from _unseen_store import NO_SEED, NO_SHOTS, Key, Measured, Store, write_together
from rich.progress import Progress

import loraweave as lw
from loraweave.composer import scoring
from loraweave.composer.experts.clusters import fit_clusters
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.demo import read_rows

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = ROOT / "benchmarks" / "data" / "experts.json"
TASKS = ("past_tense", "antonym", "addition", "pick_animal_5")
_OF_ALL = [name for name in KINDS if without_rate(name)[1] in RATES]
LATER = ("plural", "uppercase", "number_words", "pick_first_5")


class OfTask:
    """An expert model whose calls name one task, where they have to."""

    def __init__(self, made: ExpertModel, task: str | None) -> None:
        self.made, self.task = made, task

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.made(*args, task=self.task, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.made.generate(*args, task=self.task, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made.base_model, name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of measurements")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "data", help="has MANIFEST.json and pool")
    parser.add_argument("--kinds", nargs="*", default=_OF_ALL, choices=[*KINDS, "base"], help="only these")
    parser.add_argument("--tasks", nargs="*", default=TASKS, help="trained together; none may have labels")
    parser.add_argument("--then", nargs="*", default=LATER, help="trained together afterwards, by those kinds that go on")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=24, help="test items of each task")
    parser.add_argument("--rows", type=int, default=200, help="training rows of each task, at most")
    parser.add_argument("--steps", type=int, default=60, help="of all tasks together")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print the table of what has been measured")
    parser.add_argument("--together", action="store_true", help=f"only write all measurements into {TOGETHER.name}")


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    store = Store(options.out, TOGETHER)
    if options.together:
        write_together(store.all().values(), TOGETHER)
        return
    if not options.report:
        measure(options, store)
    print_report(list(store.all().values()))


def measure(options: argparse.Namespace, store: Store) -> None:
    # the same on every machine, whatever it multiplies fastest
    model, tokenizer = lw.load_base(dtype=torch.float32)
    data = _data(options, model, tokenizer)
    # seed by seed, so that what is there at any time compares all kinds
    wanted = [(kind, seed) for seed in options.seeds for kind in options.kinds]
    wanted = list(dict.fromkeys((kind, NO_SEED if kind == "base" else seed) for kind, seed in wanted))
    with Progress() as progress:
        shown = progress.add_task("", total=len(wanted))
        for kind, seed in wanted:
            progress.update(shown, description=f"{kind}, seed {seed}")
            if not _is_known(options, store.all(), kind, seed, data):
                for found in _measured(options, model, tokenizer, kind, seed, data):
                    store.keep(found)
            progress.advance(shown)


def _is_known(
    options: argparse.Namespace, known: Mapping[Key, Measured], kind: str, seed: int, data: Mapping[str, Data]
) -> bool:
    """Whether all its tasks were measured so; of other steps or items it would be another measurement."""
    tasks = list(data) if kind == "base" or KINDS[kind].then else options.tasks
    found = {task: known.get(Key(task, kind, NO_SHOTS, seed)) for task in tasks}
    return all(
        each is not None
        and len(each.right_N) == len(data[task].tests)
        and each.notes.get("of_steps") in (None, options.steps)
        for task, each in found.items()
    )


def _data(options: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Data]:
    groups = json.loads((options.data / "MANIFEST.json").read_text())["groups"]
    entries = {entry["task"]: entry for group in groups.values() for entry in group}
    found = {}
    for name in (*options.tasks, *options.then):
        rows = read_rows(options.data / entries[name]["file"])
        task = lw.Task([], instruction=entries[name]["definition"])
        pairs = [(row["input"], row["target"]) for row in rows if row["split"] == "train"][: options.rows]
        tests = [(row["input"], (row["target"], *row.get("also_ok", []))) for row in rows if row["split"] == "test"]
        found[name] = Data(task, scoring.encoded(model, tokenizer, task, pairs), tests[: options.items])
    return found


def _measured(
    options: argparse.Namespace, model: Any, tokenizer: Any, name: str, seed: int, data: Mapping[str, Data]
) -> Iterator[Measured]:
    """Trains what `name` says and yields what it answers to each task's test inputs."""
    if name == "base":
        yield from (_answered(model, tokenizer, name, seed, task, data[task], {}, 0.0, 0.0) for task in data)
        return
    kind = KINDS[name]
    if kind.federated:
        yield from _of_clients(options, model, tokenizer, name, seed, data)
        return
    first = {task: data[task] for task in options.tasks}
    # each of the models of one task has its share of the steps
    groups = [[task] for task in first] if kind.apart else [list(first)]
    for tasks in groups:
        own = {task: first[task] for task in tasks}
        named = {} if kind.apart or kind.then else {"tasks": tuple(first)}
        chosen = {**kind.all_options(len(first)), **named}
        with lw.experts(kind.recipe, model, tokenizer=tokenizer, seed=seed, **chosen) as made:
            if kind.recipe == "mocle" and not made.recipe.needs_tasks:
                fit_clusters(made, _prompts(tokenizer, own), seed=seed)
            steps = {"steps": options.steps // len(groups), "batch_size": options.batch_size, "lr": kind.lr}
            taken = Taken()
            last = train(made, tokenizer, stream(own, seed), **steps)
            notes = {"of_steps": options.steps, "last_loss": round(last, 4)}
            notes["parameters"] = num_parameters(made) * len(groups)
            times = taken.each(len(tasks))
            label = name.removesuffix(THEN)
            for task in tasks:
                asked = OfTask(made, task if kind.given and not kind.apart else None)
                yield _answered(asked, tokenizer, label, seed, task, data[task], notes, *times)
            if kind.then:
                later = {task: data[task] for task in options.then}
                train(made, tokenizer, stream(later, seed), **steps)
                times = taken.each(len(data))
                yield from (_answered(made, tokenizer, name, seed, task, data[task], notes, *times) for task in data)


def _of_clients(
    options: argparse.Namespace, model: Any, tokenizer: Any, name: str, seed: int, data: Mapping[str, Data]
) -> Iterator[Measured]:
    own, taken = {task: data[task] for task in options.tasks}, Taken()
    steps = {"steps": options.steps, "batch_size": options.batch_size}
    clients, learned = federated(KINDS[name], model, tokenizer, own, **steps, seed=seed)
    times = taken.each(len(own))
    notes = {"of_steps": options.steps, **learned}
    for task, client in clients.items():
        yield _answered(client, tokenizer, name, seed, task, data[task], notes, *times)
    for client in clients.values():
        client.close()


class Taken:
    """Seconds and processor seconds since it was made."""

    def __init__(self) -> None:
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def each(self, num_tasks: int) -> tuple[float, float]:
        """The share of each task."""
        return (time.perf_counter() - self.started) / num_tasks, (time.process_time() - self.cpu_started) / num_tasks


def _prompts(tokenizer: Any, data: Mapping[str, Data]) -> list[str]:
    rows = [row for own in data.values() for row in own.rows]
    return tokenizer.batch_decode([row.prompt for row in rows], skip_special_tokens=True)


def _answered(
    model: Any, tokenizer: Any, name: str, seed: int, task: str, data: Data, notes: Mapping[str, Any], *taken: float
) -> Measured:
    score = scoring.evaluate(model, tokenizer, data.task, data.tests)
    right_N = np.array(score.right, dtype=np.uint8)
    return Measured(Key(task, name, NO_SHOTS, seed), right_N, score.loss, *taken, notes)
