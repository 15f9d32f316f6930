"""The search for a program: which adapters, one after the other, give the targets of a few examples the lowest loss.

Adapters are asked by their own instructions: what each answers to a text, and how it reads a target. Every question is put
to the model once. Questions to different adapters share batches: each row has its own mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import attrgetter
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rich.progress import Progress

from loraweave.common.chat import Prompt
from loraweave.common.checks import says_something
from loraweave.common.display import progress_bar
from loraweave.composer.compose.candidates import fitting_hits
from loraweave.composer.compose.examples import TokenTree, runs_trees, token_tree, tree_inputs, tree_logits
from loraweave.composer.composer import Composer
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import EncodedRow, batch, encode, in_chunks, token_scores, untouched
from loraweave.errors import BaseModelMismatch, InvalidTask, SearchFailed
from loraweave.retrieval.retriever import Retriever
from loraweave.types import LINE, Candidate, Task, with_pairs

# the tokens that one tree, and one pass over several, have at most
MAX_TREE, MAX_TOKENS = 384, 1024
# answers that one call of the model's generate writes at most: their tokens cost little beside those of another call
MAX_ROWS = 64


@dataclass(frozen=True)
class Step:
    """A step of a program: an adapter, or the base (`name` None), with its content's hash and the instruction it is given.

    An answer ends at a line break, at the latest after `max_new_tokens`.
    """

    name: str | None
    instruction: str
    hash: str | None = None
    max_new_tokens: int = scoring.MAX_NEW_TOKENS

    @property
    def label(self) -> str:
        """The step's name for tables and messages."""
        return "(base)" if self.name is None else self.name

    @property
    def mixture(self) -> dict[str, float] | None:
        """The mixture that activate() takes for a row; None for the base."""
        return None if self.name is None else {self.name: 1.0}

    def task(self, whole: Task) -> Task:
        """Return the task of answering a text by the step's instruction, in the template of the program's whole task."""
        stop, unscored = () if whole.chat else LINE, {"labels": None, "metric": "exact_match", "calibrated": False}
        bare = with_pairs(whole, examples=(), demonstrations=(), orders=1)
        return with_pairs(bare, instruction=self.instruction, stop=stop, **unscored)


class Reading(NamedTuple):
    """The mean loss of a target's tokens, and whether greedy decoding would write them."""

    loss: float
    hit: bool


Question = tuple[Step, Prompt]
Target = tuple[Step, Prompt, str]


