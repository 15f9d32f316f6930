"""Many adapters in shared bases: bytes, errors, points lost on their own tasks, and the time of a token.

    python -m benchmarks joint
    python -m benchmarks --cpu --seconds 600 joint --parts decode

The adapters are the example pool's and copies with noise on every factor, of the given size beside the update; a thousand
trained ones are more than this machine can make. Those of --more join afterwards, in the bases that are there. Peers are
vlora-dev and lorashare at as many values as ours keep, on fewer adapters. Without a peer's package its row is missing.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import loraweave as lw
from benchmarks._run import Run, Table, pairs
from benchmarks._timing import Way, compare
from loraweave.composer.joint import JointPool
from loraweave.composer.model.scoring import evaluate, losses

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    parts: Annotated[str, typer.Option(help="of errors, peers, scores, decode")] = "errors,peers,scores,decode",
    count: Annotated[int, typer.Option(help="adapters in all")] = 1000,
    noise: Annotated[float, typer.Option(help="of a copy, beside the size of the update")] = 0.2,
    more: Annotated[str, typer.Option(help="a folder of adapter folders that join later")] = "",
    settings: Annotated[str, typer.Option(help="rank x clusters and middle, several with commas")] = "8x33 full",
    every: Annotated[int, typer.Option(help="errors are those of one layer in so many")] = 6,
    tasks: Annotated[str, typer.Option(help="scored on their own tasks")] = "passive,plural,antonym,pick_animal_5",
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 20,
    peers: Annotated[int, typer.Option(help="adapters of the comparison with other packages")] = 165,
) -> None:
    """A row for each setting, one for each peer, the scores, and a table of times."""
    run: Run = context.obj
    real = [lw.Adapter.from_pretrained(path) for path in run.adapters()]
    asked, first = parts.split(","), settings.split(",")[0]
    thin = [_thinned(adapter, every) for adapter in real]
    if "errors" in asked:
        table = Table(
            f"{count} adapters of {len(real)} tasks, copies with noise of {noise:g}, one layer in {every}", COLUMNS
        )
        given = {adapter.name: adapter for adapter in copies(thin, count, noise, run.seed)}
        for setting in settings.split(","):
            made = _fitted(given, setting)
            _row(table, f"ours, {setting}", made.report.share, made.errors)
            if more:
                again = [lw.Adapter.from_pretrained(path) for path in sorted(Path(more).iterdir()) if path.is_dir()]
                joining = {one.name: replace(_thinned(one, every), name=f"{one.name}, again") for one in again}
                grown = {name: made.including(one).errors[one.name] for name, one in joining.items()}
                _row(table, f"{len(again)} trained again, joined", made.report.share, grown)
        run.show(table)
    if "peers" in asked:
        beside = Table(f"{peers} adapters, beside other packages at as many values, one layer in {every}", COLUMNS)
        fewer = {adapter.name: adapter for adapter in copies(thin, peers, noise, run.seed)}
        own = _fitted(fewer, first)
        _row(beside, f"ours, {first}", own.report.share, own.errors)
        for name, peer in PEERS.items():
            if importlib.util.find_spec(name):
                share, errors = peer(fewer, own.report.share)
                _row(beside, name, share, errors)
        run.show(beside)
    if not {"scores", "decode"} & set(asked):
        return
    # k-means finds the tasks, so that those which are scored share bases with their own copies alone
    chosen = [adapter for adapter in real if adapter.name in tasks.split(",")]
    scored = {adapter.name: adapter for adapter in copies(chosen, len(chosen) * (count // len(real)), noise, run.seed)}
    made = _fitted(scored, f"{first.split('x')[0]}x{len(chosen)} full")
    model, tokenizer = lw.load_base(dtype=torch.float32)
    if "scores" in asked:
        run.show(_scores(run, model, tokenizer, scored, made, tasks.split(","), num_test))
    if "decode" in asked:
        _times(run, model, scored, made)


def _thinned(adapter: lw.Adapter, every: int) -> lw.Adapter:
    return replace(adapter, layers=dict(list(adapter.layers.items())[::every]))


COLUMNS = ("way", "values kept", "error: mean", "median", "largest")


def copies(real: list[lw.Adapter], count: int, noise: float, seed: int) -> list[lw.Adapter]:
    """`count` adapters: the real ones, then copies of them in turn, called NAME.1 and so on."""
    generator = torch.Generator().manual_seed(seed)
    found = real[:count]
    for number in range(len(found), count):
        one = real[number % len(real)]
        layers = {name: _noisy(part, noise, generator) for name, part in one.layers.items()}
        found.append(replace(one, name=f"{one.name}.{number // len(real)}", layers=layers))
    return found


def _noisy(part: lw.Factors, noise: float, generator: torch.Generator) -> lw.Factors:
    """Half of the noise's square in each factor, so that b a changes by about `noise` of its norm."""
    a_RI, b_OR = (
        own + torch.randn(own.shape, generator=generator) * (noise / math.sqrt(2 * own.numel()) * own.norm())
        for own in (part.a_RI, part.b_OR)
    )
    return lw.Factors(a_RI, b_OR)


def _fitted(given: Mapping[str, lw.Adapter], setting: str) -> JointPool:
    sizes, middle = setting.split(" ")
    rank, clusters = map(int, sizes.split("x"))
    return JointPool.fit(given, rank=rank, clusters=clusters, middle=middle)  # type: ignore[arg-type]


def _row(table: Table, name: str, share: float, errors: Mapping[str, float]) -> None:
    ordered = sorted(errors.values())
    figures = (sum(ordered) / len(ordered), ordered[len(ordered) // 2], ordered[-1])
    table.add(name, f"{share:.1%}", *(f"{value:.3f}" for value in figures))


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
