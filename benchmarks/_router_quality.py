"""What each router answers right where nobody says which adapter an input is for; `python benchmarks/routers.py quality`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _unseen_store import NO_SEED, NO_SHOTS, Key, Measured, Store, write_together
from rich.progress import Progress

import loraweave as lw
from loraweave.composer import scoring
from loraweave.demo import fast_dtype, read_rows
from loraweave.routers.routing.learned_router import LearnedRouter
from loraweave.routers.routing.make import router_class, router_names

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = ROOT / "benchmarks" / "data" / "routers.json"
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
    "spectr_top1": ("mixture_of_top1", {"score": "spectr"}),
    "xlora_layerwise": ("xlora", {"layerwise": True}),
}


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
    options: argparse.Namespace

    @property
    def pool(self) -> lw.ExpertPool:
        return self.engine.pool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of measurements and trained routers")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "data", help="has MANIFEST.json, pool, unseen")
    parser.add_argument("--pool", type=Path, default=ROOT / "examples" / "pool", help="folder of adapter folders")
    parser.add_argument("--routers", nargs="*", help="only these; by default all routers and what they are compared with")
    parser.add_argument("--tasks", nargs="*", help="only these tasks' items")
    parser.add_argument("--items", type=int, default=8, help="test items of each task")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of what is trained")
    parser.add_argument("--rows", type=int, default=40, help="training rows of each task")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--batch-size", type=int, default=BATCH_ROWS, help="rows of each step of a training")
    parser.add_argument("--lr", type=float, help="of routers, by default each one's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only print the table of what has been measured")
    parser.add_argument("--together", action="store_true", help="only write all measurements into --kept")
    parser.add_argument("--kept", type=Path, default=TOGETHER, help="measurements of earlier runs, by default %(default)s")


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    store = Store(options.out, options.kept)
    entries = _entries(options.data)
    if options.together:
        write_together(store.all().values(), options.kept)
        return
    if not options.report:
        measure(options, entries, store)
    from _router_report import print_report

    print_report(store.all(), entries)


def measure(options: argparse.Namespace, entries: Mapping[str, Mapping[str, Any]], store: Store) -> None:
    items = {name: _items(options, entry) for name, entry in entries.items() if not options.tasks or name in options.tasks}
    model, tokenizer = lw.load_base(dtype=fast_dtype())
    items = {name: _with_budget(tokenizer, found) for name, found in items.items()}
    bench = _bench(model, tokenizer, options, entries)
    wanted = [(way, seed) for way in options.routers or [*OTHERS, *router_names()] for seed in _seeds(way, options.seeds)]
    with Progress() as progress:
        shown = progress.add_task("", total=len(wanted))
        for way, seed in wanted:
            known = store.all()
            keys = {name: Key(name, way, NO_SHOTS, seed) for name in items}
            # of another number of items, or of another training, it would be another measurement
            left = [
                name
                for name in items
                if (key := keys[name]) not in known
                or len(known[key].right_N) != len(items[name])
                or not _was_trained_so(known[key].notes, options, way)
            ]
            if way == "oracle":
                left = [name for name in left if name in bench.pool.names]
            if left:
                progress.update(shown, description=f"{way}, seed {seed}")
                for found in _measured(bench, way, seed, {name: items[name] for name in left}):
                    store.keep(found)
            progress.advance(shown)


def _entries(data: Path) -> dict[str, Mapping[str, Any]]:
    groups = json.loads((data / "MANIFEST.json").read_text())["groups"]
    return {entry["task"]: entry for group in groups.values() for entry in group if (data / entry["file"]).is_file()}


def _seeds(way: str, seeds: Sequence[int]) -> Sequence[int]:
    return seeds if way == "one_lora" or _learns(way) else (NO_SEED,)


def _learns(way: str) -> bool:
    name = VARIANTS[way][0] if way in VARIANTS else way
    return name not in OTHERS and issubclass(router_class(name), LearnedRouter)


def _trained(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """What tells the training of a way from another one of it; what was left as it is by default is not named."""
    if way != "one_lora" and not _learns(way):
        return {}
    found = {"steps": options.steps}
    if options.batch_size != BATCH_ROWS:
        found["batch_size"] = options.batch_size
    return found if options.lr is None or way == "one_lora" else {**found, "lr": options.lr}


def _was_trained_so(notes: Mapping[str, Any], options: argparse.Namespace, way: str) -> bool:
    return _trained(options, way) == {name: value for name, value in notes.items() if name in TRAINING}


def _task(entry: Mapping[str, Any], examples: Sequence[tuple[str, str]] = ()) -> lw.Task:
    return lw.Task(list(examples), instruction=entry["definition"], labels=entry["labels"])


def _items(options: argparse.Namespace, entry: Mapping[str, Any]) -> list[Item]:
    """The first test rows, which neither the adapters nor the routers were trained on."""
    rows = [row for row in read_rows(options.data / entry["file"]) if row["split"] == "test"][: options.items]
    task, labels = _task(entry), None if entry["labels"] is None else tuple(entry["labels"])
    return [
        Item(entry["task"], task.prompt(row["input"]), (row["target"], *row.get("also_ok", [])), labels, 0) for row in rows
    ]


def _with_budget(tokenizer: Any, items: list[Item]) -> list[Item]:
    longest = max(len(ids) for ids in tokenizer([text for item in items for text in item.accepted])["input_ids"])
    return [replace(item, max_new_tokens=min(scoring.MAX_NEW_TOKENS, 2 * longest + 4)) for item in items]


def _bench(model: Any, tokenizer: Any, options: argparse.Namespace, entries: Mapping[str, Any]) -> Bench:
    folders = [path for path in sorted(options.pool.iterdir()) if path.is_dir() and path.name in entries]
    pool = lw.ExpertPool([lw.Adapter.from_pretrained(path) for path in folders])
    training = {}
    for name in pool.names:
        rows = [row for row in read_rows(options.data / entries[name]["file"]) if row["split"] == "train"][-options.rows :]
        training[name] = _task(entries[name], [(row["input"], row["target"]) for row in rows])
    return Bench(lw.Composer(model, pool, tokenizer=tokenizer), training, options.out, options)


def _measured(bench: Bench, way: str, seed: int, items: Mapping[str, list[Item]]) -> list[Measured]:
    started = time.perf_counter()
    engine, mixture_of, notes = _way(bench, way, seed)
    made = time.perf_counter() - started
    flat = [item for found in items.values() for item in found]
    started, cpu_started = time.perf_counter(), time.process_time()
    answers = answered(engine, flat, mixture_of)
    each = [(time.perf_counter() - started) / len(items), (time.process_time() - cpu_started) / len(items)]
    right = [answer.strip() in [text.strip() for text in item.accepted] for item, answer in zip(flat, answers, strict=True)]
    notes = {**notes, "made_s": round(made, 1)}
    return [
        Measured(
            Key(name, way, NO_SHOTS, seed),
            np.array([hit for item, hit in zip(flat, right, strict=True) if item.task == name], dtype=np.uint8),
            0.0,
            *each,
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
        return engine, lambda rows: {adapter.name: 1.0}, _trained(bench.options, way)
    router = _router(bench, way, seed)
    router.eval()
    return bench.engine, lambda rows: router, _trained(bench.options, way)


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
            {"batch_size": 1, "steps": max(1, bench.options.steps // 4)}
            if router.apart
            else {"batch_size": bench.options.batch_size, "steps": bench.options.steps}
        )
        router.fit(bench.engine, bench.training, seed=seed, lr=bench.options.lr, progress=False, **size)
        router.save_pretrained(folder)
    elif name in ("logistic", "average_activation"):
        router.fit(bench.engine, bench.training)
    return router


def _folder(bench: Bench, way: str, seed: int) -> Path:
    training = "-".join(f"{name}{value}" for name, value in _trained(bench.options, way).items())
    return bench.out / "trained" / f"{way}-{seed}-{training}"


def _expert_losses(bench: Bench) -> dict[str, dict[str, float]]:
    """The loss of every adapter on one training row of each task."""
    kept = bench.out / "expert_losses"
    if not kept.is_file():
        tasks = {name: replace(task, examples=task.examples[:1]) for name, task in bench.training.items()}
        kept.write_text(json.dumps(bench.engine.expert_losses(tasks, progress=False)))
    return json.loads(kept.read_text())  # type: ignore[no-any-return]


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
            steps=bench.options.steps,
            lr=3e-3,
            batch_size=bench.options.batch_size,
            seed=seed,
            progress=False,
        )
        found["one_lora"].save_pretrained(folder)
    return lw.Adapter.from_pretrained(folder, name="one_lora")
