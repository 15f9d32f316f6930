"""Makes the adapter in examples/in_context, which reads demonstrations: trained on all tasks of a data folder at once.

    python examples/make_in_context.py --data examples/data --out examples/in_context
    python examples/make_in_context.py --data DATA --out runs/in_context --folds 3   (each leaves a third of the tasks out)

A row shows up to eight examples of a task one after the other, and asks for each answer given those before it (MetaICL, Min
et al. 2022, arXiv 2110.15943). The adapter that ships was made with seed 0 from all 33 tasks, see make_pool.py. An
interrupted run goes on where it stopped (--checkpoint). Each adapter takes about 11 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import loraweave as lw
from loraweave.composer.compose.candidates import IN_CONTEXT
from loraweave.composer.compose.refine import linear_targets
from loraweave.demo import read_rows

SETTINGS: dict[str, Any] = {"steps": 200, "lr": 1e-3, "batch_size": 3, "rank": 8}
# tasks that teach one skill on other texts are left out together
SAME_SKILL = {"sentiment_tweet": "sentiment_movie"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MANIFEST.json and pool/*.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the adapter's folder, with --folds theirs")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/in_context"), help="where unfinished work is kept")
    parser.add_argument("--folds", type=int, default=0, help="make so many, each without its share of the tasks")
    parser.add_argument("--fold", type=int, help="only this one of them")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    manifest = json.loads((options.data / "MANIFEST.json").read_text())["groups"]["pool"]
    entries = [entry for entry in manifest if (options.data / entry["file"]).is_file()]
    if not options.folds:
        _make(options, entries, set(), options.out)
        return
    skills = [entry["task"] for entry in entries if entry["task"] not in SAME_SKILL]
    for fold in range(options.folds) if options.fold is None else [options.fold]:
        own = set(skills[fold :: options.folds])
        left_out = own | {task for task, twin in SAME_SKILL.items() if twin in own}
        _make(options, [entry for entry in entries if entry["task"] not in left_out], left_out, options.out / f"fold-{fold}")


def _make(options: argparse.Namespace, entries: list[dict[str, Any]], left_out: set[str], out: Path) -> None:
    model, tokenizer = lw.load_base(dtype=torch.bfloat16)
    trained = lw.train_adapters(
        model,
        tokenizer,
        {"in_context": [_task(options.data, entry) for entry in entries]},
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
        "note": f"Trained on {len(entries)} tasks at once, each row showing up to eight examples of one of them.",
        "left_out": sorted(left_out),
    }
    replace(adapter, card={**adapter.card, **card}).save_pretrained(out, dtype=torch.float16)


def _task(data: Path, entry: dict[str, Any]) -> lw.Task:
    train = [(row["input"], row["target"]) for row in read_rows(data / entry["file"]) if row["split"] == "train"]
    return lw.Task(train, instruction=entry["definition"], labels=entry["labels"], demonstrations=True)


if __name__ == "__main__":
    main()
