"""How much of an adapter's gain arrives in another base, and how much was predicted: five copies of the default one.

    python -m benchmarks --out runs/transfer transfer
    python -m benchmarks --out runs/transfer transfer --bases rounded,random

Each adapter is scored on test items of its own task: kept is the gain in exact matches over the new base alone, as a share
of the gain in the old one. Predicted are the share of the effect, from prompts of other tasks, and the share of answers that
stay, from prompts of the own task; neither has seen an answer of the data. Finished bases are kept in --out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

import loraweave as lw
from benchmarks._data import kept
from benchmarks._run import Run, Table, pairs
from loraweave.composer import transfer
from loraweave.composer.model.scoring import evaluate
from loraweave.lowrank import algebra

WAYS: tuple[transfer.Way, ...] = ("same", "subspace", "activations", "restore")
# what a copy is trained on, what is fused into one, and which block one lacks
LEARNED, FUSED, DROPPED = ("synonym", "negation", "number_words", "translate_en_fr"), "past_tense", 20
# below this share of the gain, a transfer has failed
FAILED = 0.5
# prompts of its own task that an adapter answers in both bases
NUM_ASKED = 10

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    adapters: Annotated[str, typer.Option(help="of the example pool")] = "passive,plural,pick_animal_5,antonym",
    bases: Annotated[str, typer.Option(help="rows")] = "rounded,trained,fused,dropped,random",
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 40,
    num_samples: Annotated[int, typer.Option(help="prompts that the activations are recorded on")] = 120,
) -> None:
    """A row for each base and way: of each adapter the share that was kept and the one that was predicted."""
    run: Run = context.obj
    old, tokenizer = lw.load_base(dtype=torch.float32)
    given = [lw.Adapter.from_pretrained(run.pool / name) for name in adapters.split(",")]
    items = {adapter.name: _task(run, adapter.name, num_test) for adapter in given}

    def scores(model: Any, carried: Mapping[str, lw.Adapter]) -> dict[str, float]:
        """The share of right answers of each task, by its adapter, or by the model alone where there is none."""
        engine = lw.Composer(model, carried) if carried else None
        found = {}
        for name, task in items.items():
            if engine is None:
                found[name] = evaluate(model, tokenizer, task, task.examples).value
            else:
                with engine.activate({name: 1.0}):
                    found[name] = evaluate(model, tokenizer, task, task.examples).value
        return found

    folder = run.folder()
    before = kept(folder / "old.json", lambda: [scores(old, {}), scores(old, {adapter.name: adapter for adapter in given})])
    gains = {name: before[1][name] - before[0][name] for name in items}
    samples = _samples(run, num_samples, set(items))
    prompts = {name: _prompts(run, name)[:NUM_ASKED] for name in items}
    said = kept(folder / "answers.json", lambda: {each.name: _answers(old, each, tokenizer, prompts) for each in given})
    table = Table(
        f"kept, predicted by effect, predicted by {NUM_ASKED} answers: shares of the gain, {num_test} items of each task, "
        f"{num_samples} prompts; in the old base "
        + ", ".join(f"{name} {before[0][name]:.0%} to {before[1][name]:.0%}" for name in items),
        ("new base", "way", *items, "mean"),
    )
    cells: list[tuple[float, ...]] = []
    for base in bases.split(","):

        def measured(base: str = base) -> dict[str, Any]:
            new = BASES[base](run, old, tokenizer)
            new.name_or_path = base
            alone, found = scores(new, {}), {}
            for way, (carried, predicted) in _carried(given, old, new, tokenizer, samples).items():
                stay = {name: _share(said[name], _answers(new, each, tokenizer, prompts)) for name, each in carried.items()}
                found[way] = {"scores": scores(new, carried), "predicted": predicted, "answers": stay}
            return {"alone": alone, "ways": found}

        known = kept(folder / f"{base}.json", measured)
        for way, found in known["ways"].items():
            shares = [(found["scores"][name] - known["alone"][name]) / gains[name] for name in items]
            of_each = list(
                zip(shares, *([found[by][name] for name in items] for by in ("predicted", "answers")), strict=True)
            )
            cells += of_each
            shown = [*of_each, np.mean(of_each, axis=0)]
            table.add(base, way, *(", ".join(f"{value:.2f}" for value in values) for values in shown))
    aucs = " and ".join(_auc([(cell[0], cell[by]) for cell in cells]) for by in (1, 2))
    table.title += f"; AUC of the two predictions for transfers that keep below {FAILED:g}: {aucs}"
    run.show(table)


def _task(run: Run, name: str, num_test: int) -> lw.Task:
    rows = run.rows(name)
    return lw.Task(pairs(rows, "test")[:num_test], instruction=rows[0]["definition"])


def _prompts(run: Run, name: str) -> list[str]:
    """The prompts of a task's training inputs."""
    rows = run.rows(name)
    task = rows[0]["definition"]
    return [str(lw.Task([asked], instruction=task).prompt(asked[0])) for asked in pairs(rows, "train")]


def _answers(model: Any, adapter: lw.Adapter, tokenizer: Any, prompts: Mapping[str, list[str]]) -> list[str]:
    return transfer.answers(model, adapter, tokenizer, prompts[adapter.name])


