"""Ensembles in prediction space beside their members and the uniform mixture of them, on tasks whose answers are labels.

    python -m benchmarks --out runs/ensembles --data DATA ensembles
    python -m benchmarks --out runs/ensembles --report ensembles      (tables of what has been measured so far)

"retrieved": for each unseen task with labels, the three adapters that retrieval puts first for five examples and the
description, in fp32. "seeds": adapters trained on one task from three starts, each with data in an order of its own, like
the pool's (rank 8 on q_proj and v_proj, bf16 base) but for 40 steps. "laplace": for tasks of the pool, their own adapter,
and its posterior from 20 training rows, linearised and as 3 drawn adapters; 40 test items, in fp32. What was measured is
kept in --out, so that an interrupted run goes on.

Every way gives a distribution over the labels (the softmax of their summed log-likelihoods); reported are the share of right
answers, the mean negative log-likelihood of the target label in nats, and the expected calibration error in 10 bins of
equal width (Guo et al., 2017), with 95 % bootstrap intervals over test items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track

import loraweave as lw
from benchmarks._data import kept, known
from benchmarks._run import Run, Table, interval, pairs
from loraweave.composer.model.scoring import pad_prompts
from loraweave.extensions.rewards import laplace
from loraweave.extensions.tour import load_task

NUM_RETRIEVED = 3
NUM_SEEDS = 3
SEED_STEPS = 40
SEED_TASKS = ("question_type", "intent_domain")
ROWS_PER_CALL = 25
NUM_BINS = 10
RESAMPLES = 1000
LAPLACE_TASKS = ("paraphrase", "grammar_choice")
LAPLACE_ROWS, LAPLACE_ITEMS, NUM_DRAWN = 20, 40, 3
OF_LAPLACE = ("base", "adapter", "linearised", "drawn")

# (log_NL, targets_N) -> figure; the number of items -> which of them
Metric = Callable[[np.ndarray, np.ndarray], float]
Draw = Callable[[int], np.ndarray]

app = typer.Typer()


@app.command()
def main(
    context: typer.Context, kind: Annotated[str | None, typer.Option(help="retrieved, seeds or laplace: only it")] = None
) -> None:
    """Right answers, loss and calibration of ensembles, of their members, and of the uniform mixture."""
    run: Run = context.obj
    if not run.report:
        for each in KINDS.values() if kind is None else [KINDS[kind]]:
            each(run)
    for kind in KINDS:
        if found := known(run.folder(), f"{kind}-*.json"):
            run.show(*tables(kind, found))


def retrieved(run: Run) -> None:
    model, tokenizer = lw.load_base()
    with run.hub() as hub:
        retriever = lw.Retriever(hub)
        for name in track(_labelled(run, "unseen"), "retrieved"):

            def measured(name: str = name) -> dict[str, Any]:
                unseen = load_task(run.data, name, 0, 100)
                inputs = [text for text, _ in unseen.task.examples]
                hits = retriever.for_task(inputs, description=unseen.task.instruction, k=NUM_RETRIEVED)
                with closing(lw.Composer(model, hub.pool([hit.name for hit in hits]), tokenizer=tokenizer)) as engine:
                    return measure(engine, unseen.task, [(text, targets[0]) for text, targets in unseen.test], name)

            kept(run.folder() / f"retrieved-{name}.json", measured)


def seeds(run: Run) -> None:
    model, tokenizer = lw.load_base(dtype=torch.bfloat16)
    for name in (name for name in _labelled(run, "pool") if name in SEED_TASKS):

        def measured(name: str = name) -> dict[str, Any]:
            entry = run.entries("pool")[name]
            rows = run.rows(name)
            task = lw.Task(pairs(rows, "train"), instruction=entry["definition"], labels=entry["labels"])
            # a job draws its start and the order of its rows by its name
            jobs = {f"start {number}": task for number in range(NUM_SEEDS)}
            folder = run.folder() / "training"
            options: dict[str, Any] = {"steps": SEED_STEPS, "jobs_per_batch": NUM_SEEDS, "checkpoint": folder}
            adapters = lw.train_adapters(model, tokenizer, jobs, **options)
            with closing(lw.Composer(model, list(adapters.values()), tokenizer=tokenizer)) as engine:
                return measure(engine, task, pairs(rows, "test"), name)

        kept(run.folder() / f"seeds-{name}.json", measured)


def laplaces(run: Run) -> None:
    model, tokenizer = lw.load_base()
    for name in LAPLACE_TASKS:

        def measured(name: str = name) -> dict[str, Any]:
            entry, rows = run.entries("pool")[name], run.rows(name)
            known_rows = pairs(rows, "train")[-LAPLACE_ROWS:]
            task = lw.Task(known_rows, instruction=entry["definition"], labels=entry["labels"])
            test = pairs(rows, "test")[:LAPLACE_ITEMS]
            adapter = lw.Adapter.from_pretrained(run.pool / name)
            with closing(lw.Composer(model, [adapter], tokenizer=tokenizer)) as engine:
                posterior = laplace(engine, adapter.name, task, progress=False)
                sure = posterior.predict([text for text, _ in test], progress=False)
                drawn = [*posterior.draw(NUM_DRAWN), adapter]
            with closing(lw.Composer(model, drawn, tokenizer=tokenizer)) as engine:
                found = measure(engine, task, test, name, shares=[*[1.0] * NUM_DRAWN, 0.0])
            ways = {way: found["ways"][own] for way, own in zip(OF_LAPLACE, ("base", adapter.name), strict=False)}
            ways |= {"linearised": sure.log_probabilities.tolist(), "drawn": found["ways"]["ensemble"]}
            return {**found, "ways": ways, "prior": posterior.prior, "log_evidence": posterior.log_evidence}

        kept(run.folder() / f"laplace-{name}.json", measured)


KINDS: Mapping[str, Callable[[Run], None]] = {"retrieved": retrieved, "seeds": seeds, "laplace": laplaces}


def measure(
    engine: lw.Composer,
    task: lw.Task,
    test: Sequence[tuple[str, str]],
    name: str,
    shares: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Each way's log-probabilities of the labels for every test item; `shares` are the members' in the ensemble."""
    members = [{expert: 1.0} for expert in engine.pool.names]
    uniform = dict.fromkeys(engine.pool.names, 1 / len(members))
    parts, averages = [], []
    for start in range(0, len(test), ROWS_PER_CALL):
        texts = [task.prompt(text) for text, _ in test[start : start + ROWS_PER_CALL]]
        batch = pad_prompts(engine.model, engine.tokenizer, texts)
        # the base and the mixture ride along without a say
        weights = [*(shares or [1.0] * len(members)), 0.0, 0.0]
        found = lw.ensemble(engine, [*members, uniform, None], batch, labels=task.labels, weights=weights)
        parts.append(found.members_MBV)
        averages.append(found.log_probabilities)
    ways = dict(zip([*engine.pool.names, "uniform mixture", "base"], torch.cat(parts, dim=1).tolist(), strict=True))
    ways["ensemble"] = torch.cat(averages).tolist()
    targets = [list(task.labels or ()).index(target) for _, target in test]
    return {"task": name, "members": list(engine.pool.names), "targets": targets, "ways": ways}


