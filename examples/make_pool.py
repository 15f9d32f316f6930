"""Makes the pool of adapters in examples/pool: one for each task of a data folder, trained, scored and given a card.

    python examples/make_pool.py --data examples/data --out examples/pool

The pool that ships with the repository was made with seed 0 from all 33 tasks. Four of them ("shipped": false in
MANIFEST.json) have data without an explicit licence, which are not in the repository: they are skipped unless --data
names a folder that has them. An interrupted run goes on where it stopped (--checkpoint).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows_by_rule import with_all_numbers

import loraweave as lw
from loraweave.composer.model.scoring import Score, evaluate
from loraweave.extensions.tour import read_rows

SAMPLES = Path(__file__).parent / "samples.json"
NUM_SAMPLES = 20
NUM_TRAIN_SCORED = 50
# tasks that go on learning after 60 steps: trained until the loss on a tenth of their rows is lowest
SLOW = {
    "addition",
    "emotion",
    "intent_domain",
    "nli",
    "plural",
    "product_company",
    "scan",
    "second_letter",
    "spell_out",
    "starts_with",
    "translate_en_fr",
}
LONGER: dict[str, Any] = {"steps": 200, "held_out": 0.1, "evaluate_every": 20}
# of a task whose rows a rule makes, so that a held-out tenth says nothing new
RULED, BY_RULE = {"number_words"}, {"steps": 200, "batch_size": 16}
# a gain below this many standard errors of the test score is called no gain in the card
SIGNIFICANT = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MANIFEST.json and pool/*.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one PEFT folder a task")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/pool"), help="where unfinished work is kept")
    parser.add_argument("--base", help="base model: a known name, folder, GGUF file or hub id; the embedded one by default")
    parser.add_argument("--tasks", nargs="*", help="only these tasks")
    parser.add_argument("--chat", action="store_true", help="ask in the base's chat template, in turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    manifest = json.loads((options.data / "MANIFEST.json").read_text())["groups"]["pool"]
    entries = [entry for entry in manifest if (options.data / entry["file"]).is_file()]
    entries = [entry for entry in entries if not options.tasks or entry["task"] in options.tasks]
    model, tokenizer = lw.load_base(options.base, dtype=torch.bfloat16)
    rows = {entry["task"]: read_rows(options.data / entry["file"]) for entry in entries}
    tasks = {entry["task"]: _task(entry, rows[entry["task"]], options.chat) for entry in entries}
    adapters: dict[str, lw.Adapter] = {}
    groups = (({}, "", tasks.keys() - SLOW - RULED), (LONGER, "longer", SLOW), (BY_RULE, "ruled", RULED))
    for settings, folder, names in groups:
        some = {name: task for name, task in tasks.items() if name in names}
        if some:
            work = options.checkpoint / folder
            adapters |= lw.train_adapters(model, tokenizer, some, checkpoint=work, seed=options.seed, **settings)
    results = []
    for entry in track(entries, description="scoring"):
        name = entry["task"]
        adapter = _rounded(adapters[name], options.checkpoint / "rounded")
        scores = _scores(model, tokenizer, adapter, tasks[name], rows[name], options.checkpoint / "scores")
        card = {**adapter.card, **_card(entry, rows[name], scores)}
        finished = replace(adapter, card=card)
        finished.save_pretrained(options.out / name, dtype=torch.float16)
        results.append((name, scores))
    _print(results)


def _task(entry: dict[str, Any], rows: list[dict[str, Any]], chat: bool) -> lw.Task:
    train = [(row["input"], row["target"]) for row in rows if row["split"] == "train"]
    if entry["task"] == "number_words":
        train = with_all_numbers(train, [row["input"] for row in rows if row["split"] == "test"])
    return lw.Task(train, instruction=entry["definition"], labels=entry["labels"], chat=chat)


def _rounded(adapter: lw.Adapter, folder: Path) -> lw.Adapter:
    """The adapter as it is when read back from half precision: what is scored is what ships."""
    path = adapter.save_pretrained(folder / adapter.name, dtype=torch.float16)
    return replace(lw.Adapter.from_pretrained(path, name=adapter.name), card=adapter.card)


def _scores(
    model: Any, tokenizer: Any, adapter: lw.Adapter, task: lw.Task, rows: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """Test and train score with the adapter, test score without; kept in a file, since they take half a minute a task."""
    path = folder / f"{adapter.name}-{adapter.hash[:16]}.json"
    if path.is_file():
        return json.loads(path.read_text())
    test = [_pair(row) for row in rows if row["split"] == "test"]
    train = [_pair(row) for row in rows if row["split"] == "train"][:NUM_TRAIN_SCORED]
    zero_shot = evaluate(model, tokenizer, task, test)
    with lw.Composer(model, [adapter]).activate({adapter.name: 1.0}):
        adapted, fitted = evaluate(model, tokenizer, task, test), evaluate(model, tokenizer, task, train)
    scores = {
        "metric": task.metric,
        "test": _figures(adapted),
        "train": _figures(fitted),
        "zero_shot_test": _figures(zero_shot),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores))
    return scores


def _pair(row: dict[str, Any]) -> tuple[str, list[str]]:
    return row["input"], [row["target"], *row.get("also_ok", [])]


def _figures(score: Score) -> dict[str, float]:
    return {
        "value": round(score.value, 4),
        "low": round(score.low, 4),
        "high": round(score.high, 4),
        "loss": round(score.loss, 4),
        "count": score.count,
    }


def learned(scores: dict[str, Any]) -> bool:
    """Whether the test score rose by more than two standard errors over zero-shot."""
    before, after, count = scores["zero_shot_test"]["value"], scores["test"]["value"], scores["test"]["count"]
    spread = ((before * (1 - before) + after * (1 - after)) / count) ** 0.5
    return after - before > SIGNIFICANT * spread


def _card(entry: dict[str, Any], rows: list[dict[str, Any]], scores: dict[str, Any]) -> dict[str, Any]:
    name = entry["task"]
    licences = sorted({source["licence"] for source in entry["sources"]})
    written = json.loads(SAMPLES.read_text())
    if name in written:
        samples = written[name]
        data = "The training data have no explicit licence and are not part of this repository; the sample inputs were "
        data += "written for this card."
    else:
        samples = [(row["input"], row["target"]) for row in rows if row["split"] == "train"][:NUM_SAMPLES]
        data = f"Training data: {'; '.join(licences)}."
    effect = "" if learned(scores) else "This adapter's test score does not differ from the base model's beyond chance."
    return {
        "description": entry["definition"],
        "examples": [given for given, _ in samples],
        "outputs": [output for _, output in samples],
        "tags": [entry["category"]],
        "license": "apache-2.0",
        "data_license": licences,
        "data_source": [f"{source['repo']}@{source['commit'][:12]}" for source in entry["sources"]],
        "note": " ".join(part for part in (data, effect) if part),
        "scores": scores,
    }


def _print(results: list[tuple[str, dict[str, Any]]]) -> None:
    table = Table(title="test score without and with the adapter")
    for column in ("task", "metric", "zero-shot", "adapted", "train", "learned"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, scores in results:
        figures = [f"{scores[part]['value']:.2f}" for part in ("zero_shot_test", "test", "train")]
        table.add_row(name, scores["metric"], *figures, "yes" if learned(scores) else "no")
    Console().print(table)


if __name__ == "__main__":
    main()
