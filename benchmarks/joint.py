"""Many adapters in shared bases: bytes, errors, points lost on their own tasks, and the time of a token.

    python -m benchmarks --out runs/joint joint --parts make --rounds 3
    python -m benchmarks --out runs/joint joint
    python -m benchmarks --cpu --seconds 600 --out runs/joint joint --parts decode

Made first, and kept in --out: copies of the example pool's adapters, each trained further by itself on rows drawn with
replacement. Those of --more join afterwards, in the bases that are there. Peers are vlora-dev and lorashare at as many
values as ours keep. Without a peer's package its row is missing.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import loraweave as lw
from benchmarks._run import Run, Table, pairs
from benchmarks._timing import Way, compare
from loraweave.composer.model.scoring import evaluate, losses
from loraweave.extensions.transfer import JointPool

app = typer.Typer()

# of a round: copies of each task, which share a pass; their steps, and rows of a step
COPIES, STEPS, ROWS = 12, 4, 2
LR, ALPHA = 2e-3, 16


@app.command()
def main(
    context: typer.Context,
    parts: Annotated[str, typer.Option(help="of make, errors, peers, scores, decode")] = "errors,peers,scores,decode",
    rounds: Annotated[int, typer.Option(help=f"of making {COPIES} copies of each adapter")] = 3,
    counts: Annotated[str, typer.Option(help="adapters, several numbers with commas")] = "58,116,232,1000",
    more: Annotated[str, typer.Option(help="a folder of adapter folders that join later")] = "",
    settings: Annotated[str, typer.Option(help="rank x clusters and middle, several with commas")] = "8x29 full",
    every: Annotated[int, typer.Option(help="errors are those of one layer in so many")] = 6,
    tasks: Annotated[str, typer.Option(help="scored on their own tasks")] = "passive,plural,antonym,pick_animal_5",
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 20,
) -> None:
    """A row for each number and setting, one for each peer, the scores, and a table of times."""
    run: Run = context.obj
    names = [path.name for path in run.adapters() if path.name in run.entries("pool")]
    asked, each = parts.split(","), settings.split(",")
    if "make" in asked:
        train_copies(run, names, rounds)
    if "errors" in asked or "peers" in asked:
        known = [_thinned(lw.Adapter.from_pretrained(path, name=path.name), every) for path in _paths(run, names)]
        table = Table(f"adapters of {len(names)} tasks, trained copies, one layer in {every}", ("adapters", *COLUMNS))
        for count in sorted({min(int(text), len(known)) for text in counts.split(",")}):
            given = {adapter.name: adapter for adapter in known[:count]}
            for setting in each:
                made = _fitted(given, setting)
                _row(table, count, f"ours, {setting}", made.report.share, made.errors)
                if "peers" in asked and count == min(int(counts.split(",")[-1]), len(known)):
                    for name, peer in PEERS.items():
                        if importlib.util.find_spec(name):
                            _row(table, count, name, *peer(given, made.report.share))
        if more:
            again = [lw.Adapter.from_pretrained(path) for path in sorted(Path(more).iterdir()) if path.is_dir()]
            joining = {one.name: replace(_thinned(one, every), name=f"{one.name}, again") for one in again}
            grown = {name: made.including(one).errors[one.name] for name, one in joining.items()}
            _row(table, len(again), "trained again, joined", made.report.share, grown)
        run.show(table)
    if not {"scores", "decode"} & set(asked):
        return
    # k-means finds the tasks, so that those which are scored share bases with their own copies alone
    chosen = _paths(run, tasks.split(","))
    scored = {path.name: lw.Adapter.from_pretrained(path, name=path.name) for path in chosen}
    made = _fitted(scored, f"{each[0].split('x')[0]}x{len(tasks.split(','))} full")
    model, tokenizer = lw.load_base(dtype=torch.float32)
    if "scores" in asked:
        run.show(_scores(run, model, tokenizer, scored, made, tasks.split(","), num_test))
    if "decode" in asked:
        _times(run, model, scored, made)


def _paths(run: Run, names: list[str]) -> list[Path]:
    """The pool's adapters, then the copies that were made: the first of each task, the second of each, and so on."""
    copies = [path for name in names for path in run.folder().glob(f"{name}.*")]
    return [*(run.pool / name for name in names), *sorted(copies, key=lambda path: (int(path.suffix[1:]), path.name))]


