"""What routers are worth over the adapters of examples/pool: right answers where nobody says which adapter an input is for.

    python -m benchmarks --out runs/routers routers
    python -m benchmarks --out runs/routers routers --ways base,oracle,arrow --items 4
    python -m benchmarks --out runs/routers --report routers         (the table of what has been measured so far)
    python -m benchmarks --out runs/routers --report --save routers routers       (writes data/routers.json, or --answers)

Test inputs of the pool's own tasks, of unseen tasks and of tasks that join two skills. Beside every router: the base model,
the task's own adapter (`oracle`), the adapter of the lowest loss over all tasks (`best_single`), all adapters alike
(`uniform`), the adapter whose examples are nearest to the prompt (`retrieved_first`), and one LoRA trained on all tasks
(`one_lora`) on as many rows as a router is. Of adapters whose tasks' rows are in --data. Every measurement and every trained
router is kept in --out, so that an interrupted run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track

import loraweave as lw
from benchmarks._data import DATA, NO_SEED, NO_SHOTS, Key, Measured, Store, answers, kept
from benchmarks._run import RESAMPLES, Run, Table, interval, pairs
from loraweave.composer.model import scoring
from loraweave.extensions.routers import expert_losses
from loraweave.hub.base import fast_dtype
from loraweave.routers.combined import derive
from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._saved import router_class, router_names

BATCH_SIZE = 32
BATCH_ROWS = 8
# notes that say how it was trained
TRAINING = ("steps", "batch_size", "lr")
# what is no router: known weights, or one adapter for all
OTHERS = ("base", "oracle", "best_single", "uniform", "retrieved_first", "one_lora")
# by name and options; those that are not here are as lw.router() makes them
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "retrieved_first": ("similarity", {"form": "selection"}),
    "arrow_sharp": ("arrow", {"temperature": 0.05}),
    "spectr_top1": ("spectr", {"top_k": 1}),
    "xlora_layerwise": ("xlora", {"layerwise": True}),
    "strongest_components": ("spectr", {"top_k": 8, "temperature": 1e9}),
    "arrow_components": ("arrow", {"top_k": 8}),
}
# over the adapters' components of rank 1; what weights are multiplied by, since a LoRA is 8 of them with weight 1
OF_COMPONENTS: Mapping[str, float] = {"strongest_components": 8.0, "arrow_components": 1.0}

app = typer.Typer()


@dataclass(frozen=True)
class Training:
    """How routers, and the one LoRA, are trained; `lr` is each router's own where it is None."""

    steps: int = 60
    batch_size: int = BATCH_ROWS
    lr: float | None = None

    def of(self, way: str) -> dict[str, Any]:
        """What tells the training of a way from another one of it; what was left as it is by default is not named."""
        if way != "one_lora" and not _learns(way):
            return {}
        found: dict[str, Any] = {"steps": self.steps}
        if self.batch_size != BATCH_ROWS:
            found["batch_size"] = self.batch_size
        return found if self.lr is None or way == "one_lora" else {**found, "lr": self.lr}

    def made(self, notes: Mapping[str, Any], way: str) -> bool:
        """Whether a measurement with these notes was of such a training."""
        return self.of(way) == {name: value for name, value in notes.items() if name in TRAINING}


@dataclass(frozen=True)
class Item:
    """One test input as the model is asked, and what of the measurement's sets it belongs to."""

    task: str
    prompt: str
    accepted: tuple[str, ...]
    labels: tuple[str, ...] | None
    max_new_tokens: int


@dataclass(frozen=True)
class Bench:
    """The model, the adapters whose tasks have rows, these rows, and where what is trained or measured is kept."""

    engine: lw.Composer
    training: Mapping[str, lw.Task]
    out: Path
    how: Training

    @property
    def pool(self) -> lw.ExpertPool:
        return self.engine.pool


