"""The guided tour behind `loraweave demo`: stored adapters composed for a task that none was trained for."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import loraweave as lw
from loraweave import AdapterNotFound, InvalidTask
from loraweave.extend import ShownTable, located
from loraweave.extend.composing import in_context_adapter
from loraweave.extend.models import fast_dtype
from loraweave.extend.scoring import predict

NUM_EXAMPLES = 5
NUM_SHOWN = 4
# two stored skills that one mixture has both of, and a sentence that shows each
SKILLS = {"passive": 1.1, "negation": 0.9}
SKILLS_INSTRUCTION = "Rewrite the sentence in the passive voice and negate it."
SKILLS_INPUT = "The judge thanked the doctor."
MAX_WEIGHTS = 10
LABELS = {
    "base": "base model",
    "best_single": "best single adapter",
    "uniform": "uniform mixture",
    "gradient": "weights by layer, learned",
    "lorahub": "LoraHub",
    "in_context": "base, examples in the prompt",
    "in_context_adapter": "in-context adapter, examples in the prompt",
    "few_shot": "adapter, trained on the examples",
    "program": "adapters, one after the other",
    "average": "average of what was learned",
}


@dataclass(frozen=True)
class DemoTask:
    """An unseen task: a few training rows chosen by the seed, and test rows to score on."""

    name: str
    task: lw.Task
    test: list[tuple[str, list[str]]]
    related: list[str]


def run(
    *,
    pool: Path | None,
    data: Path | None,
    task: str,
    k: int,
    budget: int,
    seed: int,
    num_test: int,
    as_json: bool,
    chat: bool = False,
    base: str | None = None,
) -> None:
    """Print the tour, or its figures as JSON. Raises AdapterNotFound or InvalidTask if pool or data are missing.

    `base` is a model as `load_base` names it; for another than the embedded one a pool of its adapters is needed.
    """
    console = Console(stderr=as_json)
    other = base or os.environ.get("LORAWEAVE_BASE")
    if other and pool is None:
        raise AdapterNotFound(f"no adapters of {other!r} come with the repository: give --pool, a folder of some")
    reader = [_shipped("in_context", "--pool")] if pool is None else []
    pool = pool or _shipped("pool", "--pool")
    unseen = load_task(data or _shipped("data", "--data"), task, seed, num_test)
    if chat:
        unseen = replace(unseen, task=replace(unseen.task, chat=True, stop=None))
    started = time.perf_counter()
    with console.status("loading the base model"):
        model, tokenizer = lw.load_base(base, dtype=fast_dtype())
    console.print(f"[bold]1. The base model[/] {model.name_or_path}, {time.perf_counter() - started:.0f} s.")
    _print_blend(pool, model, tokenizer, console)
    console.print(f"[bold]2. A task[/] nobody trained an adapter for: {unseen.task.instruction}")
    for text, target in unseen.task.examples:
        console.print(f"   {text!r} -> {target!r}", markup=False, highlight=False)
    console.print("   What the base model answers to others:")
    shown = unseen.test[:NUM_SHOWN]
    _print_answers(predict(model, tokenizer, unseen.task, [text for text, _ in shown]), shown, console)
    with tempfile.TemporaryDirectory(prefix="loraweave-demo-") as folder, lw.Hub(folder) as hub:
        paths = [*sorted(path for path in pool.iterdir() if path.is_dir()), *reader]
        for path in track(paths, "   adding adapters to a hub", console=console):
            hub.add(path)
        console.print(f"[bold]3. The hub[/] holds {len(hub)} adapters. Those nearest to the task's five inputs:")
        inputs = [text for text, _ in unseen.task.examples]
        for hit in lw.Retriever(hub).for_task(inputs, description=unseen.task.instruction, k=NUM_SHOWN):
            console.print(f"   {hit.score:.3f}  {hit.name}: {hit.evidence}", markup=False, highlight=False)
        prompted = in_context_adapter(hub, model)
        if prompted is not None:
            console.print("   Before anything is learned, the one that reads examples in the prompt answers:")
            shots = replace(unseen.task, demonstrations=True)
            with lw.Composer(model, [prompted]).activate({prompted.name: 1.0}):
                _print_answers(predict(model, tokenizer, shots, [text for text, _ in shown]), shown, console)
        console.print("[bold]4. Learning[/] weights and an adapter, on the five examples alone")
        composition = lw.compose(model, tokenizer, hub, unseen.task, method="auto", k=k, budget=budget, seed=seed)
        console.print("[bold]5. The composition[/] answers:")
        _print_answers(composition.predict([text for text, _ in shown]), shown, console)
        console.print(f"[bold]6. The test[/] on {len(unseen.test)} inputs, of every way on the way there")
        scores = _scores(composition, unseen, prompted, console)
    if as_json:
        figures = {"task": unseen.name, "chosen": composition.report.chosen, "weights": composition.mean_weights}
        print(json.dumps({**figures, "scores": scores}, indent=1, ensure_ascii=False))
        return
    console.print(_table(composition, scores))
    chosen = composition.report.chosen
    console.print(f"Chosen: {LABELS.get(chosen, chosen)} ({composition.report.reason}).")
    console.print(f"It made {composition.report.spending}; the budget of a search was {budget}.")
    console.print("What it has of the adapters, on the mean over layers and members:")
    for name, weight in sorted(composition.mean_weights.items(), key=lambda item: -abs(item[1]))[:MAX_WEIGHTS]:
        console.print(f"   {weight:+.3f}  {name}", markup=False, highlight=False)


def load_task(data: Path, name: str, seed: int, num_test: int, *, num_examples: int = NUM_EXAMPLES) -> DemoTask:
    """Load a task of data/unseen with training rows drawn by the seed; a smaller draw is the beginning of a larger one."""
    manifest = json.loads((data / "MANIFEST.json").read_text())
    entries = {entry["task"]: entry for entry in manifest["groups"]["unseen"] if (data / entry["file"]).is_file()}
    if name not in entries:
        raise InvalidTask(f"no task {name!r} in {data}; there are {', '.join(entries)}")
    entry = entries[name]
    rows = read_rows(data / entry["file"])
    train = [row for row in rows if row["split"] == "train"]
    generator = torch.Generator().manual_seed(seed)
    chosen = [train[int(index)] for index in torch.randperm(len(train), generator=generator)[:num_examples]]
    examples = [(row["input"], row["target"]) for row in chosen]
    task = lw.Task(examples, instruction=entry["definition"], labels=entry["labels"])
    test = [(row["input"], [row["target"], *row.get("also_ok", [])]) for row in rows if row["split"] == "test"]
    return DemoTask(name, task, test[:num_test], entry["related"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file as dicts with all their fields."""
    return [row for _, row in located(path, one_split=False)]


