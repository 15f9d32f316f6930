"""Answers tasks that no adapter was trained for with few examples each, and compares the ways to do it.

    python benchmarks/unseen.py --out runs/unseen --data DATA
    python benchmarks/unseen.py --out runs/unseen --data DATA --ways auto gradient --shots 5 20 --seeds 0 1 2 3 4
    python benchmarks/unseen.py --out runs/unseen --data DATA --report      (the tables of what has been measured so far)
    python benchmarks/unseen.py --out runs/unseen --data DATA --together    (writes benchmarks/data/unseen.json)

The ways: the base model without an example (`base`) and with the examples in its prompt (`in_context`); a LoRA trained on
the examples alone (`lora_examples`), and one that begins as a composition (`composed_and_tuned`); the adapter that
retrieval puts first (`retrieved_first`); the published LoraHub recipe (`lorahub_original`: 20 adapters at random, A and B
mixed apart, 40 evaluations by nevergrad's NGOpt, the loss as its authors coded it); a LoRA trained on the whole training
set (`oracle`); for joined skills the adapter that is best on the test items (`any_single`), and both skills one after the
other (`two_passes`); and every method of `compose()` by its name.

Every measurement is kept in --out as it is made, so that an interrupted run goes on; it goes on, too, from what
benchmarks/data/unseen.json holds. Several processes share the work by --part. --again measures ways anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _unseen_report import print_report
from _unseen_store import NO_SEED, NO_SHOTS, Key, Measured, Store, write_together
from _unseen_ways import OF_JOINED_SKILLS, WITHOUT_EXAMPLES, Case, find
from rich.progress import Progress

import loraweave as lw
from loraweave.demo import fast_dtype, load_task, read_rows

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = ROOT / "benchmarks" / "data" / "unseen.json"
WAYS = (
    "base",
    "in_context",
    "lora_examples",
    "composed_and_tuned",
    "retrieved_first",
    "best_single",
    "uniform",
    "lorahub_original",
    "similarity",
    "random",
    "greedy",
    "bayesian",
    "lorahub",
    "adamerging",
    "first_order",
    "gradient",
    "auto",
    "oracle",
    "any_single",
    "two_passes",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "data", help="has MANIFEST.json, unseen/*.jsonl")
    parser.add_argument("--pool", type=Path, default=ROOT / "examples" / "pool", help="folder of adapter folders")
    parser.add_argument("--tasks", nargs="*", help="only these tasks")
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--shots", type=int, nargs="*", default=[5], help="numbers of examples")
    parser.add_argument("--k", type=int, default=20, help="adapters that retrieval brings")
    parser.add_argument("--budget", type=int, default=40, help="evaluations of each search")
    parser.add_argument("--num-test", type=int, default=100, help="test items of each task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", default="1/1", help="2/3 is the second of three processes that share the tasks")
    parser.add_argument("--again", nargs="*", default=[], help="ways whose earlier measurements do not count")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--together", action="store_true", help="only write all measurements into one file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    manifest = json.loads((options.data / "MANIFEST.json").read_text())["groups"]["unseen"]
    relations = {entry["task"]: entry["relation"] for entry in manifest if (options.data / entry["file"]).is_file()}
    options.out.mkdir(parents=True, exist_ok=True)
    store = Store(options.out, TOGETHER)
    if options.together:
        write_together(store.all().values(), TOGETHER)
        return
    if not options.report:
        measure(options, store, relations)
    print_report(store.all(), relations, WAYS)


def measure(options: argparse.Namespace, store: Store, relations: dict[str, str]) -> None:
    known = Store(options.out).all() if options.again else {}
    known |= {key: found for key, found in store.all().items() if key.way not in options.again}
    wanted = [key for key in _keys(options, relations) if key not in known]
    model, tokenizer = lw.load_base(dtype=fast_dtype())
    with tempfile.TemporaryDirectory() as folder, lw.Hub(folder) as hub, Progress() as progress:
        for path in sorted(path for path in options.pool.iterdir() if path.is_dir()):
            hub.add(path)
        shown = progress.add_task("measuring", total=len(wanted))
        for key in wanted:
            progress.update(shown, description=f"{key.task}, {key.way}, {key.shots} examples, seed {key.seed}")
            store.keep(_measured(_case(model, tokenizer, hub, key, options), key))
            progress.advance(shown)


def _keys(options: argparse.Namespace, relations: dict[str, str]) -> Iterator[Key]:
    """What is to be measured: every way on every task with one seed, before the next seed."""
    number, count = (int(part) for part in options.part.split("/"))
    chosen = [task for task in relations if not options.tasks or task in options.tasks]
    tasks = chosen[number - 1 :: count]
    for shots in options.shots:
        for seed in options.seeds:
            for task in tasks:
                for way in options.ways:
                    if way in OF_JOINED_SKILLS and relations[task] != "compositional":
                        continue
                    if way not in WITHOUT_EXAMPLES:
                        yield Key(task, way, shots, seed)
                    elif (shots, seed) == (options.shots[0], options.seeds[0]):
                        yield Key(task, way, NO_SHOTS, NO_SEED)


def _case(model: Any, tokenizer: Any, hub: lw.Hub, key: Key, options: argparse.Namespace) -> Case:
    unseen = load_task(options.data, key.task, key.seed, options.num_test, num_examples=max(key.shots, 1))
    rows = read_rows(options.data / "unseen" / f"{key.task}.jsonl")
    training = [(row["input"], row["target"]) for row in rows if row["split"] == "train"]
    return Case(model, tokenizer, hub, unseen, training, key.seed, options.k, options.budget)


def _measured(case: Case, key: Key) -> Measured:
    started, cpu_started = time.perf_counter(), time.process_time()
    found = find(case, key.way)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    score = case.score(found)
    right_N = torch.tensor(score.right).to(torch.uint8).numpy()
    return Measured(key, right_N, score.loss, seconds, cpu_seconds, found.notes)


if __name__ == "__main__":
    main()
