"""Finds which adapters of a hub, one after the other, solve a task that is given by a few examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Annotated, Any

from loraweave.common.chat import Prompt
from loraweave.common.checks import says_something
from loraweave.common.display import progress_bar
from loraweave.common.options import Count, Range, check_options, options_of
from loraweave.common.rows import GivenRows
from loraweave.composer.compose.compose import experts_of, fitting_hits
from loraweave.composer.composer import Composer
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.model.layers import require_model
from loraweave.composer.model.scoring import MAX_NEW_TOKENS
from loraweave.composer.programs.asked import Asked, Reading, Step
from loraweave.composer.programs.program import OrderReport, Program, ProgramRow, pool_of
from loraweave.errors import BaseModelMismatch, CompositionError, InvalidTask, SearchFailed, WeightingError
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Candidate, Task

# after so many examples, so many programs of one length go on
ROUNDS = ((1, 32), (2, 12))
# an answer has at most LONGER times the tokens of the longest text of the examples, and MORE
LONGER, MORE = 2, 4
# adapters that a search by outputs compares
SHORTLIST = 1000

Order = tuple[Step, ...]


def order(
    model: Any,
    tokenizer: Any,
    hub: Hub,
    task: Task | GivenRows,
    *,
    k: Count = 20,
    max_steps: Count = 3,
    beam: Count = 3,
    gain: Annotated[float, Range(least=0, below=1)] = 0.1,
    progress: bool = True,
) -> Program:
    """The program `a > b > ...` whose last step gives the task's targets the lowest mean loss; each step asked by its own
    instruction, the description in the hub.

    First steps are the `k` adapters whose sample inputs are most like the task's, later ones those and the `k` whose sample
    outputs are most like its targets. All single steps are measured, then all pairs, then the `beam` best programs with one
    more step at any place, up to `max_steps`; the worse ones are dropped after one example, and again after two. Where the
    task has an instruction, the base asked by it is a step like others, the last among equal ones. A longer program is taken
    where its loss is lower by more than the share `gain`. No adapter occurs twice in a program, and the model is asked no
    question twice.

    Raises InvalidTask for a task without examples and a hub without descriptions, WeightingError for settings out of range
    and for anything but a hub, EmptyIndex and BaseModelMismatch for a hub without an adapter for the model, SearchFailed
    where no program has a finite loss.
    """
    asked = Task.of(task)
    given = {"k": k, "max_steps": max_steps, "beam": beam, "gain": gain}
    check_options("order()", given, options_of(order, after=4), error=WeightingError)
    if isinstance(experts_of(hub), ExpertPool):
        raise WeightingError(
            f"order() asks adapters by their descriptions in a hub, but got {type(hub).__name__}: pass lw.Hub"
        )
    if not asked.examples:
        raise InvalidTask("the task has no examples to find an order by; give at least one (input, target) pair")
    require_model(model)
    if not callable(tokenizer):
        raise CompositionError(f"the examples need the model's tokenizer, and {type(tokenizer).__name__} is not one")
    started = time.perf_counter()
    first, later, left_out = candidates(hub, tokenizer, asked, k, model)
    pool = hub.pool(list(dict.fromkeys(step.name for step in [*first, *later] if step.name is not None)))
    engine = Composer(model, Fitting(model).accepted(pool), tokenizer=tokenizer)
    with progress_bar(progress) as bar:
        shown = bar.add_task("asking adapters", total=None)
        asking = Asked(engine, tokenizer, asked, lambda count: bar.update(shown, advance=count))
        search = Search(asking, asked, first, later, beam)
        search.run(max_steps)
        bar.update(shown, total=bar.tasks[shown].completed)
    engine.close()
    chosen, reason = search.best(gain)
    seconds = time.perf_counter() - started
    report = OrderReport(tuple(search.rows()), _labels(chosen), reason, tuple(left_out), asking.count, seconds)
    return Program(model, tokenizer, asked, chosen, hub, pool_of(chosen, hub, model), report)


def candidates(hub: Hub, tokenizer: Any, task: Task, k: int, model: Any) -> tuple[list[Step], list[Step], list[str]]:
    """(first steps, later steps, adapters without a description). Raises InvalidTask where none has one."""
    inputs = [str(asked) for asked, _ in task.examples]
    by_inputs = fitting_hits(hub, partial(Retriever(hub).for_task, inputs, evidence=False), k, model)
    by_outputs: list[Candidate] = []
    if len(by_inputs) == k:
        # otherwise these are all that there are
        search = Retriever(hub, keys=("outputs",), shortlist=SHORTLIST).for_examples
        by_outputs = _or_none(partial(fitting_hits, hub, partial(search, task.examples), k, model))
    found = {hit.name: hit.record for hit in [*by_inputs, *by_outputs]}
    left_out = [name for name, record in found.items() if not says_something(record.description)]
    if len(left_out) == len(found):
        raise InvalidTask(
            f"none of the {len(found)} adapters found in {hub} has a description to ask it by: give them some "
            "(hub.update(name, description=...))"
        )
    longest = max(map(len, tokenizer([str(text) for pair in task.examples for text in pair])["input_ids"]))
    limit = min(MAX_NEW_TOKENS, LONGER * longest + MORE)
    steps = {
        name: Step(name, record.description, record.hash, limit) for name, record in found.items() if name not in left_out
    }
    base = [Step(None, task.instruction)] if says_something(task.instruction) else []
    first = [steps[hit.name] for hit in by_inputs if hit.name in steps]
    return [*first, *base], [*steps.values(), *base], left_out


def _or_none(search: Callable[[], list[Candidate]]) -> list[Candidate]:
    """What a search by outputs finds; nothing where no card has any."""
    try:
        return search()
    except BaseModelMismatch:
        return []


def _labels(path: Order) -> tuple[str, ...]:
    return tuple(step.label for step in path)


@dataclass(eq=False)
class Search:
    """Programs by length, each measured on more examples as long as it is among the best."""

    asking: Asked
    task: Task
    first: Sequence[Step]
    later: Sequence[Step]
    beam: int
    # readings of each program, in the order of the examples
    _found: dict[Order, list[Reading]] = field(default_factory=dict)

    def run(self, max_steps: int) -> None:
        """Measures programs of up to so many steps; ends early where one writes every example."""
        self._measure([(step,) for step in dict.fromkeys([*self.first, *self.later])], len(self.task.examples))
        for length in range(2, max_steps + 1):
            if any(all(reading.hit for reading in found) for found in self._whole().values()):
                return
            tried = self._pairs() if length == 2 else self._longer(length)
            for num_examples, kept in [*ROUNDS, (len(self.task.examples), 0)]:
                if num_examples <= len(self.task.examples):
                    self._measure(tried, num_examples)
                    tried = sorted(tried, key=self._loss)[: kept or None]

    def best(self, gain: float) -> tuple[Order, str]:
        """The program to take, and why. Raises SearchFailed where no loss is finite."""
        by_length: dict[int, Order] = {}
        # the base is last among equal ones, else the earlier
        for path in sorted(self._whole(), key=lambda path: (self._loss(path), any(step.name is None for step in path))):
            by_length.setdefault(len(path), path)
        chosen: Order | None = None
        for path in (by_length[length] for length in sorted(by_length)):
            least = float("inf") if chosen is None else (1 - gain) * self._loss(chosen)
            if self._loss(path) < least:
                chosen = path
        if chosen is None:
            raise SearchFailed(f"none of {len(self._found)} programs has a finite loss; see whether the model is damaged")
        single = self._loss(by_length[1])
        reason = f"loss {self._loss(chosen):.3f}, of the best single step {single:.3f}"
        return chosen, reason

    def rows(self) -> list[ProgramRow]:
        """Every program measured."""
        found = [
            ProgramRow(_labels(path), self._loss(path), fmean(reading.hit for reading in readings), len(readings))
            for path, readings in self._found.items()
        ]
        return sorted(found, key=lambda row: (-row.num_examples, row.loss))

    def _pairs(self) -> list[Order]:
        return [(first, last) for first in self.first for last in self.later if first != last]

    def _longer(self, length: int) -> list[Order]:
        """The best programs of one step less with one step more, at any place."""
        shorter = sorted((path for path in self._whole() if len(path) == length - 1), key=self._loss)[: self.beam]
        made: dict[Order, None] = {}
        for path in shorter:
            for place in range(length):
                for step in self.first if place == 0 else self.later:
                    if step not in path:
                        made[(*path[:place], step, *path[place:])] = None
        return list(made)

    def _whole(self) -> dict[Order, list[Reading]]:
        """The programs that were measured on all examples."""
        return {path: found for path, found in self._found.items() if len(found) == len(self.task.examples)}

    def _loss(self, path: Order) -> float:
        loss = fmean(reading.loss for reading in self._found[path])
        # NaN is worse than everything
        return loss if loss == loss else float("inf")

    def _measure(self, paths: Sequence[Order], num_examples: int) -> None:
        """Reads the targets of the first `num_examples` examples under the last step of each program."""
        examples = self.task.examples[:num_examples]
        texts = self._texts({path[:-1] for path in paths}, [text for text, _ in examples])
        targets = [
            (path[-1], texts[path[:-1]][number], target) for path in paths for number, (_, target) in enumerate(examples)
        ]
        readings = self.asking.readings(targets)
        for number, path in enumerate(paths):
            self._found[path] = readings[number * num_examples : (number + 1) * num_examples]

    def _texts(self, paths: Iterable[Order], inputs: Sequence[Prompt]) -> dict[Order, Sequence[Prompt]]:
        """What each program answers to each input; the inputs themselves for the one without steps."""
        known: dict[Order, Sequence[Prompt]] = {(): inputs}
        # sorted, so that the batches are the same in every process
        wanted = sorted(paths, key=_labels)
        for length in range(1, max(map(len, wanted), default=0) + 1):
            begun = list(dict.fromkeys(path[:length] for path in wanted if len(path) >= length))
            answers = self.asking.answers([(path[-1], text) for path in begun for text in known[path[:-1]]])
            for number, path in enumerate(begun):
                known[path] = answers[number * len(inputs) : (number + 1) * len(inputs)]
        return known
