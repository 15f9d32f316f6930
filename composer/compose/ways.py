"""The choice of trials that compose() runs: the plain ones, and the method asked for or, for "auto", what it averages.

"auto" learns twice from the examples: weights for the stored adapters, and a LoRA under prompts that show the examples. Its
answer is the average of both members' probabilities, which leave-one-out on the example pool put above either alone and
above choosing one of them on held-out examples (benchmarks/TABLES.md). A third member is the program of stored adapters that
the examples point to, unless its loss is far above that of prompts alone. Where one stored adapter answers the examples
already, it is taken as it is: what was trained on more than five examples is not learned from them again.

A search is such a trial: a solver asks for candidates, and the examples that it sees tell it their losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loraweave.common.chat import Prompt
from loraweave.common.options import options_of
from loraweave.composer.compose.loss import ExampleLoss, Penalty, together, together_with_gradients
from loraweave.composer.compose.program_search import labels_of
from loraweave.composer.compose.programmed import Programmed
from loraweave.composer.compose.settings import BEST, OTHER_WAYS, Settings, solver_class
from loraweave.composer.compose.trained import (
    BEGUN,
    FEW_SHOT,
    LONG,
    ORDERS,
    Averaged,
    FewShot,
    InContextAdapter,
    Lora,
    Routed,
)
from loraweave.composer.compose.trials import Bench, BestSingle, Fixed, MixtureTrial, Split, Trial
from loraweave.composer.compose.user_loss import UserLoss, make_objective
from loraweave.errors import InvalidLicense, InvalidTask, SearchFailed, WeightingError
from loraweave.routers.searches._solver import Solver, described
from loraweave.routers.searches._told import SearchResult, Told
from loraweave.routers.searches.similarity import Similarity
from loraweave.routers.tokens._text import read_expert_texts
from loraweave.routers.weights import MixtureWeights

# evaluations of the search of "auto": 5 steps of the gradient
EACH = 10
# the least budget with which "auto" trains too
TRAINS_FROM = 40
# a single adapter of less than this share of the loss without adapters is taken as it is
SURE = 0.5
# with labels, unless the adapter suits these by luck with at least this probability
LUCK = 0.05
# no program is sought where something that did not learn has a lower loss, in nats a token
NEAR = 0.5
# a program of FAR times that loss is no member
FAR = 2.0
# at most as many inputs tell how likely a label is whatever the input
CALIBRATING = 20
# the search of "auto"; the other one where the objective has no gradients
SEARCHES = ("gradient", "lorahub")


class Ways:
    """The trials of one task. Making it raises what settings and pool forbid, and then measures every adapter alone.

    `asked` is the name of the way to return, unless a guard finds a better one; None until run() where "auto" has nothing
    to learn.
    """

    def __init__(self, bench: Bench, settings: Settings, folds: Sequence[Split]) -> None:
        if settings.method == "auto" and bench.task.labels:
            # a label is not to win because the prompts make it likely whatever follows
            inputs = settings.inputs or bench.task.examples
            bench = replace(bench, task=replace(bench.task, calibrated=inputs[:CALIBRATING]))
        self._bench = bench
        self._settings = settings
        self._folds = folds
        # what was left out and why, and where a training began
        self.remarks: list[str] = []
        self._learning = self._make()
        self._plain = self._plain_trials()
        self.asked: str | None = settings.name if settings.method != "auto" else None

    @property
    def planned(self) -> int | None:
        """The number of evaluations that the searches and trainings will make; None where only time bounds one."""
        numbers = [trial.planned(len(self._folds)) for trial in self._learning]
        return None if None in numbers else sum(number or 0 for number in numbers)

    def run(self) -> list[Trial[Any]]:
        """Run and return the trials: base, best single, uniform mixture and, for "auto", the base in context first.

        With "auto", a trial none of whose candidates can be scored is left out; `remarks` then says why. For a task without
        examples nothing plain is measured, since there is nothing to compare on.
        """
        trials, start = self._measured(), self._bench.start
        if start is not None and any(trial.name == "few_shot" for trial in trials):
            self.remarks.append(f"few_shot began as the hub's {start.name!r}")
        return trials

    def _measured(self) -> list[Trial[Any]]:
        always = self._plain if self._settings.method == "auto" else [*self._plain, *self._learning]
        for trial in always:
            trial.run(self._folds)
        if self._settings.method != "auto":
            return always
        prompts = [trial for trial in self._prompts() if self._stays(trial)]
        plain = [*self._plain, *prompts]
        if not self._folds and self._is_sure(plain):
            self.asked = "best_single"
            return plain
        if self._is_one:
            self.remarks.append("one example is shown in prompts, and not learned from: two would tell how well ways do")
            return [*plain, *self._average(prompts)]
        if self._settings.has_many(self._bench.task):
            return [*plain, *self._compared(plain)]
        members = [trial for trial in self._learning if self._stays(trial)]
        programs = [trial for trial in self._programs(plain) if self._stays(trial)]
        averaged = members + [program for program in programs if self._joins(program, plain)]
        return [*plain, *members, *programs, *self._average(averaged)]

    def _average(self, members: Sequence[Trial[Any]]) -> list[Trial[Any]]:
        """Return the average of the members, which is then asked for; none for one member alone."""
        average: list[Trial[Any]] = [Averaged(members)] if len(members) > 1 else []
        for trial in average:
            trial.run(self._folds)
        if self._untrained and not self._is_one:
            used = "".join(f", and {trial.name} used {trial.evaluations} evaluations" for trial in members)
            self.remarks.append(f"{self._untrained}, so that it trains nothing{used}")
        self.asked = next((trial.name for trial in [*average, *members]), None)
        return average

    def _compared(self, plain: Sequence[Trial[Any]]) -> list[Trial[Any]]:
        """Measure all that learns on the examples held out, and return it; only the best goes on to learn from all."""
        ways = [*self._learning, *self._programs(plain)]
        measured = [way for way in ways if self._stays(way, Trial.hold_out)]
        best = min([*plain, *measured], key=lambda way: way.held_out_loss)
        if best in measured:
            best.finish()
        self.asked = best.name
        return measured

    def _is_sure(self, plain: Sequence[Trial[Any]]) -> bool:
        """Return True if the best single adapter's loss is far below that of prompts alone, and that is no luck.

        No prompt can show the only example that it asks for: of one, the adapter must also be the one that retrieval finds.
        An adapter that writes labels whatever the input has a low loss, too, and a few labels suit one of many by luck.
        """
        losses = {trial.name: trial.held_out_loss for trial in plain}
        if self._is_one and self._bench.best([0], 1).keys() != set(list(self._bench.scores)[:1]):
            return False
        prompts = ("base", "in_context", "in_context_adapter")
        if losses["best_single"] >= SURE * min(losses[name] for name in prompts if name in losses):
            return False
        return self._bench.task.labels is None or self._luck() < LUCK

    def _luck(self) -> float:
        """Return the `luck` of the best single adapter among those that retrieval ranks no lower, or among a whole pool."""
        bench, task = self._bench, self._bench.task
        (single,) = best = bench.best(range(len(task.examples)), 1)
        loss = ExampleLoss(bench.engine, bench.tokenizer, task, kind="labels", l1=0.0)
        (losses_N,), _ = loss.scores([MixtureWeights.of(best, bench.names)])
        ranked = list(bench.scores)
        num_tried = ranked.index(single) + 1 if ranked else len(bench.names)
        return luck(losses_N.tolist(), [label for _, label in task.examples], num_tried)

    def _plain_trials(self) -> list[Trial[Any]]:
        """Return the trials of base model, best single adapter and uniform mixture, without those that were asked for."""
        bench, requested = self._bench, {trial.name for trial in self._learning}
        if not bench.task.examples:
            return []
        uniform = MixtureWeights.of(dict.fromkeys(bench.names, 1 / len(bench.names)), bench.names)
        plain: list[Trial[Any]] = [
            Fixed("base", bench, MixtureWeights.of({}, bench.names)),
            BestSingle(bench),
            Fixed("uniform", bench, uniform),
        ]
        return [trial for trial in plain if trial.name not in requested]

    def _programs(self, plain: Sequence[Trial[Any]]) -> list[Programmed]:
        """Return the program of "auto", for tasks without labels that neither prompts nor one adapter come near to."""
        retriever, labels = self._bench.retriever, self._bench.task.labels
        if retriever is None or labels is not None or not self._has_room or _least(plain) < NEAR:
            return []
        return [Programmed(self._bench, retriever, self._settings)]

    def _joins(self, program: Programmed, plain: Sequence[Trial[Any]]) -> bool:
        """Return whether the program is a member, noted in `remarks`; not with one step, whose weight is learned anyway."""
        steps, loss, least = labels_of(program.chosen or ()), program.held_out_loss, _least(plain)
        why = ""
        if len(steps) == 1:
            why = " was left out: it has one step"
        elif loss >= FAR * least:
            why = f" was left out: its loss is {loss:.3f}, and {least:.3f} without anything learned"
        self.remarks.append(f"program {' > '.join(steps)}{why}")
        return not why

    def _prompts(self) -> list[Trial[Any]]:
        """Return the base in context, where there are other examples to show, and the adapter that learned to read them."""
        task = self._bench.task
        if task.demonstrations or not (len(task.examples) > 1 or self._is_one):
            return []
        reader = [] if self._bench.start is None else [InContextAdapter(self._bench.with_demonstrations(ORDERS))]
        return [self._in_context(), *reader]

    def _in_context(self) -> Trial[Any]:
        return Fixed("in_context", self._bench.with_demonstrations(), MixtureWeights.of({}, self._bench.names))

    def _stays(self, trial: Trial[Any], run: Callable[[Trial[Any], Sequence[Split]], object] = Trial.run) -> bool:
        try:
            run(trial, self._folds)
        except (SearchFailed, InvalidTask, InvalidLicense) as error:
            # an objective that scores nothing, demonstrations beyond the model's context, adapters that cannot be asked
            self.remarks.append(f"{trial.name} was left out: {error}")
            return False
        return True

    def _make(self) -> list[Trial[Any]]:
        """Return what was asked for, beyond the plain trials; for "auto" its members."""
        settings, bench, names = self._settings, self._bench, self._bench.names
        shown = bench.with_demonstrations(ORDERS)
        if settings.routes:
            return [Routed(bench, settings)]
        match settings.method:
            case "few_shot":
                return [self._few_shot(shown)]
            case "in_context":
                return [self._in_context()]
            case "auto":
                return [] if self._is_one else [*self._searches(), *self._trainings(shown)]
        if settings.method in OTHER_WAYS:
            return []
        if len(names) == 1 and settings.learns and settings.method != "grid":
            raise WeightingError(
                f"method {settings.name!r} weighs adapters against each other, but there is only {names[0]!r}: "
                "take it as it is (method='best_single'), let method='grid' find its strength, or give more adapters"
            )
        search = Searched(bench, settings)
        return [search if search.solver.learns else search.as_fixed()]

    def _searches(self) -> list[Trial[Any]]:
        """Return the search of "auto"; none for one adapter, which there is only with and without."""
        settings, budget = self._settings, self._settings.budget
        if len(self._bench.names) == 1:
            return []
        method = next(method for method in SEARCHES if settings.can_run(method))
        if method == "gradient" and budget is not None:
            budget = min(EACH, budget)
        return [Searched(self._bench, replace(settings, method=method, budget=budget, options={}))]

    def _trainings(self, shown: Bench) -> list[Trial[Any]]:
        """Return the trainings of "auto"."""
        settings = self._settings
        if not self._has_room:
            return []
        longer = [Lora(self._bench, replace(LONG, seed=settings.seed))] if settings.has_many(shown.task) else []
        return [self._few_shot(shown), *longer]

    def _few_shot(self, shown: Bench) -> FewShot:
        tuning, settings = FEW_SHOT if shown.start is None else BEGUN, self._settings
        options = settings.options if settings.method == "few_shot" else {}
        return FewShot(shown, replace(tuning, **options, seed=settings.seed))

    @property
    def _is_one(self) -> bool:
        """True if "auto" has one example to show, and nothing to compare ways on."""
        task, settings = self._bench.task, self._settings
        return settings.method == "auto" and len(task.examples) == 1 and not task.demonstrations and self._asks_the_task

    @property
    def _asks_the_task(self) -> bool:
        """True if the loss is the task's own, of mixtures of updates."""
        return self._settings.objective in (None, "cross_entropy") and self._settings.meaning in (None, "linear")

    @property
    def _untrained(self) -> str:
        """The reason why "auto" does no more than search, by its settings; "" where they let it train."""
        settings = self._settings
        if settings.seconds is not None:
            return f"seconds={settings.seconds:g} bounds auto"
        if settings.budget is not None and settings.budget < TRAINS_FROM:
            return f"auto's budget of {settings.budget} is below {TRAINS_FROM}"
        return "" if self._asks_the_task else "auto is given another loss than the task's, or another meaning of weights"

    @property
    def _has_room(self) -> bool:
        """True if "auto" does more than search: its loss is the task's, and examples, budget and time allow it."""
        return not self._untrained and len(self._bench.task.examples) > 1