def tables(kind: str, found: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    table = Table(f"{kind}: right, loss of the target label in nats, calibration [95 %]", ("task", "way", *METRICS))
    for row in found:
        for way in OF_LAPLACE if kind == "laplace" else ("base", *row["members"], "uniform mixture", "ensemble"):
            table.add(row["task"], way, *_cells([row], way))
    means = Table(f"{kind}: mean over tasks", ("mean over tasks", *METRICS))
    for way in OF_LAPLACE if kind == "laplace" else ("base", "mean of members", "uniform mixture", "ensemble"):
        means.add(way, *_cells(found, way))
    yield from (means, table)


def _cells(found: Sequence[Mapping[str, Any]], way: str) -> Iterator[str]:
    """Each figure of all items, with its interval over resamples of the items."""
    for metric in METRICS.values():
        generator = np.random.default_rng(0)
        drawn = [_mean(found, way, metric, lambda size: generator.integers(0, size, size)) for _ in range(RESAMPLES)]  # noqa: B023
        yield interval(np.array([_mean(found, way, metric, np.arange), *drawn]))


def _mean(found: Sequence[Mapping[str, Any]], way: str, metric: Metric, draw: Draw) -> float:
    """The mean over tasks; "mean of members" is the mean of each one's own figure."""
    values = []
    for row in found:
        targets_N = np.array(row["targets"])
        chosen = draw(len(targets_N))
        names = row["members"] if way == "mean of members" else [way]
        values.append(np.mean([metric(np.array(row["ways"][name])[chosen], targets_N[chosen]) for name in names]))
    return float(np.mean(values))


def right(log_NL: np.ndarray, targets_N: np.ndarray) -> float:
    return float((log_NL.argmax(axis=1) == targets_N).mean())


def loss(log_NL: np.ndarray, targets_N: np.ndarray) -> float:
    return float(-log_NL[np.arange(len(targets_N)), targets_N].mean())


def calibration_error(log_NL: np.ndarray, targets_N: np.ndarray) -> float:
    """The sum over bins of their share of items times |share of right answers - mean confidence|."""
    confidence_N = np.exp(log_NL.max(axis=1))
    right_N = log_NL.argmax(axis=1) == targets_N
    bin_N = np.minimum((confidence_N * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs((right_N[bin_N == b] - confidence_N[bin_N == b]).sum()) for b in range(NUM_BINS)]
    return float(sum(gaps) / len(targets_N))


METRICS: dict[str, Metric] = {"right": right, "NLL": loss, "ECE": calibration_error}


def _labelled(run: Run, group: str) -> list[str]:
    """The tasks with labels."""
    return [name for name, entry in run.entries(group).items() if entry["labels"]]
