"""A program: adapters that answer one after the other, each by its own instruction; and one adapter distilled from it.

`order`, at the end, searches a hub for the program of a task.

The program labels inputs, and `train_adapters` learns them. Rows of several inputs with their answers teach more than a row
for each; so the adapter is asked under the task's examples.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

from loraweave.common.chat import Prompt
from loraweave.common.display import ShownTable, progress_bar
from loraweave.common.files import as_path, whole_file
from loraweave.common.options import Count, Positive, Range, check_options, options_of
from loraweave.common.randomness import seeded
from loraweave.common.rows import GivenRows, read_asked, read_inputs
from loraweave.common.spread import processes_here, require_all, spread
from loraweave.composer.compose.asked import Step
from loraweave.composer.compose.candidates import experts_of
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.program_search import ProgramRow, labels_of, search_programs
from loraweave.composer.compose.refine import STEP_COST, linear_targets, loss_with, num_scalars
from loraweave.composer.compose.report import ReportRow
from loraweave.composer.compose.saved import task_json
from loraweave.composer.composer import Composer
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.merge.merge import parent_of
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import untouched
from loraweave.composer.train.adapters import train_adapters
from loraweave.composer.train.rows import MAX_PACKED, can_be_packed
from loraweave.errors import AdapterCorrupt, AdapterNotFound, CompositionError, InvalidTask, TrainingError, WeightingError
from loraweave.hub.base import require_model
from loraweave.hub.base_reference import base_loader
from loraweave.hub.embedders.form import Form
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Task

# an input looks like the task's where the cosine of their forms is at least that of the task's own inputs, less this
SLACK = 0.05
# so many times as many texts are drawn as are wanted, since some come out twice
DRAWS = 4


@dataclass(frozen=True)
class Distilling:
    """The settings by which a program becomes an adapter."""

    num_inputs: int = 320
    steps: int = 60
    lr: float = 5e-4
    rank: int = 8
    seed: int = 0


def distilled(
    model: Any,
    tokenizer: Any,
    task: Task,
    labelled: Sequence[tuple[str, str]],
    program: str,
    program_loss: float,
    pool: ExpertPool | None,
    settings: Distilling,
    progress: bool,
) -> Composition:
    """Return the composition of an adapter trained on the task's examples and on inputs that the program has labelled.

    A tenth of these inputs, one at least where there are two, is held out. `program_loss` is the program's on the examples.
    """
    started = time.perf_counter()
    order = torch.randperm(len(labelled), generator=seeded(settings.seed, "distil")).tolist()
    num_held = min(-(-len(labelled) // 10), len(labelled) - 1)
    held, learned = ([labelled[place] for place in places] for places in (order[:num_held], order[num_held:]))
    known_texts = {text for text, _ in task.examples}
    # an empty answer teaches nothing
    rows = [*task.examples, *((text, answer) for text, answer in learned if answer.strip() and text not in known_texts)]
    name, demonstrated = "distilled", replace(task, demonstrations=True)
    packed = replace(demonstrated, examples=rows)
    trained = train_adapters(
        model,
        tokenizer,
        {name: packed},
        rank=settings.rank,
        steps=settings.steps,
        lr=settings.lr,
        batch_size=2 if can_be_packed(model, packed) else 2 * MAX_PACKED,
        target_modules=linear_targets(model),
        warmup=0,
        seed=settings.seed,
        progress=progress,
    )[name]
    loss = loss_with(model, tokenizer, demonstrated, trained)
    parents = [] if pool is None else [{**parent_of(adapter), "weight": None} for adapter in pool.adapters.values()]
    made = Composition.of(model, tokenizer, demonstrated, trained, name=name, seed=settings.seed)
    made = replace(made, parents=parents, tuned_steps=settings.steps)
    answers = made.predict([text for text, _ in held])
    same = sum(answer.strip() == wanted.strip() for answer, (_, wanted) in zip(answers, held, strict=True))
    reason = (
        f"learned {program} from {len(rows) - len(task.examples)} inputs that it labelled; agrees with it on {same} of "
        f"{len(held)} others; loss on the examples {program_loss:.3f} became {loss:.3f}"
    )
    seconds = time.perf_counter() - started
    row = ReportRow(
        name,
        {},
        loss,
        None,
        same / len(held) if held else None,
        seconds,
        STEP_COST * settings.steps,
        num_trained=num_scalars(trained),
    )
    return replace(made, report=replace(made.report, rows=(row,), reason=reason, seconds=seconds))


def card_inputs(hub: Hub, first: str | None, given: Sequence[str], count: int, seed: int) -> list[str]:
    """Return at most `count` inputs from the sample inputs in the hub's cards.

    Those of adapter `first` come first; then texts that are `recombined` from these and those given; then the sample inputs
    of others that look like those given, the nearest first. The look is the form of a text: how long it is, of how many
    words, with which marks.
    """
    first_inputs = list(hub.record(first).examples) if first is not None else []
    others = [text for record in hub for text in record.examples if text.strip()]
    like = list(given) or first_inputs
    inputs = dict.fromkeys([*first_inputs, *recombined([*given, *first_inputs], count, seed)])
    if like and others and len(inputs) < count:
        form = Form()
        given_ND, others_MD = form.embed(like), form.embed(others)
        similar_MN = others_MD @ given_ND.T
        # how alike the given ones are among themselves: each beside its nearest other
        among_NN = given_ND @ given_ND.T - 2.0 * np.eye(len(like))
        least = float(among_NN.max(axis=1).min()) - SLACK if len(like) > 1 else 1.0 - SLACK
        nearest_M = similar_MN.max(axis=1)
        order = [int(place) for place in np.argsort(-nearest_M, kind="stable") if nearest_M[place] >= least]
        inputs |= dict.fromkeys(others[place] for place in order)
    return list(inputs)[:count]


def recombined(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Return at most `count` new texts, drawn by the seed: each word is in its place in a text of as many words."""
    generator = random.Random(seed)
    words = [text.split(" ") for text in texts]
    new_texts: dict[str, None] = {}
    for _ in range(DRAWS * count if words else 0):
        length = len(generator.choice(words))
        alike = [text_words for text_words in words if len(text_words) == length]
        new_texts[" ".join(generator.choice(alike)[place] for place in range(length))] = None
    return [text for text in new_texts if text not in set(texts)][:count]


