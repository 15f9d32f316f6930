"""Makes the adapter in examples/in_context, which reads demonstrations: trained on all tasks of a data folder at once.

    python examples/make_in_context.py --data examples/data --out examples/in_context
    python examples/make_in_context.py --data DATA --out runs/in_context --folds 3   (each leaves a third of the tasks out)

A row shows up to eight examples of a task one after the other, and asks for each answer given those before it (MetaICL, Min
et al. 2022, arXiv 2110.15943). The adapter that ships was made with seed 0 from all 33 tasks, see make_pool.py, and from 85
of tasks_by_rule.py. An interrupted run goes on where it stopped (--checkpoint). It took about 45 minutes of one busy core.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tasks_by_rule import tasks_by_rule

import loraweave as lw
from loraweave.composer.compose.candidates import IN_CONTEXT
from loraweave.composer.compose.refine import linear_targets
from loraweave.extensions.tour import read_rows

SETTINGS: dict[str, Any] = {"steps": 400, "lr": 1e-3, "batch_size": 3, "rank": 8}
# tasks that teach one skill on other texts are left out together
SAME_SKILL = {"sentiment_tweet": "sentiment_movie"}
# whose training rows have the words and sentences of the tasks that rules make
WORDS = ("pick_first_5", "pick_middle_5", "pick_animal_5", "pick_adjective_5", "odd_one_out", "alphabetical_first_3")
SENTENCES = ("passive", "negation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MANIFEST.json and pool/*.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the adapter's folder, with --folds theirs")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/in_context"), help="where unfinished work is kept")
    parser.add_argument("--base", help="base model: a known name, folder, GGUF file or hub id; the embedded one by default")
    parser.add_argument("--folds", type=int, default=0, help="make so many, each without its share of the tasks")
    parser.add_argument("--fold", type=int, help="only this one of them")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    manifest = json.loads((options.data / "MANIFEST.json").read_text())["groups"]["pool"]
    entries = [entry for entry in manifest if (options.data / entry["file"]).is_file()]
    by_rule = list(tasks_by_rule(*_words_and_sentences(options.data, entries)).values())
    if not options.folds:
        _make(options, entries, by_rule, set(), options.out)
        return
    skills = [entry["task"] for entry in entries if entry["task"] not in SAME_SKILL]
    for fold in range(options.folds) if options.fold is None else [options.fold]:
        own = set(skills[fold :: options.folds])
        left_out = own | {task for task, twin in SAME_SKILL.items() if twin in own}
        kept = [entry for entry in entries if entry["task"] not in left_out]
        _make(options, kept, by_rule, left_out, options.out / f"fold-{fold}")


def _make(
    options: argparse.Namespace, entries: list[dict[str, Any]], by_rule: list[lw.Task], left_out: set[str], out: Path
) -> None:
    model, tokenizer = lw.load_base(options.base, dtype=torch.bfloat16)
    trained = lw.train_adapters(
        model,
        tokenizer,
        {"in_context": [*(_task(options.data, entry) for entry in entries), *by_rule]},
        target_modules=linear_targets(model),
        checkpoint=options.checkpoint / out.name,
        seed=options.seed,
        **{**SETTINGS, "steps": options.steps},
    )
    adapter = trained["in_context"]
    licences = sorted({source["licence"] for entry in entries for source in entry["sources"]})
    card = {
        "description": "Answers as the examples in the prompt do.",
        "tags": [IN_CONTEXT],
        "license": "apache-2.0",
        "data_license": licences,
        "note": f"Trained on {len(entries)} tasks and {len(by_rule)} that rules made at once, each row showing up to eight "
        "examples of one of them.",
        "left_out": sorted(left_out),
    }
    replace(adapter, card={**adapter.card, **card}).save_pretrained(out, dtype=torch.float16)


def _words_and_sentences(data: Path, entries: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Common words of three to nine letters, in their order, and sentences of at most nine words."""
    needed = [entry for entry in entries if entry["task"] in (*WORDS, *SENTENCES)]
    given = {entry["task"]: [text for text, _ in _rows(data, entry)] for entry in needed}
    listed = {word for task in WORDS for text in given[task] for word in text.split(", ")}
    words = sorted(word for word in listed if word.isalpha() and word.islower() and 3 <= len(word) <= 9)
    return words, [text for task in SENTENCES for text in given[task] if len(text.split()) <= 9]


def _rows(data: Path, entry: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["input"], row["target"]) for row in read_rows(data / entry["file"]) if row["split"] == "train"]


def _task(data: Path, entry: dict[str, Any]) -> lw.Task:
    return lw.Task(_rows(data, entry), instruction=entry["definition"], labels=entry["labels"], demonstrations=True)


if __name__ == "__main__":
    main()
