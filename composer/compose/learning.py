"""The trials that learn from the examples: searches for weights, trainings, programs, routers, and the average of several.

In a search a solver asks for candidates, and the examples that it sees tell it their losses. Trainings are those of a LoRA,
new or begun as the hub's in-context adapter, under prompts that show the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loraweave.common.options import options_of
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.examples import EncodedExamples
from loraweave.composer.compose.loss import ExampleLoss, Penalty, together, together_with_gradients
from loraweave.composer.compose.objectives._row_sums import Kind
from loraweave.composer.compose.population import Job, row_sums
from loraweave.composer.compose.refine import (
    STEP_COST,
    Tuning,
    example_loss,
    linear_targets,
    num_scalars,
    pool_of,
    targets_of,
    task_of,
    tuned_adapters,
)
from loraweave.composer.compose.settings import BEST, TRAINING, Settings, solver_class
from loraweave.composer.compose.trials import Bench, Scores, Selection, Split, Trial, fixed
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.model.scoring import answer_limit
from loraweave.composer.train.rows import MAX_PACKED
from loraweave.errors import SearchFailed, WeightingError
from loraweave.hub.adapter import Adapter, parent_of
from loraweave.hub.pool import ExpertPool
from loraweave.registry import get
from loraweave.retrieval.retriever import Retriever
from loraweave.routers.searches._solver import Solver, described
from loraweave.routers.searches._told import SearchResult, Told
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Record, with_pairs

if TYPE_CHECKING:
    from loraweave.composer.compose.program_search import Order, Reading, Step

# trainings of a LoRA under demonstrations: of a new one, and of one that begins as the in-context adapter; chosen by
# leave-one-out on the example pool, with ORDERS orders of the demonstrations in the prompts
FEW_SHOT = Tuning(steps=10, lr=5e-4, batch_size=2)
BEGUN = Tuning(steps=6, lr=8e-4, batch_size=1)
# {member of an average: its share}, for shares other than 1; they were also chosen by leave-one-out
SHARES = {"few_shot": 3.0, "program": 3.0}
# how a LoRA is trained on many examples
LONG = Tuning(steps=80, lr=3e-3, batch_size=8)
ORDERS = 3

Start = Mapping[str, float] | MixtureWeights | None


def search_of(bench: Bench, settings: Settings) -> Trial:
    """Return the trial of the search by the settings' method, or of the fixed mixture of a method that is a formula.

    Raises what the solver's settings raise, before the first forward pass.
    """
    start_name = settings.start_name(solver_class(settings.name))
    # a start with a name depends on the examples of a split, and is not known yet
    solver = solver_of(bench, settings, None if start_name else settings.options.get("start"))
    merge_method = settings.meaning or solver.merge_method
    if (groups := solver.space.groups) and merge_method != "linear":
        raise WeightingError(
            f"method {settings.name!r} would weigh {len(groups)} groups of layers separately, but merge method "
            f"{merge_method!r} takes one weight for each adapter: leave out groups=, or pass space='deltas'"
        )
    if not solver.learns:
        (mixture,) = solver.ask()
        return fixed(settings.name, bench, mixture, merge_method)
    # entropy looks at no targets
    learns = (settings.objective or solver.loss) != "entropy"
    search = partial(_search, settings, solver, start_name)
    return Trial(settings.name, bench, search, learns=learns, cost=settings.budget)


def solver_of(bench: Bench, settings: Settings, start: Start) -> Solver:
    """Return a solver with the settings' method and options, which begins at `start`, by default at its own start."""
    supplied: dict[str, Any] = {
        "scores": bench.scores,
        "layers": list(bench.engine.target_layers),
        "weights": settings.weights,
        "start": start,
    }
    if "texts" in options_of(solver_class(settings.name)):
        from loraweave.routers.tokens._text import read_expert_texts

        prompts = [text for text, _ in bench.task.examples] or settings.inputs or ()
        supplied["texts"] = read_expert_texts(settings.name, bench.engine.pool, None, None)
        supplied["asked"] = [str(text) for text in prompts]
    return settings.solver(bench.names, supplied)


