"""What trainable mixtures of LoRA experts are worth after joint training on several tasks, beside one LoRA.

    python -m benchmarks --out runs/experts experts
    python -m benchmarks --out runs/experts experts --kinds one_lora,mola_8888 --seeds 0
    python -m benchmarks --out runs/experts --report experts                   (the tables of what has been measured so far)
    python -m benchmarks --out runs/experts --report --save experts experts    (writes data/experts.json)

Right answers on test inputs of tasks of the pool after joint training, each recipe at about as many parameters, on as many
rows. Beside them: the base, one LoRA of at least as many parameters as any recipe (`one_lora`), one of the rank that is
active in a token (`one_lora_active`), and one LoRA for each task, trained alone for its share of the steps and asked for its
own task (`separate`). Every kind is trained at 3e-3 and, with that in its name, at 1e-3, a few at 3e-4: kinds are compared
at the rate at which the last steps, whose rows had not been seen before, had the lower loss. Those that end in `_alone` are
a whole mixture for each task, trained on as many of its rows as the joint one: what is right together above that is
interference. Those that end in `_then` go on with other tasks (--then), and are asked for both: retention. Every measurement
is kept in --out, so that an interrupted run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from torch import Tensor
from torch.nn import functional

import loraweave as lw
from benchmarks._data import DATA, NO_SEED, NO_SHOTS, Key, Measured, Store
from benchmarks._expert_kinds import KINDS, ONE, RATES, THEN, Kind, report, without_rate
from benchmarks._run import Run, pairs
from loraweave.common.descent import seeded
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.make import put_expert
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import IGNORED, EncodedRow, batch
from loraweave.extensions.expert_training.feeds import call_labelled
from loraweave.extensions.recipes import federated_average, fit_clusters, with_options

TASKS = "past_tense,antonym,addition,pick_animal_5"
LATER = "plural,uppercase,number_words,pick_first_5"
_OF_ALL = [name for name in KINDS if without_rate(name)[1] in RATES]

CLIP = 1.0
# times that clients exchange what they have in common in each of two stages, or phases
ROUNDS = 3
# of a client's five steps two are in the first stage, or in the phase of what is shared
FIRST = 0.4

app = typer.Typer()

Stream = Iterator[tuple[str, EncodedRow]]
Clients = dict[str, ExpertModel]


@dataclass(frozen=True)
class Data:
    """A task with the token ids of its training rows, and its test inputs with their accepted targets."""

    task: lw.Task
    rows: Sequence[EncodedRow]
    tests: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Asked:
    """What is trained together, what afterwards, and how much of it."""

    tasks: list[str]
    then: list[str]
    items: int
    rows: int
    steps: int
    batch_size: int


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


@app.command()
def main(
    context: typer.Context,
    kinds: Annotated[str, typer.Option(help="a,b: only these, which can be base, too")] = ",".join(_OF_ALL),
    tasks: Annotated[
        str, typer.Option(help="trained together; none may have labels")
    ] = "past_tense,antonym,addition,pick_animal_5",
    then: Annotated[
        str, typer.Option(help="trained afterwards, by those kinds that go on")
    ] = "plural,uppercase,number_words,pick_first_5",
    seeds: Annotated[str, typer.Option(help="of the training")] = "0,1,2",
    items: Annotated[int, typer.Option(help="test items of each task")] = 24,
    rows: Annotated[int, typer.Option(help="training rows of each task, at most")] = 200,
    steps: Annotated[int, typer.Option(help="of all tasks together")] = 60,
    batch_size: Annotated[int, typer.Option(help="rows of a step")] = 8,
    name: Annotated[str, typer.Option("--answers", help="data/NAME.json has earlier ones, of as many items")] = "experts",
) -> None:
    """Right answers of each kind, interference, and what later tasks leave."""
    run: Run = context.obj
    store = Store(run.folder(), DATA / f"{name}.json")
    if not run.report:
        asked = Asked(tasks.split(","), then.split(","), items, rows, steps, batch_size)
        measure(run, asked, store, kinds.split(","), [int(seed) for seed in seeds.split(",")])
    store.close(run, lambda known: list(report(list(known.values())).values()))


def measure(run: Run, asked: Asked, store: Store, kinds: Sequence[str], seeds: Sequence[int]) -> None:
    # the same on every machine, whatever it multiplies fastest
    model, tokenizer = lw.load_base(dtype=torch.float32)
    data = _data(run, asked, model, tokenizer)
    # seed by seed, so that what is there at any time compares all kinds
    wanted = dict.fromkeys((kind, NO_SEED if kind == "base" else seed) for seed in seeds for kind in kinds)
    for kind, seed in track(list(wanted), "kinds"):
        if not _is_known(asked, store.all(), kind, seed, data):
            for found in _measured(asked, model, tokenizer, kind, seed, data):
                store.keep(found)


def _is_known(asked: Asked, known: Mapping[Key, Measured], kind: str, seed: int, data: Mapping[str, Data]) -> bool:
    """Whether all its tasks were measured so; of other steps or items it would be another measurement."""
    tasks = list(data) if kind == "base" or KINDS[kind].then else asked.tasks
    found = {task: known.get(Key(task, kind, NO_SHOTS, seed)) for task in tasks}
    return all(
        each is not None and len(each.right_N) == len(data[task].tests) and each.notes.get("of_steps") in (None, asked.steps)
        for task, each in found.items()
    )


def _data(run: Run, asked: Asked, model: Any, tokenizer: Any) -> dict[str, Data]:
    entries, found = run.entries(), {}
    for name in (*asked.tasks, *asked.then):
        rows = run.rows(name)
        task = lw.Task([], instruction=entries[name]["definition"])
        tests = [(row["input"], (row["target"], *row.get("also_ok", []))) for row in rows if row["split"] == "test"]
        trained = scoring.encode_pairs(model, tokenizer, task, pairs(rows, "train")[: asked.rows])
        found[name] = Data(task, trained, tests[: asked.items])
    return found


def _measured(
    asked: Asked, model: Any, tokenizer: Any, name: str, seed: int, data: Mapping[str, Data]
) -> Iterator[Measured]:
    """Trains what `name` says and yields what it answers to each task's test inputs."""
    if name == "base":
        yield from (_answered(model, tokenizer, name, seed, task, data[task], {}, 0.0, 0.0) for task in data)
        return
    kind = KINDS[name]
    if kind.federated:
        yield from _of_clients(asked, model, tokenizer, name, seed, data)
        return
    first = {task: data[task] for task in asked.tasks}
    # each of the models of one task has its share of the steps
    groups = [[task] for task in first] if kind.apart else [list(first)]
    for tasks in groups:
        own = {task: first[task] for task in tasks}
        named = {} if kind.apart or kind.then else {"tasks": tuple(first)}
        chosen = {**kind.all_options(len(first)), **named}
        with lw.experts(kind.recipe, model, tokenizer=tokenizer, seed=seed, **chosen) as made:
            if kind.recipe == "mocle" and not made.recipe.needs_tasks:
                fit_clusters(made, _prompts(tokenizer, own), seed=seed)
            steps: dict[str, Any] = {"steps": asked.steps // len(groups), "batch_size": asked.batch_size, "lr": kind.lr}
            taken = Taken()
            last = train(made, tokenizer, stream(own, seed), **steps)
            notes = {"of_steps": asked.steps, "last_loss": round(last, 4)}
            notes["parameters"] = num_parameters(made) * len(groups)
            times = taken.each(len(tasks))
            label = name.removesuffix(THEN)
            for task in tasks:
                told = OfTask(made, task if kind.given and not kind.apart else None)
                yield _answered(told, tokenizer, label, seed, task, data[task], notes, *times)
            if kind.then:
                later = {task: data[task] for task in asked.then}
                train(made, tokenizer, stream(later, seed), **steps)
                times = taken.each(len(data))
                yield from (_answered(made, tokenizer, name, seed, task, data[task], notes, *times) for task in data)


def _of_clients(
    asked: Asked, model: Any, tokenizer: Any, name: str, seed: int, data: Mapping[str, Data]
) -> Iterator[Measured]:
    own, taken = {task: data[task] for task in asked.tasks}, Taken()
    steps = {"steps": asked.steps, "batch_size": asked.batch_size}
    clients, learned = federated(KINDS[name], model, tokenizer, own, **steps, seed=seed)
    times = taken.each(len(own))
    notes = {"of_steps": asked.steps, **learned}
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
    model: Any,
    tokenizer: Any,
    name: str,
    seed: int,
    task: str,
    data: Data,
    notes: Mapping[str, Any],
    seconds: float,
    cpu_seconds: float,
) -> Measured:
    score = scoring.evaluate(model, tokenizer, data.task, data.tests)
    right_N = np.array(score.right, dtype=np.uint8)
    return Measured(Key(task, name, NO_SHOTS, seed), right_N, score.loss, seconds, cpu_seconds, notes)