def _thinned(adapter: lw.Adapter, every: int) -> lw.Adapter:
    return replace(adapter, layers=dict(list(adapter.layers.items())[::every]))


COLUMNS = ("way", "values kept", "error: mean", "median", "largest")


def train_copies(run: Run, names: list[str], rounds: int) -> None:
    """Makes NAME.1, NAME.2, ..: each begins as the pool's adapter and learns from rows of its own drawing."""
    model, tokenizer = lw.load_base(dtype=torch.bfloat16)
    for number in range(rounds):
        for task in names:
            rows, start = run.rows(task), lw.Adapter.from_pretrained(run.pool / task)
            given, places = pairs(rows, "train"), range(number * COPIES, (number + 1) * COPIES)
            own = {f"{task}.{place + 1}": np.random.default_rng([run.seed, place]) for place in places}
            if all((run.folder() / name).is_dir() for name in own):
                continue
            drawn = {name: [given[n] for n in draw.integers(len(given), size=STEPS * ROWS)] for name, draw in own.items()}
            made = lw.train_adapters(
                model,
                tokenizer,
                {name: lw.Task(each, instruction=rows[0]["definition"]) for name, each in drawn.items()},
                start=dict.fromkeys(own, start),
                steps=STEPS,
                batch_size=ROWS,
                lr=LR,
                alpha=ALPHA,
                warmup=0,
                jobs_per_batch=COPIES,
                progress=False,
            )
            for name, adapter in made.items():
                adapter.save_pretrained(run.folder() / name)
            print(f"{task} {number}: {time.process_time():.0f} s", flush=True)


def _fitted(given: Mapping[str, lw.Adapter], setting: str) -> JointPool:
    sizes, middle = setting.split(" ")
    rank, clusters = map(int, sizes.split("x"))
    return JointPool.fit(given, rank=rank, clusters=clusters, middle=middle)  # type: ignore[arg-type]