def _print_blend(pool: Path, model: Any, tokenizer: Any, console: Console) -> None:
    """Print one sentence's answer by each of two stored adapters and by their mixture, if the pool has both."""
    if not all((pool / name).is_dir() for name in SKILLS):
        return
    engine = lw.Composer(model, [lw.Adapter.from_pretrained(pool / name) for name in SKILLS], tokenizer=tokenizer)
    mixtures = [*({name: 1.0} for name in SKILLS), SKILLS]
    prompts = [lw.Task([], instruction=SKILLS_INSTRUCTION).prompt(SKILLS_INPUT)] * len(mixtures)
    answers = engine.generate(prompts, mixture=mixtures, max_new_tokens=12, do_sample=False)
    console.print(f"   Two stored adapters and their mixture, in one batch, on {SKILLS_INPUT!r}:", highlight=False)
    for mixture, answer in zip(mixtures, answers, strict=True):
        formula = " + ".join(f"{weight} {name}" for name, weight in mixture.items())
        console.print(f"   {formula}: {answer.strip()}", markup=False, highlight=False)


def _print_answers(answers: Sequence[str], shown: Sequence[tuple[str, list[str]]], console: Console) -> None:
    for (text, targets), answer in zip(shown, answers, strict=True):
        right = "right" if answer in targets else f"wanted {targets[0]!r}"
        console.print(f"   {text!r} -> {answer!r} ({right})", markup=False, highlight=False)


def _scores(
    composition: lw.Composition, unseen: DemoTask, reader: lw.Adapter | None, console: Console
) -> dict[str, dict[str, float]]:
    """Answer the test rows by each composition that was compared, and return its scores by name."""
    # of a program that was left out nothing but its loss is kept
    left_out = {"program"} - composition.members.keys()
    rows = [row for row in composition.report.rows if row.loss is not None and row.name not in left_out]
    scores: dict[str, dict[str, float]] = {}
    plain = replace(composition, task=unseen.task, merge_method="linear", stored=None, members={})
    in_context = replace(plain, task=replace(unseen.task, demonstrations=True), all_weights={}, by_layer=None)
    prompted = {"in_context": in_context, "in_context_adapter": replace(in_context, stored=reader)}
    others = {**prompted, composition.report.chosen: composition, **composition.members}
    for row in track(rows, "   answering", console=console):
        started = time.perf_counter()
        answering = others.get(row.name) or replace(plain, all_weights=row.weights, by_layer=row.by_layer)
        figures = answering.evaluate(unseen.test)
        scores[row.name] = {**figures, "seconds": row.seconds + time.perf_counter() - started}
        interval = f"({100 * figures['low']:.0f}-{100 * figures['high']:.0f})"
        console.print(f"   {figures['value']:4.0%} {interval:<8} {LABELS.get(row.name, row.name)}", highlight=False)
    return scores


def _table(composition: lw.Composition, scores: dict[str, dict[str, float]]) -> ShownTable:
    table = ShownTable(title="Right answers on the test inputs", title_justify="left")
    for column in ("", "score", "95 % interval", "loss", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    chosen, cells = composition.report.chosen, {}
    for name, figures in scores.items():
        interval = f"{figures['low']:.0%} to {figures['high']:.0%}"
        cells[name] = f"{figures['value']:.0%}", interval, f"{figures['loss']:.3f}", f"{figures['seconds']:.1f}"
        table.add_row(LABELS.get(name, name), *cells[name])
    table.add_section()
    table.add_row(f"chosen composition ({LABELS.get(chosen, chosen)})", *cells[chosen], style="bold")
    return table


def _shipped(name: str, option: str) -> Path:
    """Return examples/<name> of the checkout or the installed wheel. Raises AdapterNotFound if it is missing."""
    folder = Path(__file__).resolve().parents[2] / "examples" / name
    if not folder.is_dir():
        raise AdapterNotFound(f"no folder {folder}: the demo's files come with the repository and the wheel; give {option}")
    return folder