def stream(data: Mapping[str, Data], seed: int) -> Stream:
    """Rows of one task after another, each task's in a new order every time they have all been there."""
    waiting: dict[str, list[EncodedRow]] = {task: [] for task in data}
    generator = seeded(seed, "rows")
    while True:
        for task, of_task in data.items():
            if not waiting[task]:
                waiting[task] = [of_task.rows[at] for at in torch.randperm(len(of_task.rows), generator=generator).tolist()]
            yield task, waiting[task].pop()


def train(made: ExpertModel, tokenizer: Any, rows: Stream, *, steps: int, batch_size: int, lr: float | None = None) -> float:
    """Trains on the next rows and returns the mean loss of the last tenth of the steps.

    AdamW at the recipe's own learning rate unless `lr` is another, gradients clipped at a norm of 1.
    """
    parameters = [value for value in made.expert_parameters().values() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr or made.recipe.lr, weight_decay=0.0)
    taken = []
    made.train()
    for _ in range(steps):
        chosen = [next(rows) for _ in range(batch_size)]
        output = call_labelled(made, _labelled(made, tokenizer, chosen), two_sequences=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(float(output.loss.detach()))
    made.eval()
    return float(np.mean(taken[-max(1, steps // 10) :]))


def num_parameters(made: ExpertModel) -> int:
    return sum(value.numel() for value in made.expert_parameters().values() if value.requires_grad)


def _labelled(made: ExpertModel, tokenizer: Any, rows: Sequence[tuple[str, EncodedRow]]) -> dict[str, Tensor]:
    """Inputs padded on the left, labels of the last tokens, and each row's place among the tasks, -1 where there is none."""
    found = batch(made.base_model, tokenizer, [row for _, row in rows])
    labels_BK = functional.pad(found.targets_BK, (1, 0), value=IGNORED)
    task_B = torch.tensor([made.tasks.index(task) if made.tasks else -1 for task, _ in rows])
    return {**found.inputs, "labels": labels_BK, "task": task_B}


@dataclass(frozen=True)
class Federation:
    """Makes a client of each task, all from the same seed, and trains them on their own rows."""

    model: Any
    tokenizer: Any
    rows: Mapping[str, Stream]
    batch_size: int
    seed: int
    lr: float | None

    def clients(self, recipe: str, **options: Any) -> Clients:
        made = {"tokenizer": self.tokenizer, "seed": self.seed, **options}
        return {task: lw.experts(recipe, self.model, **made) for task in self.rows}

    def learn(self, clients: Clients, steps: int) -> float:
        """The mean over the clients of the loss of their last steps."""
        chosen: dict[str, Any] = {"steps": steps, "batch_size": self.batch_size, "lr": self.lr}
        return float(np.mean([train(client, self.tokenizer, self.rows[task], **chosen) for task, client in clients.items()]))


def federated(
    kind: Kind, model: Any, tokenizer: Any, data: Mapping[str, Data], *, steps: int, batch_size: int, seed: int
) -> tuple[Clients, dict[str, float]]:
    """A model of each task, how many parameters all of them have, those that are shared once, and their last loss."""
    rows = {task: stream({task: own}, seed) for task, own in data.items()}
    federation = Federation(model, tokenizer, rows, batch_size, seed, kind.lr)
    first = int(steps * FIRST) // (len(data) * ROUNDS)
    last = steps // (len(data) * ROUNDS) - first
    train_all = _fedms if kind.recipe == "fedms" else _in_turn
    return train_all(federation, kind.all_options(len(data)), first, last)


def _fedms(federation: Federation, options: Mapping[str, Any], first: int, last: int) -> tuple[Clients, dict[str, float]]:
    """Plain LoRAs, whose mean is the global expert; then local experts and gates, which all have the mean of."""
    plain = federation.clients("mola", **options, **ONE)
    for _ in range(ROUNDS):
        federation.learn(plain, first)
        _average(plain, experts=(0,))
    in_common = next(iter(plain.values()))
    num_shared, exchanged = num_parameters(in_common), in_common.expert(0)
    for client in plain.values():
        client.close()
    clients = federation.clients("fedms", **options)
    for client in clients.values():
        put_expert(client, 0, exchanged)
    for _ in range(ROUNDS):
        last_loss = federation.learn(clients, last)
        _average(clients, gates=True)
    return clients, _notes(clients, num_shared, last_loss)


def _in_turn(federation: Federation, options: Mapping[str, Any], first: int, last: int) -> tuple[Clients, dict[str, float]]:
    """In each round the local expert learns, then the shared one, which all have the mean of."""
    clients, num_shared = federation.clients("local_and_shared", **options), 0
    for _ in range(ROUNDS):
        last_loss = federation.learn(clients, last)
        clients = {task: with_options(client, phase="shared") for task, client in clients.items()}
        num_shared = num_parameters(next(iter(clients.values())))
        federation.learn(clients, first)
        _average(clients, experts=(0,))
        clients = {task: with_options(client, phase="local") for task, client in clients.items()}
    return clients, _notes(clients, num_shared, last_loss)


def _notes(clients: Clients, num_shared: int, last_loss: float) -> dict[str, float]:
    return {"last_loss": round(last_loss, 4), "parameters": num_shared + sum(map(num_parameters, clients.values()))}


def _average(clients: Clients, **exchanged: Any) -> None:
    federated_average(list(clients.values()), [1.0] * len(clients), **exchanged)
