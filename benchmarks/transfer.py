"""How much of an adapter's gain arrives in another base, and how much was predicted: five copies of the default one.

    python -m benchmarks --out runs/transfer transfer
    python -m benchmarks --out runs/transfer transfer --bases rounded,random

Each adapter is scored on test items of its own task: kept is the gain in exact matches over the new base alone, as a share
of the gain in the old one. A new base may do some of the task by itself; what is kept over the old base alone counts that.
Predicted are the share of the effect, from prompts of other tasks, and of the answers that stay, from prompts of the own
task that teach nothing; neither has seen an answer of the data. Cells are kept in --out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

import loraweave as lw
from benchmarks._data import kept
from benchmarks._run import Run, Table, pairs
from loraweave.composer.model.scoring import evaluate
from loraweave.extensions.transfer import carrying, old_answers
from loraweave.lowrank import algebra

WAYS: tuple[carrying.Way, ...] = ("same", "activations", "restore")
# the adapters of "activations", after steps on what the old base answers
LEARNED = "learned"
# what a copy is trained on, what is fused into one, and which block one lacks
TRAINED, FUSED, DROPPED = ("synonym", "negation", "number_words", "translate_en_fr"), "past_tense", 20
# below this share of the gain, a transfer has failed
FAILED = 0.5
# prompts of its own task that an adapter answers in both bases; every fourth judges, and the steps see the others
NUM_ASKED = 80

Carried = dict[str, tuple[dict[str, lw.Adapter], dict[str, float]]]

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    adapters: Annotated[str, typer.Option(help="of the example pool")] = "passive,plural,pick_animal_5,antonym",
    bases: Annotated[str, typer.Option(help="rows")] = "rounded,trained,fused,dropped,random",
    ways: Annotated[str, typer.Option(help="rows of each base, where they are for it")] = ",".join((*WAYS, LEARNED)),
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 50,
    num_samples: Annotated[int, typer.Option(help="prompts that the activations are recorded on")] = 100,
    steps: Annotated[int, typer.Option(help="of learning the old base's answers")] = 40,
) -> None:
    """A row for each base and way: of each adapter the share that was kept and the one that was predicted."""
    run: Run = context.obj
    old, tokenizer = lw.load_base(dtype=torch.float32)
    given = {name: lw.Adapter.from_pretrained(run.pool / name) for name in adapters.split(",")}
    tasks = {name: _task(run, name, num_test) for name in given}
    folder, samples = run.folder(), _samples(run, num_samples, set(given))
    prompts = {name: old_answers.split(_prompts(run, name)[:NUM_ASKED]) for name in given}
    num_lessons, num_judges = map(len, next(iter(prompts.values())))

    @cache
    def in_old(name: str) -> list[Any]:
        """What the old base answers to the prompts that teach, and to those that judge."""
        asked = partial(old_answers.answers, old, given[name], tokenizer, taught=True, progress=True)
        return [asked(part) for part in prompts[name]]

    def score(model: Any, name: str, adapter: lw.Adapter | None = None) -> float:
        """The share of right answers by an adapter, or by the model alone."""
        with nullcontext() if adapter is None else lw.Composer(model, [adapter]).activate({name: 1.0}):
            return evaluate(model, tokenizer, tasks[name], tasks[name].examples).value

    def measured(new: Any, way: str, name: str, carried: Carried) -> dict[str, float]:
        adapters, predicted = carried["activations" if way == LEARNED else way]
        adapter, (shown, said) = adapters[name], in_old(name)
        if way == LEARNED:
            how = old_answers.Learning(steps, old_answers.LR, run.seed)
            adapter, _ = old_answers.learned(adapter, new, tokenizer, shown, said, how, progress=True)
        stay = old_answers.agreement(tokenizer, said, old_answers.answers(new, adapter, tokenizer, prompts[name][1]))
        return {"score": score(new, name, adapter), "predicted": predicted[name], "answers": stay}

    before = [
        kept(folder / f"old-{name}.json", lambda name=name: [score(old, name), score(old, name, given[name])])
        for name in given
    ]
    table = Table(
        f"kept over the new base alone and over the old base alone, predicted by effect, predicted by {num_judges} answers: "
        f"shares of the gain, {num_test} items of each task, {num_samples} prompts of other tasks, {steps} steps on "
        f"{num_lessons} prompts of its own; in the old base "
        + ", ".join(f"{name} {alone:.0%} to {by:.0%}" for name, (alone, by) in zip(given, before, strict=True)),
        ("new base", "way", *given, "mean"),
    )
    cells: list[tuple[float, ...]] = []
    for base in bases.split(","):
        made = cache(partial(_made, base, run, old, tokenizer))
        carried = cache(
            lambda base=base, made=made: _carried(base, [*given.values()], old, made(), tokenizer, samples, ways.split(","))
        )
        alone = [kept(folder / f"{base}-{name}.json", lambda name=name, made=made: score(made(), name)) for name in given]
        for way in ways.split(","):
            if way in UNFIT.get(base, ()):
                continue
            found = [
                kept(
                    folder / f"{base}-{way}-{name}.json",
                    lambda name=name, way=way, made=made, carried=carried: measured(made(), way, name, carried()),
                )
                for name in given
            ]
            parts = list(zip(found, alone, before, strict=True))
            of_each = [
                (*((each["score"] - least) / (by - was) for least in (now, was)), each["predicted"], each["answers"])
                for each, now, (was, by) in parts
            ]
            cells += of_each
            shown = [*of_each, np.mean(of_each, axis=0)]
            table.add(base, way, *(", ".join(f"{value:.2f}" for value in values) for values in shown))
    aucs = " and ".join(_auc([(cell[0], cell[by]) for cell in cells]) for by in (2, 3))
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


def _samples(run: Run, count: int, without: set[str]) -> list[str]:
    """Prompts of the pool's other tasks in turn."""
    tasks = [name for name in run.entries("pool") if name not in without]
    return [_prompts(run, tasks[number % len(tasks)])[number // len(tasks)] for number in range(count)]


def _carried(
    base: str, adapters: list[lw.Adapter], old: Any, new: Any, tokenizer: Any, samples: list[str], chosen: list[str]
) -> Carried:
    """By way, the adapters in the new base and their predictions, whatever they are; one recording serves all of them."""
    matches = carrying.matched(adapters[0], old, new, "activations")
    wanted = {"activations" if way == LEARNED else way for way in chosen}
    ways = [way for way in WAYS if way in wanted and way not in UNFIT.get(base, ())]
    layers: dict[str, list[dict[str, lw.Factors]]] = {way: [{} for _ in adapters] for way in ways}
    shares: dict[str, list[list[float]]] = {way: [[] for _ in adapters] for way in ways}
    seen = carrying.see(old, new, tokenizer, samples, matches, max_tokens=256, progress=True)
    for pair in matches:
        factors = [adapter.layers[pair.old.name] for adapter in adapters]
        # one judge for all ways and adapters
        ridge = carrying.reading_ridge(seen[pair.old.name])
        for way in ways:
            if way == "restore":
                for number, part in enumerate(factors):
                    layers[way][number][pair.new.name] = carried = carrying.carry(part, pair, seen[pair.old.name], way)
                    shares[way][number].append(carrying.kept_share(part, carried, pair, seen[pair.old.name], way))
                continue
            # the others are linear in b and in a, so that all adapters are carried at once
            stacked = carrying.carry(algebra.add(factors), pair, seen[pair.old.name], way)
            ranks = [part.rank for part in factors]
            parts = zip(stacked.a_RI.split(ranks), stacked.b_OR.split(ranks, dim=1), strict=True)
            for number, (a_RI, b_OR) in enumerate(parts):
                carried = lw.Factors(a_RI, b_OR)
                layers[way][number][pair.new.name] = carried
                kept = carrying.kept_share(factors[number], carried, pair, seen[pair.old.name], way, ridge=ridge)
                shares[way][number].append(kept)
    key = lw.base_key(new)
    found: Carried = {}
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
    rows = [pairs(run.rows(name), "train") for name in TRAINED]
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
# "same" and "restore" need equal layers; where all have changed, "restore" would have an update in each of them
UNFIT = {"dropped": ("same", "restore"), **dict.fromkeys(("rounded", "trained", "random"), ("restore",))}


def _made(base: str, run: Run, old: Any, tokenizer: Any) -> Any:
    new = BASES[base](run, old, tokenizer)
    new.name_or_path = base
    return new