def _share(before: list[str], after: list[str]) -> float:
    return sum(one == other for one, other in zip(before, after, strict=True)) / len(before)


def _samples(run: Run, count: int, without: set[str]) -> list[str]:
    """Prompts of the pool's other tasks in turn."""
    tasks = [name for name in run.entries("pool") if name not in without]
    return [_prompts(run, tasks[number % len(tasks)])[number // len(tasks)] for number in range(count)]


def _carried(
    adapters: list[lw.Adapter], old: Any, new: Any, tokenizer: Any, samples: list[str]
) -> dict[str, tuple[dict[str, lw.Adapter], dict[str, float]]]:
    """By way, the adapters in the new base and their predictions, whatever they are; one recording serves all of them."""
    matches = transfer.matched(adapters[0], old, new, "activations")
    ways = WAYS[1:3]
    if len(matches) == len(adapters[0].layers):
        # where other layers differ too, "restore" would have an update in each of them
        alone = len(transfer.matched(adapters[0], old, new, "restore")) == len(matches)
        ways = WAYS if alone else WAYS[:3]
    layers: dict[str, list[dict[str, lw.Factors]]] = {way: [{} for _ in adapters] for way in ways}
    shares: dict[str, list[list[float]]] = {way: [[] for _ in adapters] for way in ways}
    seen = transfer.see(old, new, tokenizer, samples, matches, max_tokens=256, progress=True)
    for pair in matches:
        factors = [adapter.layers[pair.old.name] for adapter in adapters]
        for way in ways:
            if way == "restore":
                for number, part in enumerate(factors):
                    layers[way][number][pair.new.name] = carried = transfer.carry(part, pair, seen[pair.old.name], way)
                    shares[way][number].append(transfer.kept_share(part, carried, pair, seen[pair.old.name], way))
                continue
            # the others are linear in b and in a, so that all adapters are carried at once
            stacked = transfer.carry(algebra.add(factors), pair, seen[pair.old.name], way)
            ranks = [part.rank for part in factors]
            parts = zip(stacked.a_RI.split(ranks), stacked.b_OR.split(ranks, dim=1), strict=True)
            for number, (a_RI, b_OR) in enumerate(parts):
                carried = lw.Factors(a_RI, b_OR)
                layers[way][number][pair.new.name] = carried
                kept = transfer.kept_share(factors[number], carried, pair, seen[pair.old.name], way)
                shares[way][number].append(kept)
    key = lw.base_key(new)
    found: dict[str, tuple[dict[str, lw.Adapter], dict[str, float]]] = {}
    for way in ways:
        made = zip(adapters, layers[way], shares[way], strict=True)
        results = [
            (replace(adapter, base_model=key.id, fingerprint=key.fingerprint, layers=own), sum(each) / len(adapter.layers))
            for adapter, own, each in made
        ]
        found[way] = ({one.name: one for one, _ in results}, {one.name: share for one, share in results})
    return found


def _auc(cells: list[tuple[float, float]]) -> str:
    """Of all pairs of a failed and another transfer, the share in which the failed one was predicted to keep less."""
    failed = [guess for share, guess in cells if share < FAILED]
    others = [guess for share, guess in cells if share >= FAILED]
    won = [float(bad < good) + 0.5 * float(bad == good) for bad in failed for good in others]
    return f"{np.mean(won):.2f} ({len(failed)} of {len(cells)})" if won else "none"


@torch.no_grad()
def _rounded(run: Run, old: Any, tokenizer: Any) -> Any:
    """Every linear weight to 15 levels of the largest of 32 neighbours."""
    new = copy.deepcopy(old)
    for name, module in new.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            groups = module.weight.reshape(-1, 32)
            scale = groups.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 7
            module.weight.copy_(((groups / scale).round() * scale).view_as(module.weight))
    return new


def _trained(run: Run, old: Any, tokenizer: Any) -> Any:
    """All weights trained for 20 steps of 8 rows of four other tasks."""
    new = copy.deepcopy(old).requires_grad_(True)
    rows = [pairs(run.rows(name), "train") for name in LEARNED]
    optimizer = torch.optim.AdamW(new.parameters(), lr=5e-5)
    for step in range(20):
        texts = [f"Input: {text}\nOutput: {target}" for task in rows for text, target in task[2 * step : 2 * step + 2]]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        new(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return new.requires_grad_(False)


@torch.no_grad()
def _fused(run: Run, old: Any, tokenizer: Any) -> Any:
    new = copy.deepcopy(old)
    other = lw.Adapter.from_pretrained(run.pool / FUSED)
    for layer in other.layers:
        new.get_submodule(layer).weight += other.delta(layer)
    return new


def _dropped(run: Run, old: Any, tokenizer: Any) -> Any:
    new = copy.deepcopy(old)
    del new.model.layers[DROPPED]
    new.config.num_hidden_layers -= 1
    for number, layer in enumerate(new.model.layers):
        layer.self_attn.layer_idx = number
    return new


def _random(run: Run, old: Any, tokenizer: Any) -> Any:
    torch.manual_seed(run.seed)
    return type(old)(copy.deepcopy(old.config)).eval()


BASES: dict[str, Callable[[Run, Any, Any], Any]] = {
    "rounded": _rounded,
    "trained": _trained,
    "fused": _fused,
    "dropped": _dropped,
    "random": _random,
}
