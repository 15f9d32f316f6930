"""The composition of stored adapters for a task that none of them was trained for: retrieve, search, and guard."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any

import joblib
from rich.progress import Progress

from loraweave.common.checks import says_something
from loraweave.common.display import progress_bar
from loraweave.common.rows import GivenRows
from loraweave.common.spread import crew, spreader
from loraweave.composer.compose.candidates import candidates, experts_of, fitting_hits, in_context_adapter, skills
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.examples import Examples
from loraweave.composer.compose.report import Report
from loraweave.composer.compose.settings import CALIBRATING, Settings, method_names
from loraweave.composer.compose.trials import Bench, reported, splits_of
from loraweave.composer.compose.ways import calibrated, guard, measure, ways_of
from loraweave.composer.composer import Composer
from loraweave.composer.live.fitting import Fitting
from loraweave.errors import BaseModelMismatch, CompositionError, EmptyIndex, InvalidTask
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import require_model
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.routers.weights import Router
from loraweave.types import Task


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
    merge_method: str | None = None,
    folds: int | None = None,
    weights: Mapping[str, float] | None = None,
    objective: str | Callable[[Any, Examples], float] | None = None,
    inputs: GivenRows | None = None,
    l1: float | None = None,
    l2: float = 0.0,
    sparsity: float = 0.0,
    checkpoint: str | Path | None = None,
    n_jobs: int | None = None,
    progress: bool | Progress = True,
    allow_licenses: bool = False,
    **search_options: Any,
) -> Composition:
    """Find the `k` adapters of a hub that fit the task's examples best, weigh them, and return the composition.

    A pool or a list of adapters is used whole. `method` "auto" learns weights for the adapters and a LoRA under prompts that
    show the examples, looks in a hub for a program of adapters, and averages their probabilities (docs/search.md); the
    composition's `members` has them. A single adapter that answers the examples already is returned as it is. For a task
    without examples it takes the adapters of a hub whose descriptions match the instruction. A name of `names("routers")`
    runs that search alone; "best_single" takes the adapter of the lowest loss, "manual" the given `weights`, "base" none,
    "in_context" the base with the examples in every prompt, and "few_shot" a LoRA trained on the examples under such prompts
    (`steps`, `lr`). A router, by name and options, weighs every token; one that learns trains on the examples for `steps`
    steps (by default a third of the budget) at the rate `lr`. A router object stays as it is. `space` "deltas" mixes the
    adapters' updates, "factors" mixes A and B apart, as LoraHub's authors do; `merge_method` says instead that weights are
    those of a merge by a name of `names("methods")`, with its default options. `objective` is a name of
    `names("objectives")` or a function of (model, examples); "entropy" reads `inputs` without targets, by default the
    examples' own, and "auto" calibrates the labels of a task by the first 20 of them, or finds adapters by them. `l1` *
    mean|w|, `l2` * mean(w^2) and `sparsity` * the number of adapters used are added to the objective. Each search has its
    own default objective, space and `l1`.

    The guard: a searched composition must do no worse on held-out examples than the base and the best single adapter, or the
    better of these two is returned. It is cross-validated over at most `folds` folds, 3 by default; each fold's search has
    the same `budget` of evaluations (candidates scored on all examples) or `seconds`, and never sees the fold. `folds=0`,
    the default of "auto", turns the guard off. With folds "auto" returns its candidate of the lowest held-out loss; from 50
    examples on it does so without folds, too, on a fifth of them, and a LoRA of 80 steps competes. Its search takes at most
    10 evaluations; with a budget below 40, or `seconds`, it does nothing else.

    `checkpoint` is a folder from which an interrupted search resumes, to the same result. `search_options` go to the search.
    `n_jobs` workers, or those that `joblib.parallel_config` names, score the candidates of a generation, of all folds
    together, in the same batches and with the same bits as one process (docs/howto/many_machines.md). `progress` may be a
    `rich.progress.Progress`: its `update` is told of every step, and what that raises ends the search. docs/identity.md says
    which adapters of a hub are for this model, and which licenses need `allow_licenses`. Raises UnknownName, InvalidTask,
    InvalidLicense and WeightingError before anything runs, BaseModelMismatch for a hub without an adapter for this model and
    EmptyIndex for an empty one (unless method="base"), SearchFailed when no candidate can be scored, BudgetExceeded where
    memory is short for a training, which names how much of it is free.
    """
    settings = Settings.of(
        method=method,
        k=k,
        budget=budget,
        seconds=seconds,
        seed=seed,
        folds=folds,
        space=space,
        merge_method=merge_method,
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
    settings.check(task, experts)
    require_model(model)
    if not callable(tokenizer):
        raise CompositionError(f"the examples need the model's tokenizer, and {type(tokenizer).__name__} is not one")
    if (scoring := spreader("scoring", n_jobs)) is None:
        return _compose(model, tokenizer, experts, task, settings, None, progress)
    with crew(n_jobs) as workers:
        return _compose(model, tokenizer, experts, task, settings, partial(scoring.ScoringWorkers, workers), progress)


def _compose(
    model: Any,
    tokenizer: Any,
    experts: Hub | ExpertPool,
    task: Task,
    settings: Settings,
    workers: Callable[..., Any] | None,
    progress: bool | Progress,
) -> Composition:
    started = time.perf_counter()
    if settings.method == "auto" and not task.examples:
        assert isinstance(experts, Hub)
        return _instructed(model, tokenizer, experts, task, settings)
    # 1. retrieve: the adapters to choose from
    try:
        pool, scores = candidates(experts, task, settings.inputs or (), settings.k, model)
    except (EmptyIndex, BaseModelMismatch) as nothing:
        if settings.method != "base":
            raise
        reason = f"the base model was asked for, and {nothing}"
        return Composition.of(model, tokenizer, task, reason=reason, seed=settings.seed)
    settings.require_combinable(pool)
    hub = experts if isinstance(experts, Hub) else None
    engine = Composer(model, Fitting(model).accepted(pool), tokenizer=tokenizer)
    # trainings share their steps, and have nothing to spread over workers
    with closing(engine), joblib.parallel_config(backend="sequential"), progress_bar(progress) as bar:
        # the total is unknown until the searches are made, and stays unknown if only time bounds them
        shown = bar.add_task("measuring adapters", total=None)
        bench = Bench(
            engine,
            tokenizer,
            calibrated(task, settings),
            scores,
            settings.checkpoint,
            lambda made: bar.update(shown, advance=made),
            progress,
            in_context_adapter(experts, model) if settings.method in ("auto", "few_shot") else None,
            None if hub is None else Retriever.of(hub),
        )
        if workers is not None:
            bench = replace(bench, workers=workers(engine, tokenizer, hub))
        # 2. trials: the ways to answer the task, none of which has run
        splits = splits_of(task, settings)
        plain, learning = ways_of(bench, settings)
        # 3. score: adapters alone first, in one batch; then each way on the examples, and on those held out from it
        if plain:
            _ = bench.alone
        if costs := [trial.cost for trial in learning if trial.cost != 0]:
            total = None if None in costs else len(pool) + (len(splits) + 1) * sum(cost or 0 for cost in costs)
            bar.update(shown, description="learning from the examples", total=total)
        measured = measure(plain, learning, bench, settings, splits)
        bar.update(shown, total=bar.tasks[shown].completed)
    # 4. choose: what was asked for, unless it does worse on held-out examples
    trials = {trial.name: trial for trial in measured.trials}
    losses = {name: trial.held_out_loss for name, trial in trials.items()}
    chosen, reason = guard(measured.to_return, losses, guarded=bool(splits), best_of_all=settings.method == "auto")
    best, rows = trials[chosen].chosen, tuple(trial.row() for trial in measured.trials)
    assert best is not None
    spent = time.perf_counter() - started, sum(row.evaluations for row in rows)
    report = Report(rows, chosen, "; ".join([reason, *measured.remarks]), tuple(scores.items()), *spent)
    return reported(best.composition, report, seed=settings.seed, allow_licenses=settings.allow_licenses)


SIGNATURE = signature(compose)


@dataclass(frozen=True, eq=False)
class ComposeCall:
    """A call of compose() with its keyword `arguments` checked now, and the model supplied when the object is called.

    Raises the errors that compose() raises for its arguments before it looks at the model.
    """

    experts: Hub | ExpertPool
    task: Task
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._settings.check(self.task, self.experts)
        if isinstance(self.experts, ExpertPool):
            self._settings.require_combinable(self.experts)

    def __call__(self, model: Any, tokenizer: Any, *, n_jobs: int | None = None, progress: bool = True) -> Composition:
        """Run compose() on the model, and return the composition."""
        beside: dict[str, Any] = {"n_jobs": n_jobs, "progress": progress}
        return compose(model, tokenizer, self.experts, self.task, **self.arguments, **beside)

    def engine(self, model: Any, tokenizer: Any) -> Composer:
        """Return a Composer of the adapters to choose from: those of a pool, or the `k` of a hub that fit the task best."""
        pool, _ = candidates(self.experts, self.task, self._settings.inputs or (), self._settings.k, model)
        return Composer(model, Fitting(model).accepted(pool), tokenizer=tokenizer)

    @staticmethod
    def methods() -> list[str]:
        """Return the names that `method` takes, sorted."""
        return method_names()

    @cached_property
    def _settings(self) -> Settings:
        bound = SIGNATURE.bind(None, None, self.experts, self.task, **self.arguments)
        bound.apply_defaults()
        known = {setting.name for setting in fields(Settings)}
        named = {name: value for name, value in bound.arguments.items() if name in known}
        return Settings.of(**named, options=bound.arguments["search_options"])


# how many adapters answer beside the base, and the share of the base if each of them has 1
NEAREST, SHARE = 3, 3.0


def _instructed(model: Any, tokenizer: Any, hub: Hub, task: Task, settings: Settings) -> Composition:
    """Return the composition for a task's instruction, without examples; the settings' unlabelled inputs help to choose it.

    If the descriptions of two adapters together are nearer to the instruction than any single one, these two answer one
    after the other. Otherwise no stored adapter has the skill alone, and the nearest adapters answer beside the base, or
    beside the hub's in-context adapter, which reads instructions better. The limits were chosen on the example pool, each
    task without its own adapter, and on tasks joined from it.

    Raises what `fitting_hits` raises, InvalidTask if no adapter has a description, InvalidLicense for adapters that may not
    be combined.
    """
    started, retriever, task = time.perf_counter(), Retriever.of(hub), calibrated(task, settings)
    texts = [str(text) for text in settings.inputs or ()][:CALIBRATING]
    search = partial(retriever.for_task, texts, description=task.instruction, evidence=False)
    hits = fitting_hits(hub, search, settings.k, model)
    records = [hit.record for hit in hits if says_something(hit.record.description)]
    if not records:
        raise InvalidTask(
            f"the task has no examples, and none of the {len(hits)} adapters found in {hub} has a description to compare "
            "its instruction with: give examples, or the adapters descriptions (hub.update(name, description=...))"
        )
    skilled, reason = skills(retriever.space, records, task, texts)
    reader = None if skilled else in_context_adapter(hub, model)
    # several adapters rank labels better, but spoil a written answer if some of them write something else
    answering = skilled or ([] if reader is not None and task.labels is None else records[:NEAREST])
    parts: dict[str, Composition] = {}
    if answering:
        pool = Fitting(model).accepted(hub.pool([record.name for record in answering]))
        settings.require_combinable(pool)
        for record in answering:
            alone = Composition.of(model, tokenizer, replace(task, instruction=record.description))
            parts[record.name] = replace(alone, pool=pool.subset([record.name]), all_weights={record.name: 1.0})
    if len(skilled) == 1:
        made, chosen = parts[skilled[0].name], skilled[0].name
    elif skilled:
        made, chosen = replace(Composition.of(model, tokenizer, task), steps=parts), " > ".join(parts)
    else:
        made, chosen = Composition.of(model, tokenizer, task, reader), "base" if reader is None else reader.name
        if parts:
            members = {chosen: replace(made, share=SHARE), **parts}
            made, chosen = Composition.of(model, tokenizer, task, members), "average"
    report = Report((), chosen, reason, tuple((hit.name, hit.score) for hit in hits), time.perf_counter() - started, 0)
    return reported(made, report, seed=settings.seed, allow_licenses=settings.allow_licenses)