@app.command()
def main(
    context: typer.Context,
    ways: Annotated[str | None, typer.Option(help="a,b: only these; else all, and what they are compared with")] = None,
    tasks: Annotated[str | None, typer.Option(help="a,b: only these tasks' items")] = None,
    items: Annotated[int, typer.Option(help="test items of each task")] = 8,
    seeds: Annotated[str, typer.Option(help="of what is trained")] = "0,1,2",
    rows: Annotated[int, typer.Option(help="training rows of each task")] = 40,
    steps: Annotated[int, typer.Option(help="of each training")] = 60,
    batch_size: Annotated[int, typer.Option(help="rows of each step of a training")] = BATCH_ROWS,
    lr: Annotated[float | None, typer.Option(help="of routers, by default each one's own")] = None,
    name: Annotated[str, typer.Option("--answers", help="data/NAME.json has those of earlier runs")] = "routers",
) -> None:
    """Right answers by way and kind of task."""
    run: Run = context.obj
    store = Store(run.folder(), DATA / f"{name}.json")
    if not run.report:
        entries = run.entries()
        chosen = {task: _items(run, entries[task], items) for task in (tasks.split(",") if tasks else entries)}
        wanted = ways.split(",") if ways else [*OTHERS, *router_names()]
        measure(run, store, chosen, wanted, [int(seed) for seed in seeds.split(",")], rows, Training(steps, batch_size, lr))
    store.close(run, lambda known: [table(known)])


def measure(
    run: Run,
    store: Store,
    items: Mapping[str, list[Item]],
    ways: Sequence[str],
    seeds: Sequence[int],
    num_rows: int,
    how: Training,
) -> None:
    """What is not known yet; of another number of items, or of another training, it would be another measurement."""
    model, tokenizer = lw.load_base(dtype=fast_dtype())
    items = {name: _with_budget(tokenizer, found) for name, found in items.items()}
    bench = _bench(model, tokenizer, run, num_rows, how)
    wanted = [(way, seed) for way in ways for seed in _seeds(way, seeds)]
    for way, seed in track(wanted, "ways"):
        known = store.all()
        left = {
            name: of_task
            for name, of_task in items.items()
            if (key := Key(name, way, NO_SHOTS, seed)) not in known
            or len(known[key].right_N) != len(of_task)
            or not how.made(known[key].notes, way)
        }
        if way == "oracle":
            left = {name: of_task for name, of_task in left.items() if name in bench.pool.names}
        if left:
            for found in _measured(bench, way, seed, left):
                store.keep(found)


def _seeds(way: str, seeds: Sequence[int]) -> Sequence[int]:
    return seeds if way == "one_lora" or _learns(way) else (NO_SEED,)


def _learns(way: str) -> bool:
    name = VARIANTS[way][0] if way in VARIANTS else way
    return name not in OTHERS and issubclass(router_class(name), LearnedRouter)


def _task(entry: Mapping[str, Any], examples: Sequence[tuple[str, str]] = ()) -> lw.Task:
    return lw.Task(list(examples), instruction=entry["definition"], labels=entry["labels"])


def _items(run: Run, entry: Mapping[str, Any], count: int) -> list[Item]:
    """The first test rows, which neither the adapters nor the routers were trained on."""
    rows = [row for row in run.rows(entry["task"]) if row["split"] == "test"][:count]
    task, labels = _task(entry), None if entry["labels"] is None else tuple(entry["labels"])
    return [
        Item(entry["task"], str(task.prompt(row["input"])), (row["target"], *row.get("also_ok", [])), labels, 0)
        for row in rows
    ]


def _with_budget(tokenizer: Any, items: list[Item]) -> list[Item]:
    longest = max(len(ids) for ids in tokenizer([text for item in items for text in item.accepted])["input_ids"])
    return [replace(item, max_new_tokens=min(scoring.MAX_NEW_TOKENS, 2 * longest + 4)) for item in items]


def _bench(model: Any, tokenizer: Any, run: Run, num_rows: int, how: Training) -> Bench:
    entries = run.entries()
    pool = lw.ExpertPool([lw.Adapter.from_pretrained(path) for path in run.adapters() if path.name in entries])
    training = {name: _task(entries[name], pairs(run.rows(name), "train")[-num_rows:]) for name in pool.names}
    return Bench(lw.Composer(model, pool, tokenizer=tokenizer), training, run.folder(), how)


def _measured(bench: Bench, way: str, seed: int, items: Mapping[str, list[Item]]) -> list[Measured]:
    started = time.perf_counter()
    engine, mixture_of, notes = _way(bench, way, seed)
    made = time.perf_counter() - started
    flat = [item for found in items.values() for item in found]
    started, cpu_started = time.perf_counter(), time.process_time()
    answers = answered(engine, flat, mixture_of)
    seconds, cpu_seconds = (time.perf_counter() - started) / len(items), (time.process_time() - cpu_started) / len(items)
    right = [answer.strip() in [text.strip() for text in item.accepted] for item, answer in zip(flat, answers, strict=True)]
    notes = {**notes, "made_s": round(made, 1)}
    return [
        Measured(
            Key(name, way, NO_SHOTS, seed),
            np.array([hit for item, hit in zip(flat, right, strict=True) if item.task == name], dtype=np.uint8),
            0.0,
            seconds,
            cpu_seconds,
            notes,
        )
        for name in items
    ]


