"""Composes stored adapters for a task that none of them was trained for: retrieve, search, and guard."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loraweave.composer.composer import Composer
from loraweave.composer.composition import Composition
from loraweave.composer.example_loss import REGULARISATION
from loraweave.composer.measurement import Measurement
from loraweave.composer.report import Report, ReportRow
from loraweave.errors import InvalidTask, UnknownName, WeightingError
from loraweave.hub.base_key import base_key
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.routers.lorahub import Lorahub
from loraweave.types import BaseKey, Task

METHODS = ("auto", "base", "best_single", "lorahub", "manual", "similarity", "uniform")
MAX_FOLDS = 3
# what a search's weights mean, as the name of a merge method
SPACES = {"deltas": "linear", "factors": "factor_sum"}
# similarity weights are a softmax of retrieval scores over this temperature
TEMPERATURE = 0.1


def compose(
    model: Any,
    tokenizer: Any,
    hub_or_pool: Hub | ExpertPool,
    task: Task,
    *,
    method: str = "lorahub",
    k: int = 20,
    budget: int = 40,
    seed: int = 0,
    space: str = "deltas",
    folds: int = MAX_FOLDS,
    weights: Mapping[str, float] | None = None,
    l1: float = REGULARISATION,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **search_options: Any,
) -> Composition:
    """Finds the `k` adapters of a hub that fit the task's examples best, weighs them, and returns the composition.

    A pool is used whole. `method`: "lorahub" searches the weights with `budget` evaluations (candidates scored on all
    examples), "uniform" takes 1/k each, "similarity" a softmax of the retrieval scores, "best_single" the adapter of the
    lowest loss, "manual" the `weights` given, "base" none; "auto" takes whatever does best on held-out examples.
    `space`: "deltas" mixes the adapters' updates; "factors" mixes A and B apart, as LoraHub's authors do.

    The guard: a searched composition is compared with the base and with the best single adapter on held-out examples
    (cross-validation over at most `folds` folds; each fold's search has the same budget and never sees the fold) and gives
    way to the better of these two when it is worse there. `folds=0` turns cross-validation and the guard off.

    With `checkpoint`, a folder, an interrupted search goes on where it stopped, to the same result. `search_options` go to
    the search (`sigma`, `low`, `high`, `population`). A hub without an adapter for this base gives the base model, and
    says so; the base is known by its weights where an adapter has sampled them, else by its id.
    Raises UnknownName, InvalidTask and WeightingError before anything is run.
    """
    _check(method, task, k, budget, space, folds, weights, search_options)
    started = time.perf_counter()
    # a model without a name can only be told by its shapes, which adapters seldom know: then all are tried
    base = base_key(model) if hasattr(model, "name_or_path") else None
    pool, scores = _candidates(hub_or_pool, task, k, base, need_scores=method == "similarity")
    if pool is None:
        reason = f"none of the hub's {len(hub_or_pool)} adapters is for the base model {base.id if base else None!r}"
        report = Report((), "base", reason, (), 0.0, 0)
        return Composition(model, tokenizer, task, None, {}, "linear", report, seed)
    engine = Composer(model, pool, tokenizer=tokenizer)
    # refuses a setting of the search before the first forward pass
    Lorahub(pool.names, budget=budget, seed=seed, **search_options)
    searched = method in ("lorahub", "auto")
    measure = Measurement(engine, tokenizer, task, _folds(len(task.examples), folds, seed) if searched else [])
    with _progress(progress) as bar:
        total = len(pool) + (1 + len(measure.folds)) * budget * searched
        shown = bar.add_task("single adapters", total=total)
        rows = [measure.fixed("base", {}), measure.best_single_row(), measure.fixed("uniform", _uniform(pool))]
        bar.update(shown, advance=len(pool), description="searching weights" if searched else "done")
        if method == "similarity":
            rows.append(measure.fixed("similarity", _softmax(scores)))
        if method == "manual":
            rows.append(measure.fixed("manual", dict(weights or {})))
        if searched:
            rows.append(
                measure.searched(
                    budget=budget,
                    seed=seed,
                    l1=l1,
                    merge_method=SPACES[space],
                    checkpoint=None if checkpoint is None else Path(checkpoint),
                    on_progress=lambda count: bar.update(shown, advance=count),
                    options=search_options,
                )
            )
    engine.close()
    chosen, reason = _guard(method, {row.name: row for row in rows}, guarded=bool(measure.folds))
    seconds, evaluations = time.perf_counter() - started, sum(row.evaluations for row in rows)
    report = Report(tuple(rows), chosen, reason, tuple(scores.items()), seconds, evaluations)
    merge_method = SPACES[space] if chosen == "lorahub" else "linear"
    return Composition(model, tokenizer, task, pool, report[chosen].weights, merge_method, report, seed)


def _candidates(
    hub_or_pool: Hub | ExpertPool, task: Task, k: int, base: BaseKey | None, *, need_scores: bool
) -> tuple[ExpertPool | None, dict[str, float]]:
    """The pool to search in, and each adapter's retrieval score where a hub was asked."""
    if isinstance(hub_or_pool, ExpertPool):
        if need_scores:
            raise WeightingError("method 'similarity' weighs by retrieval scores, so it needs a hub, not a pool")
        return hub_or_pool, {}
    inputs = [text for text, _ in task.examples]
    hits = Retriever(hub_or_pool).for_task(inputs, description=task.instruction, k=k, base_model=base)
    scores = {hit.name: hit.score for hit in hits}
    return (hub_or_pool.pool(list(scores)) if scores else None), scores


def _guard(method: str, rows: Mapping[str, ReportRow], *, guarded: bool) -> tuple[str, str]:
    """The name of the row to return, and why."""
    plain = min(("base", "best_single"), key=lambda name: rows[name].held_out_loss)
    if method == "auto":
        best = min(rows, key=lambda name: (rows[name].held_out_loss, name != plain))
        return best, "lowest loss on held-out examples"
    if method == "lorahub" and guarded and rows[method].held_out_loss > rows[plain].held_out_loss:
        figures = f"{rows[method].held_out_loss:.3f} against {rows[plain].held_out_loss:.3f}"
        return plain, f"the search was worse than {plain} on held-out examples: loss {figures}"
    return method, "as asked" if method != "lorahub" else "not worse than base and best single on held-out examples"


def _folds(num_examples: int, folds: int, seed: int) -> list[list[int]]:
    """Disjoint lists that cover the examples, in a shuffled order that depends on the seed alone."""
    count = min(folds, num_examples)
    order = np.random.default_rng(seed).permutation(num_examples)
    return [sorted(int(index) for index in order[start::count]) for start in range(count)]


def _uniform(pool: ExpertPool) -> dict[str, float]:
    return dict.fromkeys(pool.names, 1 / len(pool))


def _softmax(scores: Mapping[str, float]) -> dict[str, float]:
    highest = max(scores.values())
    powers = {name: math.exp((score - highest) / TEMPERATURE) for name, score in scores.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}


def _check(
    method: str,
    task: Task,
    k: int,
    budget: int,
    space: str,
    folds: int,
    weights: Mapping[str, float] | None,
    search_options: Mapping[str, Any],
) -> None:
    for name, known, what in ((method, METHODS, "method"), (space, tuple(SPACES), "space")):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise UnknownName(f"no {what} {name!r} to compose with{hint}; there are {', '.join(known)}")
    for name in search_options:
        if name not in ("sigma", "low", "high", "population"):
            raise WeightingError(f"method {method!r} has no option {name!r}; it has sigma, low, high and population")
    for name, value, least in (("k", k, 1), ("budget", budget, 1), ("folds", folds, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise WeightingError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    if not task.examples:
        raise InvalidTask("the task has no examples; give at least two (input, target) pairs")
    if method in ("lorahub", "auto") and folds and len(task.examples) < 2:
        raise InvalidTask("one example cannot be both searched on and held out: give two or more, or pass folds=0")
    if folds == 1 and method in ("lorahub", "auto"):
        raise WeightingError("folds is 1, which would hold out every example; pass 2 or more, or 0 for none")
    if (method == "manual") != (weights is not None):
        raise WeightingError("method 'manual' takes weights={name: weight}, and no other method does")


def _progress(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not shown)