@dataclass(eq=False)
class Asked:
    """A cache of a model's answers and readings; `_on_progress` is called with the number of newly computed ones.

    Answers end after `_most` tokens, or at the step's own limit if that is lower.
    """

    _engine: Composer
    _tokenizer: Any
    _task: Task
    _on_progress: Callable[[int], object]
    _most: int = scoring.MAX_NEW_TOKENS
    _answers: dict[Question, str] = field(default_factory=dict)
    _readings: dict[Target, Reading] = field(default_factory=dict)
    _tasks: dict[Step, Task] = field(default_factory=dict)
    # whether the model runs token trees, in which rows share their common prefix; None until it was tried
    _can_share: bool | None = None

    @property
    def count(self) -> int:
        """The number of questions that the model was asked."""
        return len(self._answers) + len(self._readings)

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """Return the greedy answer of each question's step to its text: the first line, or the turn of a chat."""
        new = [question for question in dict.fromkeys(questions) if question not in self._answers]
        prompts = {question: self._prompt(*question) for question in new}
        # a batch has rows of one limit, so that no row's answer depends on the rows beside it
        new.sort(key=lambda question: (self._limit(question), len(str(prompts[question]))))
        for limit, group in groupby(new, key=self._limit):
            for rows in in_chunks(list(group), MAX_ROWS):
                with torch.no_grad(), untouched(self._engine.model), self._engine.activate([s.mixture for s, _ in rows]):
                    texts, stop = [prompts[row] for row in rows], self._tasks[rows[0][0]].stops
                    answers = scoring.generate(self._engine.model, self._tokenizer, texts, max_new_tokens=limit, stop=stop)
                self._answers.update(zip(rows, answers, strict=True))
                self._on_progress(len(rows))
        return [self._answers[question] for question in questions]

    def readings(self, targets: Sequence[Target]) -> list[Reading]:
        """Return each target's loss, and whether greedy decoding would write it, after its step's prompt for its text."""
        new = [target for target in dict.fromkeys(targets) if target not in self._readings]
        new.sort(key=lambda target: target[0].label)
        prompts, wanted = [self._prompt(step, text) for step, text, _ in new], [target for _, _, target in new]
        rows = dict(zip(new, encode(self._engine.model, self._tokenizer, prompts, wanted), strict=True))
        with torch.no_grad(), untouched(self._engine.model):
            # tried once, and while no mixture is active
            if rows and self._can_share is None:
                self._can_share = runs_trees(self._engine.model, self._tokenizer, list(rows.values()))
            run = self._as_trees if self._can_share else self._as_rows
            for some, readings in run(rows):
                self._readings.update(zip(some, readings, strict=True))
                self._on_progress(len(readings))
        return [self._readings[target] for target in targets]

    def _limit(self, question: Question) -> int:
        return min(question[0].max_new_tokens, self._most)

    def _prompt(self, step: Step, text: Prompt) -> Prompt:
        if step not in self._tasks:
            self._tasks[step] = step.task(self._task)
        return self._tasks[step].prompt(text)

    def _as_rows(self, rows: dict[Target, EncodedRow]) -> Iterator[tuple[list[Target], list[Reading]]]:
        model = self._engine.model
        for some in in_chunks(sorted(rows, key=lambda target: len(rows[target])), scoring.BATCH_SIZE):
            made = batch(model, self._tokenizer, [rows[target] for target in some])
            with self._engine.activate([step.mixture for step, _, _ in some]):
                loss_BK, hit_BK = token_scores(model, made)
            counts = [len(rows[target].target) for target in some]
            sums = zip(loss_BK.sum(dim=1).tolist(), hit_BK.sum(dim=1).tolist(), counts, strict=True)
            yield some, [Reading(loss / count, hits == count) for loss, hits, count in sums]

    def _as_trees(self, rows: dict[Target, EncodedRow]) -> Iterator[tuple[list[Target], list[Reading]]]:
        """Yield (targets, readings) for each batch of trees; a tree holds targets of one step, whose prompts begin alike."""
        planted: list[tuple[list[Target], TokenTree]] = []
        for _, group in groupby(rows, key=lambda target: target[0]):
            parts = _up_to(group, lambda target: len(rows[target]), MAX_TREE)
            planted += [(some, token_tree([rows[target] for target in some])) for some in parts]
        planted.sort(key=lambda pair: len(pair[1]))
        for trees in _up_to(planted, lambda pair: len(pair[1]), MAX_TOKENS):
            inputs = tree_inputs(self._engine.model, [tree for _, tree in trees])
            with self._engine.activate([some[0][0].mixture for some, _ in trees]):
                logits_BPV = tree_logits(self._engine.model, inputs, max([tree.num_predictors for _, tree in trees]))
            readings = []
            for logits_PV, (_, tree) in zip(logits_BPV, trees, strict=True):
                loss_R, hit_R = tree.read(logits_PV)
                readings += [Reading(loss, hit) for loss, hit in zip(loss_R.tolist(), hit_R.tolist(), strict=True)]
            yield [target for some, _ in trees for target in some], readings