MixtureOf = Callable[[Sequence[Item]], Any]


@torch.no_grad()
def answered(engine: lw.Composer, items: Sequence[Item], mixture_of: MixtureOf) -> list[str]:
    """One answer for each item, in batches of items of all tasks; with labels the likeliest, in batches of a task's."""
    model, tokenizer = engine.model, engine.tokenizer
    answers = [""] * len(items)
    order = sorted(range(len(items)), key=lambda at: (items[at].max_new_tokens, len(items[at].prompt)))
    generated = [at for at in order if items[at].labels is None]
    batches = [generated[begin : begin + BATCH_SIZE] for begin in range(0, len(generated), BATCH_SIZE)]
    ranked: dict[str, list[int]] = {}
    for at in order:
        if items[at].labels is not None:
            ranked.setdefault(items[at].task, []).append(at)
    for batch in [*batches, *ranked.values()]:
        rows = [items[at] for at in batch]
        prompts, labels, mixture = [item.prompt for item in rows], rows[0].labels, mixture_of(rows)
        with nullcontext() if mixture is None else engine.activate(mixture):
            if labels is not None:
                found = scoring.rank(model, tokenizer, prompts, labels)
            else:
                found = scoring.generate(model, tokenizer, prompts, max_new_tokens=rows[-1].max_new_tokens)
        for at, answer in zip(batch, found, strict=True):
            answers[at] = answer
    return answers


def _way(bench: Bench, way: str, seed: int) -> tuple[lw.Composer, MixtureOf, dict[str, Any]]:
    """The engine that answers, and the mixture of a batch."""
    pool = bench.pool
    if way == "base":
        return bench.engine, lambda rows: None, {}
    if way == "oracle":
        return bench.engine, lambda rows: [{item.task: 1.0} for item in rows], {}
    if way == "uniform":
        return bench.engine, lambda rows: dict.fromkeys(pool.names, 1 / len(pool)), {}
    if way == "best_single":
        losses = _expert_losses(bench)
        best = min(pool.names, key=lambda name: sum(of_task[name] for of_task in losses.values()))
        return bench.engine, lambda rows: {best: 1.0}, {"chosen": best}
    if way == "one_lora":
        adapter = _one_lora(bench, seed)
        engine = lw.Composer(bench.engine.model, [adapter], tokenizer=bench.engine.tokenizer)
        return engine, lambda rows: {adapter.name: 1.0}, bench.how.of(way)
    if way in OF_COMPONENTS:
        components = lw.Composer(bench.engine.model, pool.rank_one(), tokenizer=bench.engine.tokenizer)
        name, settings = VARIANTS[way]
        strength = OF_COMPONENTS[way]
        scaled = derive(lw.router(name, components.pool, **settings), lambda own, x, layer: strength * own.weights(x, layer))
        return components, lambda rows: scaled, {}
    router = _router(bench, way, seed)
    router.eval()
    return bench.engine, lambda rows: router, bench.how.of(way)


