"""The search for a program: which adapters, one after the other, give the targets of a few examples the lowest loss.

`Programmed` is its trial for compose(), after the search itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from rich.progress import Progress

from loraweave.common.chat import Prompt
from loraweave.common.checks import says_something
from loraweave.common.display import progress_bar
from loraweave.composer.compose.asked import Asked, Reading, Step, answer_limit
from loraweave.composer.compose.candidates import fitting_hits
from loraweave.composer.compose.refine import task_of
from loraweave.composer.compose.settings import Settings
from loraweave.composer.compose.trials import Bench, Scores, Selection, Split, Trial, result_of
from loraweave.composer.composer import Composer
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.train.rows import MAX_PACKED
from loraweave.errors import BaseModelMismatch, InvalidTask, SearchFailed
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Candidate, Task

# after so many examples, at most so many programs of one length go on
ROUNDS = ((1, 32), (2, 12))
# the number of steps, those of the lowest loss alone, that may be the last of longer programs
LASTS = 8
# adapters that a search by outputs compares
SHORTLIST = 1000
# in a composition a longer program's loss must be lower by this share, since with five examples a needless third step often
# seems to help a little; and three steps are sought from so many programs of two
GAIN, BEAM = 0.2, 1

Order = tuple[Step, ...]


def search_programs(
    model: Any,
    tokenizer: Any,
    retriever: Retriever,
    task: Task,
    *,
    k: int = 20,
    max_steps: int = 3,
    beam: int = 3,
    gain: float = 0.0,
    progress: bool | Progress = False,
) -> ProgramSearch:
    """Measure programs of up to `max_steps` adapters of the retriever's hub on the task's examples, and return the search.

    Raises InvalidTask where no adapter has a description, and what `fitting_hits` raises.
    """
    first, later, left_out = _steps(retriever, tokenizer, task, k, model)
    pool = retriever.hub.pool(list(dict.fromkeys(step.name for step in [*first, *later] if step.name is not None)))
    engine = Composer(model, Fitting(model).accepted(pool), tokenizer=tokenizer)
    with closing(engine), progress_bar(progress) as bar:
        shown = bar.add_task("asking adapters", total=None)
        # as many tokens as the longest text, and four: an answer that goes on and on does not hold up the others
        most = answer_limit(tokenizer, task.examples) // 2 + 2
        asking = Asked(engine, tokenizer, task, lambda count: bar.update(shown, advance=count), most)
        search = ProgramSearch(asking, task, first, later, beam, gain, left_out)
        search.run(max_steps)
        bar.update(shown, total=bar.tasks[shown].completed)
    return search


def _steps(retriever: Retriever, tokenizer: Any, task: Task, k: int, model: Any) -> tuple[list[Step], list[Step], list[str]]:
    """Return (first steps, later steps, adapters without a description). Raises InvalidTask where none has one."""
    hub, inputs = retriever.hub, [str(prompt) for prompt, _ in task.examples]
    by_inputs = fitting_hits(hub, partial(retriever.for_task, inputs, evidence=False), k, model)
    by_outputs: list[Candidate] = []
    if len(by_inputs) == k < len(hub):
        # otherwise these are all that there are
        search = hub.kept("retriever by outputs", partial(Retriever, hub, keys=("outputs",), shortlist=SHORTLIST))
        by_outputs = _or_none(partial(fitting_hits, hub, partial(search.for_examples, task.examples), k, model))
    records = {hit.name: hit.record for hit in [*by_inputs, *by_outputs]}
    left_out = [name for name, record in records.items() if not says_something(record.description)]
    if len(left_out) == len(records):
        raise InvalidTask(
            f"none of the {len(records)} adapters found in {hub} has a description to ask it by: give them some "
            "(hub.update(name, description=...))"
        )
    limit = answer_limit(tokenizer, task.examples)
    steps = {
        name: Step(name, record.description, record.hash, limit) for name, record in records.items() if name not in left_out
    }
    base = [Step(None, task.instruction, None, limit)] if says_something(task.instruction) else []
    first = [steps[hit.name] for hit in by_inputs if hit.name in steps]
    return [*first, *base], [*steps.values(), *base], left_out


def _or_none(search: Callable[[], list[Candidate]]) -> list[Candidate]:
    """Return what a search by outputs finds; nothing where no card has any."""
    try:
        return search()
    except BaseModelMismatch:
        return []


def labels_of(path: Order) -> tuple[str, ...]:
    return tuple(step.label for step in path)


@dataclass(frozen=True)
class ProgramRow:
    """A program measured on `num_examples` examples: the targets' mean loss in nats, the share that decoding would write."""

    steps: tuple[str, ...]
    loss: float
    hits: float
    num_examples: int