def _up_to(items: Iterable[Any], size: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """Yield the items in lists of at least one item, in which the sizes of all items add up to at most `limit`."""
    some: list[Any] = []
    total = 0
    for item in items:
        if some and total + size(item) > limit:
            yield some
            some, total = [], 0
        some.append(item)
        total += size(item)
    if some:
        yield some


# (number of examples, the most programs of one length that go on after these)
ROUNDS = ((1, 32), (2, 12))
# how many steps, those with the lowest losses alone, may be the last step of longer programs
LASTS = 8
# how many adapters a search by outputs compares
SHORTLIST = 1000
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
    pool = retriever.hub.pool([step.name for step in later if step.name is not None])
    engine = Composer(model, Fitting(model).accepted(pool), tokenizer=tokenizer)
    with closing(engine), progress_bar(progress) as bar:
        shown = bar.add_task("asking adapters", total=None)
        # as many tokens as the longest text, and four: an answer that goes on and on does not hold up the others
        most = scoring.answer_limit(tokenizer, task.examples) // 2 + 2
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
        # else the search by inputs has returned all adapters
        search = hub.kept("retriever by outputs", partial(Retriever, hub, keys=("outputs",), shortlist=SHORTLIST))
        # a hub whose cards have no outputs has nothing to compare
        with suppress(BaseModelMismatch):
            by_outputs = fitting_hits(hub, partial(search.for_examples, task.examples), k, model)
    records = {hit.name: hit.record for hit in [*by_inputs, *by_outputs]}
    left_out = [name for name, record in records.items() if not says_something(record.description)]
    if len(left_out) == len(records):
        raise InvalidTask(
            f"none of the {len(records)} adapters found in {hub} has a description to ask it by: give them some "
            "(hub.update(name, description=...))"
        )
    limit = scoring.answer_limit(tokenizer, task.examples)
    steps = {
        name: Step(name, record.description, record.hash, limit) for name, record in records.items() if name not in left_out
    }
    base = [Step(None, task.instruction, None, limit)] if says_something(task.instruction) else []
    first = [steps[hit.name] for hit in by_inputs if hit.name in steps]
    return [*first, *base], [*steps.values(), *base], left_out


def labels_of(path: Order) -> tuple[str, ...]:
    return tuple(map(attrgetter("label"), path))


@dataclass(frozen=True)
class ProgramRow:
    """A program measured on `num_examples` examples: the targets' mean loss in nats, and the share it writes greedily."""

    steps: tuple[str, ...]
    loss: float
    hits: float
    num_examples: int


@dataclass(eq=False)
class ProgramSearch:
    """A search for programs (chains of adapters), short ones first; the best are measured on more and more examples.

    A longer program is better only if its loss is lower by more than the share `gain`. `left_out` are adapters without a
    description, which is the instruction that a step needs.
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

        Ends early if a program would write every target, if the best program is shorter than the last length, or if no
        program of the current length beats the best shorter one on the same examples.
        """
        self._measure([(step,) for step in dict.fromkeys([*self.first, *self.later])], len(self.task.examples))
        for length in range(2, max_steps + 1):
            whole = self._whole()
            if any(all(map(attrgetter("hit"), self.readings[path])) for path in whole):
                return
            if length > 2 and len(self._chosen()) < length - 1:
                return
            shorter = self.readings[min(whole, key=self._losses.__getitem__)]
            if length > 2:
                tried = self._longer(length)
            else:
                lasts = self._lasts()
                tried = [(first, last) for first in self.first for last in lasts if first != last]
                # most pairs come to the second round: one batch has the answers for both rounds
                self._texts([path[:-1] for path in tried], [text for text, _ in self.task.examples[: ROUNDS[1][0]]])
            for num_examples, kept in [*ROUNDS, (len(self.task.examples), 0)]:
                if num_examples <= len(self.task.examples):
                    self._measure(tried, num_examples)
                    tried = sorted(tried, key=self._losses.__getitem__)[: kept or None]
                    if not tried or self._losses[tried[0]] >= _mean_loss(shorter[:num_examples]):
                        return

    def best(self) -> tuple[Order, str]:
        """Return the best program, and the reason in words. Raises SearchFailed where no loss is finite."""
        chosen = self._chosen()
        if not chosen:
            raise SearchFailed(f"none of {len(self.readings)} programs has a finite loss; see whether the model is damaged")
        least = min(self._losses[path] for path in self._whole() if len(path) == 1)
        return chosen, f"loss {self._losses[chosen]:.3f}, of the best single step {least:.3f}"

    def _chosen(self) -> Order:
        """Return the best program, a longer one only if it gains more than `gain`; () if no loss is finite."""
        by_length: dict[int, Order] = {}
        # among equal losses, programs with the base come last, and then the earlier comes first
        for path in sorted(self._whole(), key=lambda path: (self._losses[path], None in map(attrgetter("name"), path))):
            by_length.setdefault(len(path), path)
        chosen: Order = ()
        for _, path in sorted(by_length.items()):
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
        """Return the LASTS steps with the lowest loss alone: they answer in the targets' form, whatever the question."""
        return sorted(dict.fromkeys([*self.first, *self.later]), key=lambda step: self._losses[step,])[:LASTS]

    def _longer(self, length: int) -> list[Order]:
        """Return the best programs of `length` - 1 steps with one step inserted at any position."""
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
        """Return the programs that were measured on all of the task's examples."""
        return [path for path, readings in self.readings.items() if len(readings) == len(self.task.examples)]

    def _measure(self, paths: Sequence[Order], num_examples: int) -> None:
        """Measure the losses of programs, under their last steps, on the targets of the first `num_examples` examples."""
        examples = self.task.examples[:num_examples]
        texts = self._texts([path[:-1] for path in paths], [text for text, _ in examples])
        targets = [
            (path[-1], texts[path[:-1]][number], target) for path in paths for number, (_, target) in enumerate(examples)
        ]
        readings = self.asking.readings(targets)
        for number, path in enumerate(paths):
            self.readings[path] = readings[number * num_examples : (number + 1) * num_examples]
            self._losses[path] = _mean_loss(self.readings[path])

    def _texts(self, paths: Iterable[Order], inputs: Sequence[Prompt]) -> dict[Order, Sequence[Prompt]]:
        """Return each program's answer to each input; the program without steps returns the inputs themselves."""
        known: dict[Order, Sequence[Prompt]] = {(): inputs}
        # sorted, so that the batches are the same in every process
        wanted = sorted(paths, key=labels_of)
        for length in range(1, max(map(len, wanted), default=0) + 1):
            begun = list(dict.fromkeys([path[:length] for path in wanted if len(path) >= length]))
            answers = self.asking.answers([(path[-1], text) for path in begun for text in known[path[:-1]]])
            for number, path in enumerate(begun):
                known[path] = answers[number * len(inputs) : (number + 1) * len(inputs)]
        return known


def _mean_loss(readings: Sequence[Reading]) -> float:
    """Return the mean loss over examples, infinite instead of NaN, so that it is worse than every other."""
    loss = fmean(map(attrgetter("loss"), readings))
    return loss if loss == loss else math.inf