def _router(bench: Bench, way: str, seed: int) -> Any:
    name, settings = VARIANTS.get(way, (way, {}))
    folder = _folder(bench, way, seed)
    if folder.is_dir():
        return lw.router(folder)
    torch.manual_seed(seed)
    if name == "lorauter":
        prompts = {task: [found.prompt(text) for text, _ in found.examples] for task, found in bench.training.items()}
        return lw.router(name, bench.pool, tasks=prompts, losses=_expert_losses(bench), **settings)
    router = lw.router(name, bench.pool, **settings)
    if isinstance(router, LearnedRouter):
        # one that trains each expert apart takes so many rows of every expert in each step
        size = (
            {"batch_size": 1, "steps": max(1, bench.how.steps // 4)}
            if router.apart
            else {"batch_size": bench.how.batch_size, "steps": bench.how.steps}
        )
        router.fit(bench.engine, bench.training, seed=seed, lr=bench.how.lr, progress=False, **size)
        router.save_pretrained(folder)
    elif name in ("logistic", "average_activation"):
        router.fit(bench.engine, bench.training)
    return router


def _folder(bench: Bench, way: str, seed: int) -> Path:
    training = "-".join(f"{name}{value}" for name, value in bench.how.of(way).items())
    return bench.out / "trained" / f"{way}-{seed}-{training}"


def _expert_losses(bench: Bench) -> dict[str, dict[str, float]]:
    """The loss of every adapter on one training row of each task."""

    def losses() -> dict[str, dict[str, float]]:
        tasks = {name: replace(task, examples=task.examples[:1]) for name, task in bench.training.items()}
        found: dict[str, dict[str, float]] = expert_losses(bench.engine, tasks, progress=False)
        return found

    found: dict[str, dict[str, float]] = kept(bench.out / "expert_losses", losses)
    return found


def _one_lora(bench: Bench, seed: int) -> lw.Adapter:
    """One adapter of rank 8 for all tasks, trained on the rows and for the steps that a router gets."""
    folder = _folder(bench, "one_lora", seed)
    if not folder.is_dir():
        examples = [(task.prompt(text), target) for task in bench.training.values() for text, target in task.examples]
        task = lw.Task(examples, template="{input}")
        found = lw.train_adapters(
            bench.engine.model,
            bench.engine.tokenizer,
            {"one_lora": task},
            steps=bench.how.steps,
            lr=3e-3,
            batch_size=bench.how.batch_size,
            seed=seed,
            progress=False,
        )
        found["one_lora"].save_pretrained(folder)
    return lw.Adapter.from_pretrained(folder, name="one_lora")


def tables() -> dict[str, Table]:
    """Those of TABLES.md."""
    return {name: table(answers(name)) for name in ("routers", "routers_unseen")}


def table(measured: Mapping[Key, Measured]) -> Table:
    """Only tasks that `base` was measured on; a way that lacks some of them is left out of that column."""
    known: dict[tuple[str, str], list[np.ndarray]] = {}
    for key, found in sorted(measured.items(), key=lambda pair: pair[0].seed):
        known.setdefault((key.way, key.task), []).append(found.right_N)
    relations = {task: entry["relation"] for task, entry in Run().entries(there=False).items()}
    kinds = {None: "pool", "compositional": "joined"}
    groups: dict[str, list[str]] = {"pool": [], "unseen": [], "joined": []}
    for way, task in known:
        if way == "base":
            groups[kinds.get(relations[task], "unseen")].append(task)
    counts = {task: len(found[0]) for (way, task), found in known.items() if way == "base"}
    for key, found in answers("unseen").items():
        # on tasks without an adapter the oracle is a LoRA that was trained on the task
        if key.way == "oracle" and key.task in counts:
            known.setdefault((key.way, key.task), [found.right_N[: counts[key.task]]])
    seeds = {way: max(len(found) for (other, _), found in known.items() if other == way) for way, _ in known}
    rows = {way: {name: _draws(known, way, tasks) for name, tasks in groups.items()} for way in seeds}
    oracle_R, retrieved_R = (rows.get(way, {}).get(of) for way, of in (("oracle", "pool"), ("retrieved_first", "unseen")))
    columns = [f"{name}: {len(tasks)} tasks, {sum(counts[task] for task in tasks)} items" for name, tasks in groups.items()]
    shares = ("share of the oracle's, pool", "above retrieved_first, unseen")
    table = Table("right answers [95 % interval over items]", ("way", "seeds", *columns, *shares))
    order = next((name for name in groups if groups[name]), "pool")
    for way, drawn in sorted(rows.items(), key=lambda row: -1 if (its_R := row[1][order]) is None else -its_R[0]):
        pool_R, unseen_R = drawn["pool"], drawn["unseen"]
        share = None if pool_R is None or oracle_R is None else pool_R / oracle_R
        above = None if unseen_R is None or retrieved_R is None else unseen_R - retrieved_R
        rights = [
            "" if draws_R is None else interval(draws_R, 3, share_of=sum(counts[task] for task in groups[name]))
            for name, draws_R in drawn.items()
        ]
        others = ["" if draws_R is None else interval(draws_R, 3) for draws_R in (share, above)]
        table.add(way, str(seeds[way]), *rights, *others)
    return table.without_empty()


def _draws(known: Mapping[tuple[str, str], list[np.ndarray]], way: str, tasks: Sequence[str]) -> np.ndarray | None:
    """The mean over tasks: first as measured, then resampled by items within each task, by the same draws for all ways."""
    if not tasks or any((way, task) not in known for task in tasks):
        return None
    total_R = np.zeros(RESAMPLES + 1)
    for number, task in enumerate(tasks):
        right_N = np.mean(known[way, task], axis=0)
        chosen = np.random.default_rng(number).integers(0, len(right_N), size=(RESAMPLES, len(right_N)))
        total_R += np.concatenate([[right_N.mean()], right_N[chosen].mean(axis=1)])
    return total_R / len(tasks)