@dataclass(eq=False)
class ProgramSearch:
    """The search of programs by length, each measured on more examples as long as it is among the best.

    A longer program is better where its loss is lower by more than the share `gain`. `left_out` are adapters without a
    description, which cannot be asked.
    """

    asking: Asked
    task: Task
    first: Sequence[Step]
    later: Sequence[Step]
    beam: int
    gain: float = 0.0
    left_out: Sequence[str] = ()
    # readings of each program, in the order of the examples, and their mean loss
    readings: dict[Order, list[Reading]] = field(default_factory=dict)
    _losses: dict[Order, float] = field(default_factory=dict)

    def run(self, max_steps: int) -> None:
        """Measure programs of up to `max_steps` steps.

        Ends early where one writes every example, where no program of the last length is better than all shorter ones, and
        where none of those that are measured now is better than the best shorter one on the same examples.
        """
        self._measure([(step,) for step in dict.fromkeys([*self.first, *self.later])], len(self.task.examples))
        for length in range(2, max_steps + 1):
            whole = self._whole()
            if any(all(reading.hit for reading in self.readings[path]) for path in whole):
                return
            if length > 2 and len(self._chosen()) < length - 1:
                return
            shorter = self.readings[min(whole, key=self._losses.__getitem__)]
            if length > 2:
                tried = self._longer(length)
            else:
                lasts = self._lasts()
                tried = [(first, last) for first in self.first for last in lasts if first != last]
                # most pairs come to the second round: one batch has the answers of both
                self._texts({path[:-1] for path in tried}, [text for text, _ in self.task.examples[: ROUNDS[1][0]]])
            for num_examples, kept in [*ROUNDS, (len(self.task.examples), 0)]:
                if num_examples <= len(self.task.examples):
                    self._measure(tried, num_examples)
                    tried = sorted(tried, key=self._losses.__getitem__)[: kept or None]
                    if not tried or self._losses[tried[0]] >= _mean_loss(shorter[:num_examples]):
                        return

    def best(self) -> tuple[Order, str]:
        """Return the program to take, and why. Raises SearchFailed where no loss is finite."""
        chosen = self._chosen()
        if not chosen:
            raise SearchFailed(f"none of {len(self.readings)} programs has a finite loss; see whether the model is damaged")
        least = min(self._losses[path] for path in self._whole() if len(path) == 1)
        return chosen, f"loss {self._losses[chosen]:.3f}, of the best single step {least:.3f}"

    def _chosen(self) -> Order:
        """Return the best program; () where no loss is finite."""
        by_length: dict[int, Order] = {}
        # the base is last among equal ones, else the earlier
        for path in sorted(self._whole(), key=lambda path: (self._losses[path], any(step.name is None for step in path))):
            by_length.setdefault(len(path), path)
        chosen: Order = ()
        for path in (by_length[length] for length in sorted(by_length)):
            if self._losses[path] < ((1 - self.gain) * self._losses[chosen] if chosen else math.inf):
                chosen = path
        return chosen

    def rows(self) -> list[ProgramRow]:
        """Return a row for every program measured, those on most examples first, then by loss."""
        rows = [
            ProgramRow(labels_of(path), self._losses[path], fmean(reading.hit for reading in readings), len(readings))
            for path, readings in self.readings.items()
        ]
        return sorted(rows, key=lambda row: (-row.num_examples, row.loss))

    def _lasts(self) -> list[Step]:
        """Return the steps of lowest loss alone: what answers in the targets' form reads them best, whatever it is asked."""
        return sorted(dict.fromkeys([*self.first, *self.later]), key=lambda step: self._losses[step,])[:LASTS]

    def _longer(self, length: int) -> list[Order]:
        """Return the best programs of one step less with one step more, at any place."""
        whole = [path for path in self._whole() if len(path) == length - 1]
        shorter = sorted(whole, key=self._losses.__getitem__)[: self.beam]
        made: dict[Order, None] = {}
        steps = [self.first, *[self.later] * (length - 2), self._lasts()]
        for path in shorter:
            for place in range(length):
                for step in steps[place]:
                    if step not in path:
                        made[(*path[:place], step, *path[place:])] = None
        return list(made)

    def _whole(self) -> list[Order]:
        """Return the programs that were measured on all examples."""
        return [path for path, readings in self.readings.items() if len(readings) == len(self.task.examples)]

    def _measure(self, paths: Sequence[Order], num_examples: int) -> None:
        """Read the targets of the first `num_examples` examples under the last step of each program."""
        examples = self.task.examples[:num_examples]
        texts = self._texts({path[:-1] for path in paths}, [text for text, _ in examples])
        targets = [
            (path[-1], texts[path[:-1]][number], target) for path in paths for number, (_, target) in enumerate(examples)
        ]
        readings = self.asking.readings(targets)
        for number, path in enumerate(paths):
            self.readings[path] = readings[number * num_examples : (number + 1) * num_examples]
            self._losses[path] = _mean_loss(self.readings[path])

    def _texts(self, paths: Iterable[Order], inputs: Sequence[Prompt]) -> dict[Order, Sequence[Prompt]]:
        """Return what each program answers to each input; the inputs themselves for the one without steps."""
        known: dict[Order, Sequence[Prompt]] = {(): inputs}
        # sorted, so that the batches are the same in every process
        wanted = sorted(paths, key=labels_of)
        for length in range(1, max(map(len, wanted), default=0) + 1):
            begun = list(dict.fromkeys(path[:length] for path in wanted if len(path) >= length))
            answers = self.asking.answers([(path[-1], text) for path in begun for text in known[path[:-1]]])
            for number, path in enumerate(begun):
                known[path] = answers[number * len(inputs) : (number + 1) * len(inputs)]
        return known