def _search(
    settings: Settings, made: Solver, start_name: str | None, trial: Trial, splits: Sequence[Split]
) -> list[Selection]:
    """Run one search for each split, by solvers like `made`, in step; return the best candidate of each as a selection.

    Each search keeps a file of its own in the folder of a checkpoint. An objective of inputs without targets holds nothing
    out: its search sees all inputs, whatever the split.
    """
    bench, objective = trial.bench, _objective(settings, made, trial)
    searches: list[tuple[Solver, ExampleLoss, partial[None] | None]] = []
    for split in splits:
        solver = solver_of(bench, settings, _start(bench, settings, start_name, split))
        view = objective.view(split.seen if trial.learns else range(len(objective.task.examples)))
        keep = None
        if bench.checkpoint is not None:
            log, kept = bench.checkpoint / f"{trial.name}-{split.name}.json", {**solver.settings(), **described(view)}
            solver.replay(Told.read(log, kept))
            keep = partial(solver.keep, log, kept)
        trial.count(solver.spent)
        searches.append((solver, view, keep))
    while running := [(*search, mixtures) for search in searches if (mixtures := search[0].ask())]:
        objectives, candidates = [view for _, view, _, _ in running], [mixtures for *_, mixtures in running]
        if made.needs_gradients:
            told = together_with_gradients(objectives, candidates)
        else:
            told = [(losses, []) for losses in together(objectives, candidates)]
        for (solver, view, keep, mixtures), (losses, gradients) in zip(running, told, strict=True):
            with _explained(view):
                solver.tell(losses, gradients)
            if keep is not None:
                keep()
            trial.count(solver.cost * len(mixtures))
    choices = []
    for solver, view, _ in searches:
        with _explained(view):
            choices.append(bench.mixed(solver.result(), view.merge_method))
    return choices


def _start(bench: Bench, settings: Settings, name: str | None, split: Split) -> Start:
    """Return the weights at which a search on a split starts, by the start's name; None for the solver's default."""
    match name:
        case None:
            start: Start = settings.options.get("start")
            return start
        case "base":
            return {}
        case "uniform":
            return dict.fromkeys(bench.names, 1 / len(bench.names))
        case "retrieval":
            mixture: MixtureWeights = get("routers", "similarity")(bench.names, scores=bench.scores).ask()[0]
            return mixture
    return bench.best(split.seen, BEST[name])


def _objective(settings: Settings, solver: Solver, trial: Trial) -> ExampleLoss:
    """Return the loss that a search minimises, on all examples, or on all inputs for a loss that looks at no targets."""
    bench, kind = trial.bench, settings.objective or solver.loss
    merge_method = settings.meaning or solver.merge_method
    l1 = solver.l1 if settings.l1 is None else settings.l1
    terms: dict[str, Any] = {"l1": l1, "l2": settings.l2, "sparsity": settings.sparsity}
    if kind == "cross_entropy" and merge_method == "linear" and bench.task.examples:
        return bench.loss().penalised(Penalty(**terms))
    inputs = None if trial.learns else settings.inputs
    if not trial.learns and inputs is None:
        inputs = [text for text, _ in bench.task.examples]
    known: dict[str, Any] = {"kind": kind, "merge_method": merge_method, "inputs": inputs, "workers": bench.workers}
    return ExampleLoss(bench.engine, bench.tokenizer, bench.task, **known, **terms)


@contextmanager
def _explained(objective: ExampleLoss) -> Iterator[None]:
    """Add to a SearchFailed that the block raises the reason why the first candidate could not be scored."""
    try:
        yield
    except SearchFailed as error:
        raise SearchFailed(f"{error}. The first failed with {objective.failures.first}") from error


def shown(bench: Bench, adapter: Adapter, split: Split, steps: int = 0) -> Selection:
    """Return the selection of an adapter, trained for `steps` steps; prompts show a split's first examples (`in_turn`).

    No prompt shows the example that it asks for.
    """
    task = with_pairs(bench.task, demonstrations=task_of(bench.task, split.seen).demonstrations)
    loss = example_loss(bench.engine.model, bench.tokenizer, task, ExpertPool({adapter.name: adapter}), turned=True)
    placed = loss.engine.pool[adapter.name]
    return bench.selection(
        partial(loss.scores_on, MixtureWeights.of({adapter.name: 1.0}, [adapter.name])),
        SearchResult(MixtureWeights.of({}, bench.names), num_trained=num_scalars(placed) if steps else 0),
        task=task,
        stored=replace(placed, name="composition"),
        tuned_steps=steps,
        parents=[] if bench.start is None else [parent_of(bench.start)],
    )


def of_start(bench: Bench) -> Trial:
    """Return the trial of the bench's adapter `start`, untrained, under prompts that show a split's seen examples."""

    def choose(trial: Trial, splits: Sequence[Split]) -> list[Selection]:
        assert bench.start is not None
        return [shown(trial.bench, bench.start, split) for split in splits]

    return Trial("in_context_adapter", bench.with_demonstrations(ORDERS), choose, learns=False)


