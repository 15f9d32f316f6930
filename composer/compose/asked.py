"""The questions that are put to adapters by their own instructions: what each answers to a text, and how it reads a target.

Every question is put to the model once. Questions to different adapters share batches: each row has its own mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch

from loraweave.common.chat import Prompt
from loraweave.composer.compose.examples import TokenTree, runs_trees, token_tree, tree_inputs, tree_logits
from loraweave.composer.composer import Composer
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import EncodedRow, batch, encode, token_scores, untouched
from loraweave.types import Task

# the tokens that one tree, and one pass over several, have at most
MAX_TREE, MAX_TOKENS = 384, 1024
# answers that one call of the model's generate writes at most: their tokens cost little beside those of another call
MAX_ROWS = 64


@dataclass(frozen=True)
class Step:
    """One adapter of a program, or the base (`name` None), with the hash of its content, and how it is asked.

    An answer ends at a line break, at the latest after `max_new_tokens`.
    """

    name: str | None
    instruction: str
    hash: str | None = None
    max_new_tokens: int = scoring.MAX_NEW_TOKENS

    @property
    def label(self) -> str:
        """The name for tables and messages."""
        return "(base)" if self.name is None else self.name

    @property
    def mixture(self) -> dict[str, float] | None:
        """The mixture that activate() takes for a row; None for the base."""
        return None if self.name is None else {self.name: 1.0}

    def task(self, given: Task) -> Task:
        """Return the task of answering one text, in the template of the given task."""
        return Task([], instruction=self.instruction, template=given.template, chat=given.chat, system=given.system)


def answer_limit(tokenizer: Any, examples: Sequence[tuple[Prompt, str]]) -> int:
    """Return how many tokens a step's answer has at most, by the longest text of a task's examples."""
    return scoring.longest_answer(tokenizer, [(prompt, (str(prompt), target)) for prompt, target in examples])


class Reading(NamedTuple):
    """The mean loss of a target's tokens, and whether greedy decoding would write them."""

    loss: float
    hit: bool


Question = tuple[Step, Prompt]
Target = tuple[Step, Prompt, str]


class Asked:
    """The answers and readings known so far; `on_progress` is called with the number of questions just answered.

    Answers end after `most` tokens, where a step's own limit is higher.
    """

    def __init__(
        self,
        engine: Composer,
        tokenizer: Any,
        task: Task,
        on_progress: Callable[[int], object],
        most: int = scoring.MAX_NEW_TOKENS,
    ) -> None:
        self._engine, self._tokenizer, self._task = engine, tokenizer, task
        self._on_progress, self._most = on_progress, most
        self._answers: dict[Question, str] = {}
        self._readings: dict[Target, Reading] = {}
        self._tasks: dict[Step, Task] = {}
        self._can_share: bool | None = None

    @property
    def count(self) -> int:
        """The number of questions that the model was asked."""
        return len(self._answers) + len(self._readings)

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """Return what each step says greedily after the prompt for its text: the first line, or the turn of a chat."""
        new = [question for question in dict.fromkeys(questions) if question not in self._answers]
        prompts = {question: self._prompt(*question) for question in new}
        # rows of one limit, so that no row's answer depends on those beside it
        new.sort(key=lambda question: (self._limit(question), len(str(prompts[question]))))
        for limit, group in groupby(new, key=self._limit):
            for rows in scoring.in_chunks(list(group), MAX_ROWS):
                with torch.no_grad(), untouched(self._engine.model), self._engine.activate([s.mixture for s, _ in rows]):
                    texts, stop = [prompts[row] for row in rows], self._tasks[rows[0][0]].stops
                    answers = scoring.generate(self._engine.model, self._tokenizer, texts, max_new_tokens=limit, stop=stop)
                self._answers.update(zip(rows, answers, strict=True))
                self._on_progress(len(rows))
        return [self._answers[question] for question in questions]

    def readings(self, targets: Sequence[Target]) -> list[Reading]:
        """Return how each step reads its target after the prompt for its text."""
        new = [target for target in dict.fromkeys(targets) if target not in self._readings]
        new.sort(key=lambda target: target[0].label)
        prompts, wanted = [self._prompt(step, text) for step, text, _ in new], [target for _, _, target in new]
        rows = dict(zip(new, encode(self._engine.model, self._tokenizer, prompts, wanted), strict=True))
        with torch.no_grad(), untouched(self._engine.model):
            run = self._as_trees if self._shares(list(rows.values())) else self._as_rows
            for some, readings in run(rows):
                self._readings.update(zip(some, readings, strict=True))
                self._on_progress(len(readings))
        return [self._readings[target] for target in targets]

    def _limit(self, question: Question) -> int:
        return min(question[0].max_new_tokens, self._most)

    def _prompt(self, step: Step, asked: Prompt) -> Prompt:
        if step not in self._tasks:
            self._tasks[step] = step.task(self._task)
        return self._tasks[step].prompt(asked)

    def _shares(self, rows: Sequence[EncodedRow]) -> bool:
        """Return whether rows are run as trees; tried once, while no mixture is active."""
        if rows and self._can_share is None:
            self._can_share = runs_trees(self._engine.model, self._tokenizer, rows)
        return bool(self._can_share)

    def _as_rows(self, rows: dict[Target, EncodedRow]) -> Iterator[tuple[list[Target], list[Reading]]]:
        model = self._engine.model
        for some in scoring.in_chunks(sorted(rows, key=lambda target: len(rows[target])), scoring.BATCH_SIZE):
            made = batch(model, self._tokenizer, [rows[target] for target in some])
            with self._engine.activate([step.mixture for step, _, _ in some]):
                loss_BK, hit_BK = token_scores(model, made)
            counts = [len(rows[target].target) for target in some]
            sums = zip(loss_BK.sum(dim=1).tolist(), hit_BK.sum(dim=1).tolist(), counts, strict=True)
            yield some, [Reading(loss / count, hits == count) for loss, hits, count in sums]

    def _as_trees(self, rows: dict[Target, EncodedRow]) -> Iterator[tuple[list[Target], list[Reading]]]:
        """Yield targets and readings: a tree has questions to one step, which share the instruction; a batch has several."""
        planted: list[tuple[list[Target], TokenTree]] = []
        for _, group in groupby(rows, key=lambda target: target[0]):
            parts = _up_to(group, lambda target: len(rows[target]), MAX_TREE)
            planted += [(some, token_tree([rows[target] for target in some])) for some in parts]
        planted.sort(key=lambda pair: len(pair[1]))
        for trees in _up_to(planted, lambda pair: len(pair[1]), MAX_TOKENS):
            yield [target for some, _ in trees for target in some], self._read([tree for _, tree in trees], trees)

    def _read(self, trees: list[TokenTree], planted: Sequence[tuple[list[Target], TokenTree]]) -> list[Reading]:
        inputs = tree_inputs(self._engine.model, trees)
        with self._engine.activate([some[0][0].mixture for some, _ in planted]):
            logits_BPV = tree_logits(self._engine.model, inputs, max(tree.num_predictors for tree in trees))
        readings = []
        for logits_PV, tree in zip(logits_BPV, trees, strict=True):
            loss_R, hit_R = tree.read(logits_PV)
            readings += [Reading(loss, hit) for loss, hit in zip(loss_R.tolist(), hit_R.tolist(), strict=True)]
        return readings


def _up_to(items: Iterable[Any], size: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """Yield the items in lists whose sizes add up to at most `limit`, each of one item at least."""
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