Start = Mapping[str, float] | MixtureWeights | None


def luck(losses_N: Sequence[float], labels_N: Sequence[str], num_tried: int) -> float:
    """Return a bound on the probability that the best of `num_tried` adapters finds labels so likely that say nothing.

    `losses_N` are -log p of each example's label, among all labels. If labels are drawn without regard to the inputs, an
    adapter finds them x times as likely as their own frequencies do with a probability of at most 1 / x (Markov's
    inequality; universal inference, Wasserman et al. 2020, arXiv 1912.11436).
    """
    frequencies = [labels_N.count(label) / len(labels_N) for label in labels_N]
    log_guess = math.fsum(map(math.log, frequencies))
    return math.exp(min(0.0, math.log(num_tried) + log_guess + math.fsum(losses_N)))


def _least(trials: Sequence[Trial[Any]]) -> float:
    return min(trial.held_out_loss for trial in trials)


class Searched(MixtureTrial):
    """The best candidate of a solver; with a checkpoint, a folder, each split's search has a file of its own there.

    An objective of inputs without targets has nothing to hold out: its search sees all of them, whatever the split.
    Raises what the solver's settings raise, before the first forward pass.
    """

    def __init__(self, bench: Bench, settings: Settings) -> None:
        super().__init__(settings.name, bench)
        self.settings = settings
        self._start_name = settings.start_name(solver_class(settings.name))
        # a start that is found on examples is not known yet
        self._start_weights: Start = None if self._start_name else settings.options.get("start")
        self.solver = self._solver(self._start_weights)
        self.merge_method = settings.meaning or self.solver.merge_method
        self._loss = settings.objective or self.solver.loss
        self._inputs: Sequence[Prompt] | None = None
        if self._loss == "entropy":
            # entropy looks at no targets
            texts = [text for text, _ in bench.task.examples]
            self._inputs = texts if settings.inputs is None else settings.inputs
        self.learns = self._inputs is None
        if (groups := self.solver.space.groups) and self.merge_method != "linear":
            raise WeightingError(
                f"method {self.name!r} is to weigh {len(groups)} groups of layers apart, but what its weights mean is "
                f"{self.merge_method!r}, which takes one weight for each adapter: leave out groups=, or pass space='deltas'"
            )

    def as_fixed(self) -> Fixed:
        """Return what the solver proposes at once, where no example has a part in it."""
        (mixture,) = self.solver.ask()
        return Fixed(self.name, self.bench, mixture, self.merge_method)

    def planned(self, num_folds: int) -> int | None:
        return None if self.settings.budget is None else self.settings.budget * (num_folds + 1)

    def choose(self, splits: Sequence[Split]) -> list[SearchResult]:
        objective = self._objective()
        searches = [self._search(split, objective) for split in splits]
        while running := [(search, mixtures) for search in searches if (mixtures := search.solver.ask())]:
            objectives, candidates = [search.objective for search, _ in running], [mixtures for _, mixtures in running]
            if self.solver.needs_gradients:
                told = together_with_gradients(objectives, candidates)
            else:
                told = [(losses, []) for losses in together(objectives, candidates)]
            for (search, mixtures), (losses, gradients) in zip(running, told, strict=True):
                search.tell(losses, gradients)
                self._count(search.solver.cost * len(mixtures))
        return [search.result() for search in searches]

    def _search(self, split: Split, objective: ExampleLoss | UserLoss) -> _Search:
        folder = self.bench.checkpoint
        log = None if folder is None else folder / f"{self.name}-{split.name}.json"
        seen = split.seen if self._inputs is None else range(len(self._inputs))
        search = _Search(self._solver(self._start(split)), objective.view(seen), log)
        self._count(search.solver.spent)
        return search

    def _start(self, split: Split) -> Start:
        """Return where the search of a split's examples begins; None for the solver's own default."""
        names, start_name = self.bench.names, self._start_name
        if start_name is None:
            return self._start_weights
        if start_name == "uniform":
            return dict.fromkeys(names, 1 / len(names))
        if start_name == "retrieval":
            return Similarity(names, scores=self.bench.scores).ask()[0]
        return {} if start_name == "base" else self.bench.best(split.seen, BEST[start_name])

    def _solver(self, start: Start) -> Solver:
        supplied: dict[str, Any] = {
            "scores": self.bench.scores,
            "layers": list(self.bench.engine.target_layers),
            "weights": self.settings.weights,
            "start": start,
        }
        if "texts" in options_of(solver_class(self.settings.name)):
            prompts = [text for text, _ in self.bench.task.examples] or self.settings.inputs or ()
            supplied["texts"] = read_expert_texts(self.name, self.bench.engine.pool, None, None)
            supplied["asked"] = [str(text) for text in prompts]
        options = {name: value for name, value in self.settings.options.items() if name != "start"}
        return replace(self.settings, options=options).solver(self.bench.names, supplied)

    def _objective(self) -> ExampleLoss | UserLoss:
        settings, bench = self.settings, self.bench
        l1 = self.solver.l1 if settings.l1 is None else settings.l1
        terms = {"l1": l1, "l2": settings.l2, "sparsity": settings.sparsity}
        if self._loss == "cross_entropy" and self.merge_method == "linear" and bench.task.examples:
            return bench.loss().penalised(Penalty(**terms))
        return make_objective(
            bench.engine,
            bench.tokenizer,
            bench.task,
            self._loss,
            merge_method=self.merge_method,
            inputs=self._inputs,
            workers=bench.workers,
            **terms,
        )

    def _count(self, made: int) -> None:
        self.evaluations += made
        self.bench.on_progress(made)


class _Search:
    """A solver with its objective, resumed from its checkpoint if there is one."""

    def __init__(self, solver: Solver, objective: ExampleLoss | UserLoss, log: Path | None) -> None:
        self.solver = solver
        self.objective = objective
        self._log = log
        self._kept = {} if log is None else {**solver.settings(), **described(objective)}
        if log is not None:
            solver.replay(Told.read(log, self._kept))

    def tell(self, losses: Sequence[float], gradients: Sequence[Tensor]) -> None:
        """Tell the solver losses, and write the checkpoint. Raises SearchFailed, saying why the first failed, if all did."""
        try:
            self.solver.tell(losses, gradients)
        except SearchFailed as error:
            raise self._explain_failure(error) from error
        if self._log is not None:
            self.solver.keep(self._log, self._kept)

    def result(self) -> SearchResult:
        """Return the best candidate. Raises SearchFailed as `tell` does."""
        try:
            return self.solver.result()
        except SearchFailed as error:
            raise self._explain_failure(error) from error

    def _explain_failure(self, error: SearchFailed) -> SearchFailed:
        return SearchFailed(f"{error}. The first failed with {self.objective.failures.first}")