def _trained(name: str, bench: Bench, tuning: Tuning, targets: Callable[[], Sequence[str]]) -> Trial:
    """Return the trial of a LoRA that learns a split's examples; it begins as the bench's `start`, or as a new adapter.

    Under demonstrations each example is learned under the others (arXiv 2110.15943). `targets` returns the endings of the
    paths of the layers that a new adapter gets.
    """
    cost = STEP_COST * tuning.steps

    def choose(trial: Trial, splits: Sequence[Split]) -> list[Selection]:
        trained = tuned_adapters(
            bench.engine.model,
            bench.tokenizer,
            bench.task,
            {split.name: bench.start for split in splits},
            {split.name: split.seen for split in splits},
            tuning,
            target_modules=targets(),
            checkpoint=bench.checkpoint,
            progress=bench.progress,
        )
        trial.count(cost * len(splits))
        return [shown(bench, trained[split.name], split, tuning.steps) for split in splits]

    return Trial(name, bench, choose, cost=cost)


def few_shot(bench: Bench, settings: Settings) -> Trial:
    """Return the trial of a LoRA on all linear layers, trained under demonstrations by the settings' options and seed."""
    tuning = FEW_SHOT if bench.start is None else BEGUN
    options = settings.options if settings.method == "few_shot" else {}
    tuning = replace(tuning, **options, seed=settings.seed)
    return _trained("few_shot", bench.with_demonstrations(ORDERS), tuning, partial(linear_targets, bench.engine.model))


def long_lora(bench: Bench, settings: Settings) -> Trial:
    """Return the trial of a new LoRA on the pool's layers, trained with the settings `LONG` for prompts without examples."""
    folder = None if bench.checkpoint is None else bench.checkpoint / "lora"
    bench = replace(bench, start=None, checkpoint=folder)
    return _trained("lora", bench, replace(LONG, seed=settings.seed), partial(targets_of, bench.engine.pool))


def averaged(parts: Sequence[Trial]) -> Trial:
    """Return the trial that averages the probabilities of other trials' selections by `SHARES`, each under its prompts."""
    bench, shares = parts[0].bench, [SHARES.get(part.name, 1.0) for part in parts]
    mean: Callable[[Sequence[np.ndarray]], np.ndarray] = partial(np.average, axis=0, weights=shares)

    def average(choices: Sequence[Selection]) -> Selection:
        def scores(examples: Sequence[int]) -> Scores:
            losses_N = mean([choice.scores(examples)[0] for choice in choices])
            return losses_N, selection.answers([bench.task.examples[place] for place in examples])

        members = {
            part.name: replace(choice.composition, share=share)
            for part, choice, share in zip(parts, choices, shares, strict=True)
        }
        selection = bench.selection(scores, members=members)
        return selection

    def choose(_: Trial, splits: Sequence[Split]) -> list[Selection]:
        return [average(choices) for choices in zip(*[part.choices_on(splits) for part in parts], strict=True)]

    def finished() -> np.ndarray:
        return mean([part.losses_N for part in parts if part.losses_N is not None])

    return Trial("average", bench, choose, average=finished)


# in a composition a longer program's loss must be lower by this share, since with five examples a needless third step often
# seems to help a little; and three steps are sought from so many programs of two
GAIN, BEAM = 0.2, 1


def program(bench: Bench, retriever: Retriever, settings: Settings) -> Trial:
    """Return the trial of the program that `lw.order` finds on the first MAX_PACKED examples that a split may see.

    Its choices raise InvalidTask without descriptions, InvalidLicense for steps that may not be combined.
    """
    # loaded for tasks that need a program
    from loraweave.composer.compose.program_search import search_programs

    # what the searches have measured of programs that were chosen, by example
    read: dict[Order, dict[int, Reading]] = {}

    def choose(trial: Trial, splits: Sequence[Split]) -> list[Selection]:
        limits: dict[str, Any] = {"k": settings.k, "gain": GAIN, "beam": BEAM, "progress": bench.progress}
        choices = []
        for split in splits:
            examples = split.seen[:MAX_PACKED]
            task = task_of(bench.task, examples)
            searched = search_programs(bench.engine.model, bench.tokenizer, retriever, task, **limits)
            # an evaluation is a candidate scored on all examples
            trial.evaluations += math.ceil(searched.asking.count / len(examples))
            chosen, _ = searched.best()
            read.setdefault(chosen, {}).update(zip(examples, searched.readings[chosen], strict=True))
            pool = None
            # the base alone combines nothing
            if names := [step.name for step in chosen if step.name is not None]:
                settings.require_combinable(pool := retriever.hub.pool(names))
            choices.append(_program_choice(bench, chosen, pool, read[chosen]))
        return choices

    return Trial("program", bench, choose)


