"""Composes stored adapters for a task that none of them was trained for: retrieve, search, and guard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

from loraweave.common.rows import GivenRows
from loraweave.composer.a_model import require_model
from loraweave.composer.composer import Composer
from loraweave.composer.composing.candidates import candidates, experts_of
from loraweave.composer.composing.guard import guard
from loraweave.composer.composing.measurement import Measurement, Trial
from loraweave.composer.composing.parts import folds as make_folds
from loraweave.composer.composing.settings import Settings
from loraweave.composer.composing.ways import Ways
from loraweave.composer.composition import Composition
from loraweave.composer.evaluation.user_loss import Examples
from loraweave.composer.fitting import Fitting
from loraweave.composer.report import Report
from loraweave.errors import BaseModelMismatch, CompositionError, EmptyIndex
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.hub.progress import progress_bar
from loraweave.types import Router, Task


def compose(
    model: Any,
    tokenizer: Any,
    hub_or_pool: Hub | ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    task: Task,
    *,
    method: str | Router = "auto",
    k: int = 20,
    budget: int | None = 40,
    seconds: float | None = None,
    seed: int = 0,
    space: str | None = None,
    folds: int | None = None,
    weights: Mapping[str, float] | None = None,
    objective: str | Callable[[Any, Examples], float] | None = None,
    inputs: GivenRows | None = None,
    l1: float | None = None,
    l2: float = 0.0,
    sparsity: float = 0.0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    allow_licenses: bool = False,
    **search_options: Any,
) -> Composition:
    """Finds the `k` adapters of a hub that fit the task's examples best, weighs them, and returns the composition.

    A pool, or a list of adapters, is used whole. `method` "auto" races several searches under one `budget` of evaluations
    (candidates scored on all examples) or `seconds`, and takes whatever does best on held-out examples (docs/search.md). A
    name of `names("routers")` is that search alone, "best_single" the adapter of the lowest loss, "manual" the `weights`
    given, "base" none. A router by its name, with its options, weighs every token by itself; one that learns is trained on
    the examples for `steps` steps, by default a third of the budget, at the rate `lr`. One that was made, and maybe fitted,
    is taken as it is.
    `space`: "deltas" mixes the adapters' updates; "factors" mixes A and B apart, as LoraHub's authors do. `objective`
    is a name of `names("objectives")`, or any function of (model, examples); "entropy" looks at `inputs` without targets, by
    default those of the examples. To it come `l1` * mean|w|, `l2` * mean(w^2) and `sparsity` * the number of
    adapters used. Objective, space and `l1` are the search's own by default.

    The guard: a searched composition is compared with the base and with the best single adapter on held-out examples
    (cross-validation over at most `folds` folds, 3 by default; each fold's search has the same budget and never sees the
    fold) and gives way to the better of these two when it is worse there. `folds=0` turns cross-validation and the guard
    off. The budget of "auto" pays for its folds, 2 by default, and for all that races.

    With `checkpoint`, a folder, an interrupted search goes on where it stopped, to the same result. `search_options` go to
    the search. docs/identity.md says which adapters of a hub are for this model. Adapters whose licenses are known to
    exclude each other, or derived works, are made into one only with `allow_licenses`.
    Raises UnknownName, InvalidTask, InvalidLicense and WeightingError before anything is run, BaseModelMismatch for a hub
    without an adapter for this model and EmptyIndex for one without any (but for method="base"), SearchFailed when nothing
    can be scored.
    """
    settings = Settings.of(
        method=method,
        k=k,
        budget=budget,
        seconds=seconds,
        seed=seed,
        folds=folds,
        space=space,
        weights=weights,
        objective=objective,
        inputs=inputs,
        l1=l1,
        l2=l2,
        sparsity=sparsity,
        checkpoint=checkpoint,
        allow_licenses=allow_licenses,
        options=search_options,
    )
    experts = experts_of(hub_or_pool)
    settings.check(task, from_hub=isinstance(experts, Hub))
    require_model(model)
    if not callable(tokenizer):
        raise CompositionError(f"the examples need the model's tokenizer, and {type(tokenizer).__name__} is none")
    started = time.perf_counter()
    try:
        pool, scores = candidates(experts, task, settings.inputs or (), k, model)
    except (EmptyIndex, BaseModelMismatch) as nothing:
        if method != "base":
            raise
        reason = f"the base model was asked for, and {nothing}"
        return Composition(model, tokenizer, task, None, {}, "linear", Report((), "base", reason, (), 0.0, 0), seed)
    settings.require_licenses(pool)
    engine = Composer(model, Fitting(model).accepted(pool), tokenizer=tokenizer)
    parts = make_folds(len(task.examples), settings.folds, seed) if settings.learns and task.examples else []
    with progress_bar(progress) as bar:
        # unknown until the searches are made, and after that too where only time bounds them
        shown = bar.add_task("measuring adapters", total=None)
        ways = Ways(engine, tokenizer, task, settings, scores, len(parts), lambda made: bar.update(shown, advance=made))
        if ways.planned != 0:
            total = None if ways.planned is None else len(pool) + ways.planned
            bar.update(shown, description="searching weights", total=total)
        trials = _trials(Measurement(tokenizer, task, parts, ways.loss), ways, settings)
        bar.update(shown, total=bar.tasks[shown].completed)
    engine.close()
    by_name = {trial.name: trial for trial in trials}
    losses = {name: trial.held_out_loss for name, trial in by_name.items()}
    chosen, reason = guard(settings.name, losses, guarded=bool(parts))
    reason = "; ".join([reason, *ways.left])
    taken = by_name[chosen]
    rows = tuple(trial.row() for trial in trials)
    spent = time.perf_counter() - started, sum(row.evaluations for row in rows)
    report = Report(rows, chosen, reason, tuple(scores.items()), *spent)
    return _composition(model, tokenizer, task, taken, report, settings)


ARGUMENTS = signature(compose)


def check_arguments(experts: Hub | ExpertPool, task: Task, **arguments: Any) -> None:
    """Raises what compose() raises of these arguments before it looks at the model."""
    given = ARGUMENTS.bind(None, None, experts, task, **arguments)
    given.apply_defaults()
    known = {field.name for field in fields(Settings)}
    named = {name: value for name, value in given.arguments.items() if name in known}
    settings = Settings.of(**named, options=given.arguments["search_options"])
    settings.check(task, from_hub=isinstance(experts, Hub))
    if isinstance(experts, ExpertPool):
        settings.require_licenses(experts)


def _trials(measure: Measurement, ways: Ways, settings: Settings) -> list[Trial]:
    """What base, best single and the uniform mixture come to, and what was asked for."""
    trials = [measure.trial(way) for way in ways.plain()]
    if settings.method == "auto":
        return ways.race(measure, trials)
    known = [trial.name for trial in trials]
    return trials if settings.name in known and not settings.routes else [*trials, measure.trial(ways.asked())]


def _composition(model: Any, tokenizer: Any, task: Task, taken: Trial, report: Report, settings: Settings) -> Composition:
    choice, row = taken.choice, report[taken.name]
    assert choice is not None
    origin = choice if choice.origin is None else choice.origin
    return Composition(
        model,
        tokenizer,
        task,
        origin.engine.pool,
        row.weights,
        origin.merge_method,
        report,
        settings.seed,
        choice.adapter,
        by_layer=row.by_layer,
        tuned_steps=choice.tuned_steps,
        router=choice.router,
        allow_licenses=settings.allow_licenses,
    )