FORMAT = 1
SHOWN = 12


@dataclass(frozen=True)
class OrderReport:
    """The programs that were measured, those on most examples first and then by loss; the one that was chosen, and why.

    `left_out` are adapters without a description, which cannot be asked; `questions` counts what the model was asked.
    """

    rows: tuple[ProgramRow, ...]
    chosen: tuple[str, ...]
    reason: str
    left_out: tuple[str, ...]
    questions: int
    seconds: float

    def __getitem__(self, steps: Sequence[str]) -> ProgramRow:
        return next(row for row in self.rows if row.steps == tuple(steps))

    def table(self, count: int = SHOWN) -> ShownTable:
        """Return the first `count` rows as a table."""
        rows = [(" > ".join(row.steps), row.loss, row.hits, row.num_examples) for row in self.rows[:count]]
        title = f"chosen: {' > '.join(self.chosen)} ({self.reason})"
        return ShownTable.of(("program", "loss", "hits", "examples"), rows, title=title)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@dataclass(frozen=True, eq=False)
class Program:
    """The steps that each answer what the one before it answered; `hub` has their adapters, `pool` those that were chosen.

    The task's labels, where it has some, are those of the last step.
    """

    model: Any
    tokenizer: Any
    task: Task
    steps: tuple[Step, ...]
    hub: Hub
    pool: ExpertPool | None
    report: OrderReport

    def __repr__(self) -> str:
        return f"Program({self})"

    def __str__(self) -> str:
        return " > ".join(step.label for step in self.steps)

    def predict(self, inputs: GivenRows) -> list[str]:
        """Return the last step's answer for each input: a label if the task has labels, else the first line it generates.

        Raises InvalidTask for inputs that are neither texts nor rows.
        """
        *before, last = self.steps
        return self._answers(last, self._between(before, read_asked(inputs)), self._last_task)

    def evaluate(self, pairs: GivenRows) -> dict[str, float]:
        """Return the figures of `Composition.evaluate`; `loss` is that of the targets under the last step."""
        return self.score(pairs).figures()

    def score(self, pairs: GivenRows) -> scoring.Score:
        """Return the figures of `evaluate`, with what is right item by item."""
        read = scoring.read_answers(pairs)
        *before, last = self.steps
        between = self._between(before, [text for text, _ in read])
        rows = [(text, targets) for text, (_, targets) in zip(between, read, strict=True)]
        with self._active(last):
            return scoring.evaluate(self.model, self.tokenizer, self._last_task, rows)

    def distil(
        self,
        inputs: GivenRows | None = None,
        *,
        num_inputs: Count = Distilling.num_inputs,
        steps: Count = Distilling.steps,
        lr: Positive = Distilling.lr,
        rank: Count = Distilling.rank,
        seed: int = 0,
        n_jobs: int | None = None,
        progress: bool = True,
    ) -> Composition:
        """Return one adapter, trained by `train_adapters` to answer as the program does.

        It is asked by the task's instruction, under the task's examples. The program labels the unlabelled `inputs`; without
        any, at most `num_inputs` like the task's: sample inputs in the hub's cards, those of the first step's adapter before
        others, and new ones of their words. A tenth of them is held out. The task's own examples are learned with their
        targets. All linear layers are trained, two rows of up to 8 inputs a step. The report's reason has the agreement with
        the program on the inputs held out, and both losses of the examples. `n_jobs` workers, or those that
        `joblib.parallel_config` names, label the inputs as one process would, by adapters of the hub
        (docs/howto/many_machines.md). Raises InvalidTask where there are no inputs, TrainingError for settings out of range.
        """
        limits = {"num_inputs": num_inputs, "steps": steps, "lr": lr, "rank": rank}
        check_options("distil()", limits, options_of(Program.distil, after=2), error=TrainingError)
        if inputs is None:
            own_inputs = [str(text) for text, _ in self.task.examples]
            texts = card_inputs(self.hub, self.steps[0].name, own_inputs, num_inputs, seed)
            why = "the hub's cards have no sample inputs: give some as inputs=[...]"
        else:
            texts, why = read_inputs(inputs), "inputs is empty: give unlabelled inputs, or None for those of the hub's cards"
        texts = [text for text in dict.fromkeys(texts) if text.strip()]
        if not texts:
            raise InvalidTask(f"there is nothing for program {str(self)!r} to label; {why}")
        parts = scoring.in_chunks(texts, scoring.BATCH_SIZE)
        pieces = {f"{number} of {len(parts)}": part for number, part in enumerate(parts, start=1)}
        work: Callable[[list[str]], list[str]] = self.predict
        if processes_here(n_jobs) is not None:
            bare = replace(self, model=None, tokenizer=None, pool=None)
            work = partial(_labels, base_loader(self.model, self.tokenizer, n_jobs), bare)
        with progress_bar(progress) as bar:
            answers = require_all(dict(spread(work, pieces, n_jobs=n_jobs, label="labelling", bar=bar)))
        labelled = list(zip(texts, chain.from_iterable(answers[name] for name in pieces), strict=True))
        settings = Distilling(num_inputs, steps, lr, rank, seed)
        instruction = self.task.instruction or " ".join(step.instruction for step in self.steps)
        program_task = replace(self._last_task, examples=self.task.examples, instruction=instruction)
        program_loss = self.evaluate(self.task.examples)["loss"]
        return distilled(
            self.model, self.tokenizer, program_task, labelled, str(self), program_loss, self.pool, settings, progress
        )

    def save(self, path: str | Path) -> Path:
        """Write a JSON file of the steps, their adapters' hashes, the task and the report, no weights; return its path."""
        target = as_path(path, "the file of a program", CompositionError)
        fields = {"format": FORMAT, "steps": [asdict(step) for step in self.steps], "task": task_json(self.task)}
        with whole_file(target) as new:
            new.write_text(json.dumps({**fields, "report": asdict(self.report)}, indent=1, ensure_ascii=False), "utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path, model: Any, tokenizer: Any, hub: Hub) -> Program:
        """Read a saved program, whose adapters the hub must have as they were.

        Raises AdapterNotFound for a file or an adapter that is gone, AdapterCorrupt for a damaged file, CompositionError for
        one of another format and for an adapter whose content has changed, BaseModelMismatch for another model.
        """
        source = as_path(path, "the file of a program", CompositionError)
        if not source.is_file():
            raise AdapterNotFound(f"there is no file {source}; save() of a program writes one")
        try:
            saved = json.loads(source.read_text("utf-8"))
            if saved["format"] != FORMAT:
                raise CompositionError(f"{source} has format {saved['format']}, but this version reads {FORMAT}")
            steps = tuple(Step(**step) for step in saved["steps"])
            task = Task(
                [(text, target) for text, target in saved["task"].pop("examples")],
                **{**saved["task"], "demonstrations": [tuple(pair) for pair in saved["task"]["demonstrations"]]},
            )
            report = _report(saved["report"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterCorrupt(f"{source} is damaged ({type(error).__name__}: {error})") from error
        return cls(model, tokenizer, task, steps, hub, pool_of(steps, hub, model), report)

    @property
    def _last_task(self) -> Task:
        return replace(self.steps[-1].task(self.task), labels=self.task.labels)

    def _between(self, steps: Sequence[Step], texts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return what the last of these steps answers to the texts; without steps, the texts themselves."""
        answers = texts
        for step in steps:
            answers = self._answers(step, answers, step.task(self.task))
        return answers

    def _answers(self, step: Step, texts: Sequence[Prompt], task: Task) -> list[str]:
        with self._active(step):
            return scoring.predict(self.model, self.tokenizer, task, texts, max_new_tokens=step.max_new_tokens)

    @contextmanager
    def _active(self, step: Step) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(untouched(self.model))
            if self.pool is not None and step.mixture is not None:
                stack.enter_context(Composer(self.model, self.pool).activate(step.mixture))
            yield


def _labels(load: Callable[[], tuple[Any, Any]], program: Program, inputs: Sequence[str]) -> list[str]:
    """Return a worker's answers by a program that came without model and pool."""
    model, tokenizer = load()
    pool = pool_of(program.steps, program.hub, model)
    return replace(program, model=model, tokenizer=tokenizer, pool=pool).predict(inputs)


def pool_of(steps: Sequence[Step], hub: Hub, model: nn.Module) -> ExpertPool | None:
    """Return the steps' adapters as experts of the model, or None if all steps are asked of the base.

    Raises CompositionError for one of other content, BaseModelMismatch or LayerMismatch for one of another model.
    """
    named = {step.name: step.hash for step in steps if step.name is not None}
    for name, wanted in named.items():
        if (digest := hub.record(name).hash) != wanted:
            raise CompositionError(
                f"the program was made with adapter {name!r} of content {str(wanted)[:12]}, and the hub has {digest[:12]} "
                "under that name: find the order again, or bring the version back (hub.rollback)"
            )
    return Composer(model, Fitting(model).accepted(hub.pool(named))).pool if named else None


def _report(saved: Mapping[str, Any]) -> OrderReport:
    rows = tuple(ProgramRow(**{**row, "steps": tuple(row["steps"])}) for row in saved["rows"])
    lists = {name: tuple(saved[name]) for name in ("chosen", "left_out")}
    return OrderReport(**{**saved, **lists, "rows": rows})


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
    """Return the program `a > b > ...`, each step asked by its own description, with the lowest mean loss of the targets.

    The description is the one in the hub. First steps are the `k` adapters whose sample inputs are most like the task's,
    later ones those and the `k` whose sample outputs are most like its targets. All single steps are measured, then pairs
    that end in one of the eight best of them, then the `beam` best programs with one more step at any place, up to
    `max_steps`; the worse ones are dropped after one example, and again after two. Where the task has an instruction, the
    base asked by it is a step like others, the last among equal ones. A longer program is taken where its loss is lower by
    more than the share `gain`; three steps are tried only where two would be taken. No adapter occurs twice in a program,
    and the model is asked no question twice.

    Raises InvalidTask for a task without examples and a hub without descriptions, WeightingError for settings out of range
    and for anything but a hub, EmptyIndex and BaseModelMismatch for a hub without an adapter for the model, SearchFailed
    where no program has a finite loss.
    """
    target_task = Task.of(task)
    limits: dict[str, Any] = {"k": k, "max_steps": max_steps, "beam": beam, "gain": gain}
    check_options("order()", limits, options_of(order, after=4), error=WeightingError)
    if isinstance(experts_of(hub), ExpertPool):
        raise WeightingError(
            f"order() asks adapters by their descriptions in a hub, but got {type(hub).__name__}: pass lw.Hub"
        )
    if not target_task.examples:
        raise InvalidTask("the task has no examples to find an order by; give at least one (input, target) pair")
    require_model(model)
    if not callable(tokenizer):
        raise CompositionError(f"the examples need the model's tokenizer, and {type(tokenizer).__name__} is not one")
    started = time.perf_counter()
    search = search_programs(model, tokenizer, Retriever.of(hub), target_task, **limits, progress=progress)
    chosen, reason = search.best()
    rows, seconds = tuple(search.rows()), time.perf_counter() - started
    report = OrderReport(rows, labels_of(chosen), reason, tuple(search.left_out), search.asking.count, seconds)
    return Program(model, tokenizer, target_task, chosen, hub, pool_of(chosen, hub, model), report)