def stated_program(bench: Bench, records: Sequence[Record]) -> Trial:
    """Return the trial of a program whose steps are these adapters, in order, each asked by its own description."""
    # loaded for tasks that need a program
    from loraweave.composer.compose.program_search import Step

    limit = answer_limit(bench.tokenizer, bench.task.examples)
    steps = tuple(Step(record.name, record.description, record.hash, limit) for record in records)

    def choose(trial: Trial, splits: Sequence[Split]) -> list[Selection]:
        return [_program_choice(bench, steps, bench.engine.pool, {})] * len(splits)

    return Trial("program", bench, choose, learns=False, evaluations=1)


def _program_choice(bench: Bench, chosen: Order, pool: ExpertPool | None, read: Mapping[int, Reading]) -> Selection:
    """Return the selection of a program, whose steps are adapters of the pool; `read` has the examples' known readings."""

    def scores(examples: Sequence[int]) -> Scores:
        if read.keys() >= set(examples):
            loss_N, hit_N = zip(*map(read.__getitem__, examples), strict=True)
            return np.array(loss_N), np.array(hit_N, dtype=np.float64)
        pairs = [bench.task.examples[place] for place in examples]
        return np.array(selection.composition.losses(pairs)), selection.answers(pairs)

    def part(step: Step) -> Composition:
        task = step.task(bench.task)
        if step.name is None or pool is None:
            return bench.selection(scores, task=task, pool=None).composition
        result = SearchResult(MixtureWeights.of({step.name: 1.0}, [step.name]))
        accepted = Fitting(bench.engine.model).accepted(pool.subset([step.name]))
        return bench.selection(scores, result, task=task, pool=accepted).composition

    selection = bench.selection(scores, pool=None, steps={step.label: part(step) for step in chosen})
    return selection


# the steps of a router's training without a budget, and the rows of one
ROUTER_STEPS, ROUTER_BATCH = 20, 8


def routed(bench: Bench, settings: Settings) -> Trial:
    """Return the trial of a router, which weighs the adapters for every token; a router that learns is fitted on each split.

    Raises an error, before anything runs, for what its options or the pool forbid.
    """
    match settings.method:
        case str():
            router = _new_router(bench, settings)
        case TokenRouter() as made:
            router = made.onto(pool_of(made, bench.engine))
        case router:
            pass
    # steps count as 3 evaluations each
    planned = ROUTER_STEPS if settings.budget is None else max(1, settings.budget // STEP_COST)
    steps = settings.options.get("steps", planned) if settings.learns else 0

    def choose(trial: Trial, splits: Sequence[Split]) -> list[Selection]:
        kind = get("objectives", "cross_entropy")(bench.task)
        # each example in a row of its own: a router may look at the row as a whole
        encoded = EncodedExamples(bench.engine.model, bench.tokenizer, bench.task, kind, trees=False)
        chosen = [_fitted(trial, settings, split, steps) if settings.learns else router for split in splits]
        return [_routed_choice(bench, made, kind, encoded, is_trained=settings.learns) for made in chosen]

    cost = STEP_COST * steps
    return Trial(settings.name, bench, choose, settings.learns, cost, evaluations=0 if settings.learns else 1)


def _routed_choice(bench: Bench, router: Any, kind: Kind, encoded: EncodedExamples, *, is_trained: bool) -> Selection:
    """Return the selection of a router, measured on the encoded examples."""

    def scores(examples: Sequence[int]) -> Scores:
        with bench.engine.activate(router):
            (sums,) = row_sums(
                bench.engine, encoded, [Job(None, tuple(examples), tuple(examples))], kind.needs | kind.hit_needs
            )
        return kind.losses(sums).double().numpy(), kind.hits(sums).numpy()

    count = sum(parameter.numel() for parameter in router.parameters()) if is_trained else 0
    return bench.selection(scores, SearchResult(MixtureWeights.of({}, bench.names), num_trained=count), router=router)


def _new_router(bench: Bench, settings: Settings) -> Any:
    """Return a new router by the name, options and seed of the settings."""
    # every router that can be read is loaded with it
    from loraweave.routers.tokens._saved import router

    known = settings.options.items()
    options = {name: value for name, value in known if name not in TRAINING or not settings.learns}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return router(settings.name, bench.engine.bound_pool, **options)


def _fitted(trial: Trial, settings: Settings, split: Split, steps: int) -> Any:
    """Return a new router, trained on a split's seen examples for `steps` steps."""
    bench, folder = trial.bench, trial.bench.checkpoint
    learned = _new_router(bench, settings)
    learned.fit(
        bench.engine,
        with_pairs(bench.task, examples=tuple([bench.task.examples[place] for place in split.seen])),
        steps=steps,
        lr=settings.options.get("lr"),
        batch_size=min(ROUTER_BATCH, len(split.seen)),
        seed=settings.seed,
        warmup=0,
        checkpoint=None if folder is None else folder / f"{trial.name}-{split.name}",
        progress=False,
    )
    trial.count(STEP_COST * steps)
    return learned.eval()