def _mean_loss(readings: Sequence[Reading]) -> float:
    """Return the mean over examples; NaN counts as infinite, worse than everything."""
    loss = fmean(reading.loss for reading in readings)
    return loss if loss == loss else math.inf


class Programmed(Trial):
    """The program that `lw.order` finds by the first examples that a split sees, where a longer one must gain GAIN."""

    def __init__(self, bench: Bench, retriever: Retriever, settings: Settings) -> None:
        super().__init__("program", bench)
        self._retriever, self._settings = retriever, settings
        # what the searches have measured of programs that were chosen, by example
        self._read: dict[tuple[Order, int], Reading] = {}

    def choose(self, splits: Sequence[Split]) -> list[Selection]:
        return [self._search(split.seen[:MAX_PACKED]) for split in splits]

    def _search(self, examples: Sequence[int]) -> Selection:
        """Return the program. Raises InvalidTask without descriptions, InvalidLicense for steps that may not be combined."""
        bench, task = self.bench, task_of(self.bench.task, examples)
        limits: dict[str, Any] = {"k": self._settings.k, "gain": GAIN, "beam": BEAM, "progress": bench.progress}
        search = search_programs(bench.engine.model, bench.tokenizer, self._retriever, task, **limits)
        # an evaluation is a candidate scored on all examples
        self.evaluations += math.ceil(search.asking.count / len(examples))
        chosen, _ = search.best()
        self._read |= {(chosen, place): read for place, read in zip(examples, search.readings[chosen], strict=True)}
        names = [step.name for step in chosen if step.name is not None]
        # the base alone combines nothing
        if not names:
            return self._choice(chosen, None)
        self._settings.require_combinable(pool := self._retriever.hub.pool(names))
        return self._choice(chosen, pool)

    def _choice(self, chosen: Order, pool: ExpertPool | None) -> Selection:
        """Return the choice of a program by adapters of the pool; its steps are measured together."""
        bench, model = self.bench, self.bench.engine.model

        def scores(examples: Sequence[int]) -> Scores:
            if all((chosen, place) in self._read for place in examples):
                loss_N, hit_N = zip(*(self._read[chosen, place] for place in examples), strict=True)
                return np.array(loss_N), np.array(hit_N, dtype=np.float64)
            pairs = [bench.task.examples[place] for place in examples]
            made, hits_N = program.answers(pairs)
            return np.array(made.losses(pairs)), hits_N

        def choice(step: Step) -> Selection:
            task = step.task(bench.task)
            if step.name is None or pool is None:
                return bench.selection(scores, task=task, pool=None)
            result = result_of(MixtureWeights.of({step.name: 1.0}, [step.name]))
            return bench.selection(scores, result, task=task, pool=Fitting(model).accepted(pool.subset([step.name])))

        program = replace(bench.selection(scores, pool=None), steps={step.label: choice(step) for step in chosen})
        return program