def _row(table: Table, count: int, name: str, share: float, errors: Mapping[str, float]) -> None:
    ordered = sorted(errors.values())
    figures = (sum(ordered) / len(ordered), ordered[len(ordered) // 2], ordered[-1])
    table.add(str(count), name, f"{share:.1%}", *(f"{value:.3f}" for value in figures))


def _vlora(given: Mapping[str, lw.Adapter], share: float) -> tuple[float, dict[str, float]]:
    from vlora.io import LoRAWeights
    from vlora.subspace import SharedSubspace

    weights = []
    for adapter in given.values():
        a, b = ({name: getattr(part, field) for name, part in adapter.layers.items()} for field in ("a_RI", "b_OR"))
        weights.append(LoRAWeights(list(adapter.layers), a, b, adapter.rank))
    num_values = next(iter(given.values())).num_values
    # k directions of both flat factors, and k numbers for each factor of each adapter's layers
    per_direction = num_values + 2 * len(given) * len(weights[0].layer_names)
    directions = max(1, round(share * num_values * len(given) / per_direction))
    found = SharedSubspace.from_adapters(weights, list(given), num_components=directions)
    errors = {}
    for name, adapter in given.items():
        back = found.reconstruct(name)
        errors[name] = _error(adapter, {layer: (back.lora_a[layer], back.lora_b[layer]) for layer in adapter.layers})
    # a mean of each factor is kept too
    return (directions * per_direction + num_values) / (num_values * len(given)), errors


def _lorashare(given: Mapping[str, lw.Adapter], share: float) -> tuple[float, dict[str, float]]:
    from lorashare.model import SHAREModel

    first = next(iter(given.values()))
    # k directions of width I and O in each layer, and k x rank numbers for each factor of each adapter's layers
    sides = sum(part.b_OR.shape[0] + part.a_RI.shape[1] for part in first.layers.values())
    per_direction = sides + 2 * first.rank * len(given) * len(first.layers)
    directions = max(1, round(share * first.num_values * len(given) / per_direction))
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            f"n{number}": str(adapter.save_pretrained(Path(folder, str(number))))
            for number, adapter in enumerate(given.values())
        }
        found = SHAREModel.from_adapters(paths, num_components=directions, device="cpu")
        errors = {}
        for key, adapter in zip(paths, given.values(), strict=True):
            back = found.reconstruct(key)
            parts = {}
            for layer in adapter.layers:
                a, b = (next(value for name, value in back.items() if f"{layer}.lora_{side}." in name) for side in "AB")
                # what it reads has the scale apart, which is 1 in what we write
                parts[layer] = (a, b)
            errors[adapter.name] = _error(adapter, parts)
    return directions * per_direction / (first.num_values * len(given)), errors


PEERS = {"vlora": _vlora, "lorashare": _lorashare}


def _error(adapter: lw.Adapter, parts: Mapping[str, tuple[Any, Any]]) -> float:
    lost = size = 0.0
    for layer, (a, b) in parts.items():
        own = adapter.delta(layer)
        lost += float((b.float() @ a.float() - own).square().sum())
        size += float(own.square().sum())
    return math.sqrt(lost / size)


def _scores(
    run: Run, model: Any, tokenizer: Any, given: Mapping[str, lw.Adapter], made: JointPool, tasks: list[str], num_test: int
) -> Table:
    table = Table(f"their own tasks, {num_test} items of each", ("adapter", "as it is", "shared", "loss", "shared", "error"))
    totals = []
    for task in tasks:
        rows = run.rows(task)
        items = pairs(rows, "test")[:num_test]
        asked = lw.Task(items, instruction=rows[0]["definition"])
        for name in (task, f"{task}.1"):
            figures = []
            for adapter in (given[name], made.adapter(name)):
                with lw.Composer(model, {"x": adapter}).activate({"x": 1.0}):
                    right = evaluate(model, tokenizer, asked, items).value
                    each = losses(model, tokenizer, asked, items)
                figures.append((right, sum(each) / len(each)))
            (right, loss), (other, more) = figures
            totals.append((right, other, loss, more))
            table.add(name, f"{right:.0%}", f"{other:.0%}", f"{loss:.3f}", f"{more:.3f}", f"{made.errors[name]:.3f}")
    means = [sum(column) / len(totals) for column in zip(*totals, strict=True)]
    table.add("mean", *(f"{value:.1%}" for value in means[:2]), *(f"{value:.3f}" for value in means[2:]), "")
    return table


def _times(run: Run, model: Any, given: Mapping[str, lw.Adapter], made: JointPool) -> None:
    """New tokens over a cache, for 1 row, 8 of one cluster's adapters, and 8 of as many clusters."""
    by_cluster: dict[int, list[str]] = {}
    for name, member in made.members.items():
        by_cluster.setdefault(member.cluster, []).append(name)
    near = max(by_cluster.values(), key=len)[:8]
    far = [names[0] for names in by_cluster.values()][:8]
    for title, names in {"1 row": near[:1], "8 rows, one cluster": near, f"8 rows, {len(far)} clusters": far}.items():
        rows: list[Any] = [{name: 1.0} for name in names]
        ids = torch.randint(0, 1000, (len(rows), 32), generator=torch.Generator().manual_seed(1))
        engine = lw.Composer(model, {name: given[name] for name in names})
        with torch.no_grad():
            state: dict[str, Any] = {}
            read, step = partial(_read, model, ids, state), partial(_tokens, model, ids, state)
            ways = {"base": Way(step, read)}
            for name, block in {"plain, live": engine.activate, "shared, live": partial(made.activate, model)}.items():
                ways[name] = Way(partial(_under, block, rows, step), read)
            compare(run, f"{NUM_TOKENS} tokens, {title}", ways, {"time": ("base", False)})


# each over a cache of 32 and those before it
NUM_TOKENS = 16


def _read(model: Any, ids: torch.Tensor, state: dict[str, Any]) -> None:
    state["cache"] = model(input_ids=ids, use_cache=True).past_key_values


def _tokens(model: Any, ids: torch.Tensor, state: dict[str, Any]) -> None:
    for _ in range(NUM_TOKENS):
        model(input_ids=ids[:, :1], past_key_values=state["cache"], use_cache=True)


def _under(block: Any, rows: Any, step: Any) -> None:
    with block(rows):
        step()
