"""Answers in time under a Poisson load: the scheduler by ranks, by the number of rows, and with no time to keep.

    python -m benchmarks goodput [--requests 60] [--loads 0.5,0.8]

Answers of 16 tokens under one of twelve adapters, eight of rank 8 and four of rank 128 on all layers, arrive at random at
the rate that is a share of what full batches without adapters would do. One is good if its first token comes within 20
limits of its arrival, and the others within a limit each on average; the limit is twice a step of eight rows without
adapters. Three schedulers get the same requests: one takes eight rows; two take no row with which a step is predicted to
take longer than 0.8 limits, predicted by the number of rows alone, or by the ranks of their adapters too. Seconds are the
processor's, and pauses in which nothing waits pass at once, so that other work on the machine does not count.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks._models import base_model, random_adapter
from benchmarks._run import Run, Table, console
from loraweave.extensions.operations import Budgets, StepTimes
from loraweave.hub.adapter import Adapter
from loraweave.serving.batch import Row, Sampling
from loraweave.serving.limits import Limits
from loraweave.serving.names import Served
from loraweave.serving.scheduler import Metrics, Scheduler

app = typer.Typer()

ROWS, PROMPT, NUM_TOKENS = 8, 16, 16
RANKS = (8,) * 8 + (128,) * 4
LIMIT, OBJECTIVE, FIRST = 2.0, 0.8, 20


class ByRows(StepTimes):
    """Predicts as if adapters cost nothing."""

    def _updates(self, rows: Sequence[Row]) -> float:
        return 0.0


WAYS: dict[str, type[StepTimes] | None] = {"eight rows": None, "by rows": ByRows, "by ranks": StepTimes}


class Clock:
    """Processor seconds of this thread, and pauses that are passed over."""

    def __init__(self) -> None:
        self.passed = 0.0

    def __call__(self) -> float:
        return time.thread_time() + self.passed


@app.command()
def main(
    context: typer.Context,
    requests: Annotated[int, typer.Option(help="for each load")] = 60,
    loads: Annotated[str, typer.Option(help="shares of what full batches of the base would do")] = "0.5,0.8",
) -> None:
    """Goodput of the scheduler with and without a look at ranks."""
    run: Run = context.obj
    model, tokenizer = base_model()
    model.generation_config.eos_token_id = model.config.vocab_size - 1
    adapters = [random_adapter(model, f"rank{rank}-{n}", "all", run.seed, rank=rank) for n, rank in enumerate(RANKS)]
    base, _ = served(model, tokenizer, "eight rows", float("inf"), [(0.0, None)] * ROWS, run.seed)
    step = float(np.median(np.diff(base[0])))
    rate = ROWS / float(max(map(max, base)))
    title = f"{requests} answers, limit {LIMIT * step:.3f} s a token, {LIMIT:g} steps of {ROWS} rows of the base"
    figures = ("seconds to the first token, median", "95 %", "a later token, median", "95 %")
    table = Table(title, ("load", "scheduler", "good, %", "good answers a second", *figures))
    for load in map(float, loads.split(",")):
        generator = random.Random(run.seed)
        arrivals, at = [], 0.0
        for _ in range(requests):
            at += generator.expovariate(load * rate)
            arrivals.append((at, generator.choice(adapters)))
        for way in WAYS:
            times, seconds = served(model, tokenizer, way, OBJECTIVE * LIMIT * step, arrivals, run.seed)
            firsts = np.array([told[0] - arrived for told, (arrived, _) in zip(times, arrivals, strict=True)])
            tokens = np.array([(told[-1] - told[0]) / (len(told) - 1) for told in times])
            good = int(((firsts <= FIRST * LIMIT * step) & (tokens <= LIMIT * step)).sum())
            of_tokens = [f"{np.percentile(every, each):.3f}" for every in (firsts, tokens) for each in (50, 95)]
            table.add(f"{load:g}", way, f"{100 * good / requests:.0f}", f"{good / seconds:.2f}", *of_tokens)
            console.print(table.rows[-1])
    run.show(table)


def served(
    model: Any, tokenizer: Any, way: str, objective: float, arrivals: Sequence[tuple[float, Adapter | None]], seed: int
) -> tuple[list[list[float]], float]:
    """When each answer's tokens came, and when the last did."""
    clock, kind = Clock(), WAYS[way]
    limits = Limits(rows=ROWS, waiting=10**6, prefix_bytes=0, token_seconds=float("inf") if kind is None else objective)
    times = (kind or StepTimes)(model.dtype.itemsize, "cpu", clock)
    scheduler = Scheduler(model, tokenizer, limits, Metrics(), partial(Budgets, step_times=times))
    generator = torch.Generator().manual_seed(seed)
    told: list[list[float]] = [[] for _ in arrivals]
    begun, num_begun = clock(), 0
    while not all(len(each) == NUM_TOKENS for each in told):
        now = clock() - begun
        idle = all(len(each) == NUM_TOKENS for each in told[:num_begun])
        if idle and now < arrivals[num_begun][0]:
            clock.passed += arrivals[num_begun][0] - now
        while num_begun < len(arrivals) and arrivals[num_begun][0] <= clock() - begun:
            prompt = torch.randint(100, 40_000, (PROMPT,), generator=generator).tolist()
            tell = told[num_begun]
            composition = composed(arrivals[num_begun][1])
            scheduler.prepare(composition)
            row = Row(
                [prompt], composition, Sampling(NUM_TOKENS, 0.0), lambda piece, tell=tell: tell.append(clock() - begun)
            )
            # as submit does, for the thread that runs the model
            scheduler._waiting.append(row)
            num_begun += 1
        scheduler.turn()
    return told, clock() - begun


def composed(adapter: Adapter | None) -> Served:
    if adapter is None:
        return Served()
    return Served(adapter.name, adapter.hash, {adapter.hash: 1.0}, {adapter.hash: adapter})
