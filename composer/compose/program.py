"""A program: adapters that answer one after the other, each by its own instruction. `order` searches a hub for one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from loraweave.common.chat import Prompt
from loraweave.common.display import ShownTable
from loraweave.common.files import as_path, whole_file
from loraweave.common.options import Count, Range, check_options, options_of
from loraweave.common.rows import GivenRows, read_asked
from loraweave.composer.compose.candidates import experts_of
from loraweave.composer.compose.program_search import ProgramRow, Step, labels_of, search_programs
from loraweave.composer.compose.report import task_json
from loraweave.composer.composer import Composer
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import untouched
from loraweave.errors import AdapterCorrupt, AdapterNotFound, CompositionError, InvalidTask, WeightingError
from loraweave.hub.base import require_model
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Task

FORMAT = 1
SHOWN = 12


@dataclass(frozen=True)
class OrderReport:
    """A report of the programs that were measured, and the `reason` why one was chosen.

    Rows are sorted by the number of examples, the most first, then by loss.
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
    """A chain of steps, each given the answer of the step before it; `pool` has the steps' adapters, from the `hub`.

    The task's labels, if it has some, are those of the last step.
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
        return self._answers(last, self._between(before, read_asked(inputs)), self.last_task)

    def evaluate(self, pairs: GivenRows) -> dict[str, float]:
        """Return the figures of `Composition.evaluate`; `loss` is the targets' loss under the last step."""
        return self.score(pairs).figures()

    def score(self, pairs: GivenRows) -> scoring.Score:
        """Return the figures of `evaluate`, with the answer to each pair, and whether it is right."""
        read = scoring.read_answers(pairs)
        *before, last = self.steps
        between = self._between(before, [text for text, _ in read])
        rows = [(text, targets) for text, (_, targets) in zip(between, read, strict=True)]
        with self._active(last):
            return scoring.evaluate(self.model, self.tokenizer, self.last_task, rows)

    def save(self, path: str | Path) -> Path:
        """Write steps, hashes of adapters, task and report, without weights, to a JSON file; return its path."""
        target = as_path(path, "the file of a program", CompositionError)
        fields = {"format": FORMAT, "steps": [asdict(step) for step in self.steps], "task": task_json(self.task)}
        with whole_file(target) as new:
            new.write_text(json.dumps({**fields, "report": asdict(self.report)}, indent=1, ensure_ascii=False), "utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path, model: Any, tokenizer: Any, hub: Hub) -> Program:
        """Read a saved program, whose adapters the hub must have with the same content.

        Raises AdapterNotFound for a missing file or adapter, AdapterCorrupt for a damaged file, CompositionError for a file
        of another format and for an adapter whose content has changed, BaseModelMismatch for another model.
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
        return cls(None, None, task, steps, hub, None, report).on(model, tokenizer)

    def on(self, model: Any, tokenizer: Any) -> Program:
        """Return the program on a model, with its adapters from the hub. Raises what `load` raises except for the file."""
        return replace(self, model=model, tokenizer=tokenizer, pool=pool_of(self.steps, self.hub, model))

    @property
    def last_task(self) -> Task:
        """The task that the last step answers, with the labels of the program's task."""
        return replace(self.steps[-1].task(self.task), labels=self.task.labels)

    def _between(self, steps: Sequence[Step], texts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return the answers of the last of `steps`, one for each text; without steps, the texts themselves."""
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


def pool_of(steps: Sequence[Step], hub: Hub, model: nn.Module) -> ExpertPool | None:
    """Return the steps' adapters as experts of the model, or None if all steps are asked of the base.

    Raises CompositionError if an adapter's content has changed, BaseModelMismatch or LayerMismatch for another model.
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
    """Find the program `a > b > ...` of adapters with the lowest mean loss of the targets, each asked by its description.

    Descriptions are those in the hub. First steps are the `k` adapters whose sample inputs are most like the task's, later
    steps those and the `k` whose sample outputs are most like its targets. All single steps are measured, then pairs that
    end in one of the eight best of them, then the `beam` best programs with one more step at any place, up to `max_steps`;
    the worse ones are dropped after one example, and again after two. If the task has an instruction, the base asked by it
    is a step like others, the last among equal ones. A longer program is taken if its loss is lower by more than the share
    `gain`; three steps are tried only if two would be taken. No adapter occurs twice in a program, and the model is asked no
    question twice.

    Raises InvalidTask for a task without examples and a hub without descriptions, WeightingError for settings out of range
    and for anything but a hub, EmptyIndex and BaseModelMismatch for a hub without an adapter for the model, SearchFailed if
    no program has a finite loss.
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
    return Program(None, None, target_task, chosen, hub, None, report).on(model, tokenizer)
