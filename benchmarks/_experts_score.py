"""What trainable mixtures answer after joint training on several tasks, beside one LoRA of at least as many parameters."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _adapters import ALL
from _unseen_store import NO_SEED, NO_SHOTS, Key, Measured, Store, write_together
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import loraweave as lw
from loraweave.composer import scoring
from loraweave.composer.batches import IGNORED, EncodedRow, batch
from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.training.seeding import seeded
from loraweave.demo import fast_dtype, read_rows

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = ROOT / "benchmarks" / "data" / "experts.json"
TASKS = ("past_tense", "antonym", "addition", "pick_animal_5")
CLIP = 1.0
RESAMPLES = 2000
# 32 rank rows at each layer, in experts of rank 4, as far as a recipe can
NUM_EXPERTS, RANK = 8, 4
# the gates of a mixture are about 4 rank rows more
ONE = {"num_experts": (1,), "top_k": 1, "balance": 0.0}


@dataclass(frozen=True)
class Kind:
    """A recipe with its options.

    `given` says that a call names each row's task, `apart` that each task has a model alone, `shares` that the tasks, which
    are the experts, share the rank rows.
    """

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    given: bool = False
    apart: bool = False
    shares: bool = False


def mola(*num_experts: int, rank: int) -> Kind:
    return Kind("mola", {"num_experts": num_experts, "rank": rank})


KINDS: Mapping[str, Kind] = {
    "one_lora": Kind("mola", {**ONE, "rank": NUM_EXPERTS * RANK + 4}),
    "separate": Kind("mola", ONE, given=True, apart=True, shares=True),
    "mola_8888": mola(8, 8, 8, 8, rank=RANK),
    "mixture_of_loras": Kind("mixture_of_loras", shares=True),
    "moelora": Kind("moelora", {"rank": NUM_EXPERTS * RANK, "num_experts": NUM_EXPERTS}, given=True),
    "mola_2468": mola(2, 4, 6, 8, rank=6),
    "mola_5555": mola(5, 5, 5, 5, rank=6),
    "mola_8642": mola(8, 6, 4, 2, rank=6),
    "mixture_of_loras_oracle": Kind("mixture_of_loras", {"oracle": True}, given=True, shares=True),
    "octavius": Kind("octavius", {"rank": 2 * RANK, "num_experts": NUM_EXPERTS // 2}),
    "mocle_by_task": Kind("mocle", {"rank": RANK, "num_experts": NUM_EXPERTS - 1, "by_task": True}, given=True),
    "one_lora_active": Kind("mola", {**ONE, "rank": 2 * RANK}),
    "multilora": Kind("multilora", {"rank": 2 * RANK, "num_experts": NUM_EXPERTS // 2}),
    # at feed-forward blocks alone
    "mixlora": Kind("mixlora", {"rank": 6, "num_experts": NUM_EXPERTS, "target_modules": ("mlp",)}),
}


@dataclass(frozen=True)
class Data:
    """A task with the token ids of its training rows, and its test inputs with their accepted targets."""

    task: lw.Task
    rows: Sequence[EncodedRow]
    tests: Sequence[tuple[str, Sequence[str]]]


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
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=[*KINDS, "base"], help="only these")
    parser.add_argument("--tasks", nargs="*", default=TASKS, help="trained together; none may have labels")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=12, help="test items of each task")
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
    model, tokenizer = lw.load_base(dtype=fast_dtype())
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
    """Whether all tasks were measured so; of other steps or items it would be another measurement."""
    found = {task: known.get(Key(task, kind, NO_SHOTS, seed)) for task in data}
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
    for name in options.tasks:
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
    # each of the models of one task has its share of the steps
    groups = [[task] for task in data] if kind.apart else [list(data)]
    for tasks in groups:
        own = {task: data[task] for task in tasks}
        named = {} if kind.apart else {"tasks": tuple(data)}
        chosen = {**_shared(kind, len(data)), **named, **kind.options}
        with lw.experts(kind.recipe, model, tokenizer=tokenizer, seed=seed, **chosen) as made:
            started, cpu_started = time.perf_counter(), time.process_time()
            steps = options.steps // len(groups)
            last = train(made, tokenizer, own, steps=steps, batch_size=options.batch_size, seed=seed)
            taken = [(time.perf_counter() - started) / len(tasks), (time.process_time() - cpu_started) / len(tasks)]
            count = sum(value.numel() for value in made.expert_parameters().values() if value.requires_grad)
            notes = {"of_steps": options.steps, "parameters": count * len(groups), "last_loss": round(last, 4)}
            for task in tasks:
                asked = OfTask(made, task if kind.given and not kind.apart else None)
                yield _answered(asked, tokenizer, name, seed, task, data[task], notes, *taken)


def _shared(kind: Kind, num_tasks: int) -> dict[str, Any]:
    """Options that kinds have in common, unless theirs are others."""
    rank = {"rank": NUM_EXPERTS * RANK // num_tasks} if kind.shares else {}
    return rank if "target_modules" in kind.options else {"target_modules": ALL, **rank}


def _answered(
    model: Any, tokenizer: Any, name: str, seed: int, task: str, data: Data, notes: Mapping[str, Any], *taken: float
) -> Measured:
    score = scoring.evaluate(model, tokenizer, data.task, data.tests)
    right_N = np.array(score.right, dtype=np.uint8)
    return Measured(Key(task, name, NO_SHOTS, seed), right_N, score.loss, *taken, notes)


def train(made: ExpertModel, tokenizer: Any, data: Mapping[str, Data], *, steps: int, batch_size: int, seed: int) -> float:
    """Trains on rows of all tasks in turn, in an order that the seed alone determines, and returns the mean loss of the last
    tenth of the steps. AdamW at the recipe's own learning rate, gradients clipped at a norm of 1."""
    parameters = [value for value in made.expert_parameters().values() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=made.recipe.lr, weight_decay=0.0)
    stream, taken = _stream(data, seed), []
    made.train()
    for _ in range(steps):
        rows = [next(stream) for _ in range(batch_size)]
        inputs, labels_BT = _labelled(made.base_model, tokenizer, [row for _, row in rows])
        tasks = [task for task, _ in rows] if made.tasks else None
        output = made(**inputs, labels=labels_BT, task=tasks, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(float(output.loss.detach()))
    made.eval()
    return float(np.mean(taken[-max(1, steps // 10) :]))


def _stream(data: Mapping[str, Data], seed: int) -> Iterator[tuple[str, EncodedRow]]:
    """Rows of one task after another, each task's in a new order every time they have all been there."""
    waiting: dict[str, list[EncodedRow]] = {task: [] for task in data}
    generator = seeded(seed, "rows")
    while True:
        for task, of_task in data.items():
            if not waiting[task]:
                waiting[task] = [of_task.rows[at] for at in torch.randperm(len(of_task.rows), generator=generator).tolist()]
            yield task, waiting[task].pop()


def _labelled(model: Any, tokenizer: Any, rows: Sequence[EncodedRow]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs padded on the left, and labels_BT where the targets are."""
    made = batch(model, tokenizer, rows)
    labels_BT = torch.full_like(made.inputs["input_ids"], IGNORED)
    labels_BT[:, -made.targets_BK.shape[1] :] = made.targets_BK
    return made.inputs, labels_BT


def print_report(found: Sequence[Measured]) -> None:
    """Means over tasks, and over the seeds of each: with the interval over items, and the difference to one LoRA by task."""
    kinds = list(dict.fromkeys(each.key.way for each in found))
    table = Table(
        "kind", "seeds", "task given", "M parameters", "right answers", "above one_lora", "loss", "least above, by task"
    )
    one = _by_task([each for each in found if each.key.way == "one_lora"])
    for name in sorted(kinds, key=lambda name: -_mean(_by_task([each for each in found if each.key.way == name]))):
        own = [each for each in found if each.key.way == name]
        by_task = _by_task(own)
        cells = [name, str(len({each.key.seed for each in own})), "yes" if name in KINDS and KINDS[name].given else ""]
        cells.append(f"{own[0].notes.get('parameters', 0) / 1e6:.1f}")
        cells.append(_interval(by_task))
        if set(by_task) == set(one):
            both = {task: by_task[task] - one[task] for task in one}
            cells.append(_interval(both))
            least = min(both, key=lambda task: float(both[task].mean()))
            last = f"{least} {both[least].mean():+.2f}"
        else:
            cells.append("")
            last = ""
        table.add_row(*cells, f"{np.mean([each.loss for each in own]):.3f}", last)
    Console(width=150).print(table)


ByTask = Mapping[str, np.ndarray]


def _by_task(found: Sequence[Measured]) -> dict[str, np.ndarray]:
    """The share of the seeds in which each item was answered right."""
    tasks = dict.fromkeys(each.key.task for each in found)
    return {task: np.mean([each.right_N for each in found if each.key.task == task], axis=0) for task in tasks}


def _mean(by_task: ByTask) -> float:
    return float(np.mean([values.mean() for values in by_task.values()]))


def _interval(by_task: ByTask) -> str:
    """The mean with its 95 % interval by bootstrap over the items of each task."""
    generator = np.random.default_rng(0)
    drawn = [
        _mean({task: values[generator.integers(0, len(values), len(values))] for task, values in by_task.items()})
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{_mean(by_task):.3f} [{low:.3f}, {high:.3f}]"
