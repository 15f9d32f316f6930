"""The tasks of rows: those of examples as token ids, and those that a call names."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraweave.composer.batches import EncodedRow
from loraweave.composer.router_training.rows import Owners, RowReader
from loraweave.errors import ScopeError, TrainingError, UnknownName
from loraweave.hub.whole_number import is_whole
from loraweave.registry import nearest
from loraweave.routers.experts._recipe import Recipe
from loraweave.routers.gates.call import UNKNOWN
from loraweave.types import Task

if TYPE_CHECKING:
    from loraweave.composer.experts.expert_model import ExpertModel


@dataclass(frozen=True)
class TaskRow(EncodedRow):
    """`task` is the place of its task among the recipe's, or -1; `labels` are its target with `IGNORED` where no loss is
    asked."""

    labels: tuple[int, ...] = ()
    task: int = UNKNOWN


class JobRows:
    """Reads what a job of `train_experts` learns from, and is judged by, as `ExpertModel.fit` reads a dataset."""

    def __init__(self, name: str, model: ExpertModel, tokenizer: Any) -> None:
        self._name = name
        self._model = model
        self._tokenizer = tokenizer
        self._owners = owners_of(model)
        self._task = Task(())

    @property
    def tasks(self) -> tuple[str, ...]:
        """The recipe's, or those that the examples name where it has none."""
        return tuple(self._owners.places)

    def read(self, examples: Any) -> list[TaskRow]:
        """Raises TrainingError where there are none, and what `RowReader` raises for what cannot be used."""
        given = examples.examples if isinstance(examples, Task) else examples
        if isinstance(given, Sized) and not len(given):
            raise TrainingError(f"job {self._name!r} has no examples")
        self._task = examples if isinstance(examples, Task) else Task(())
        return self._rows(self._owners, examples, f"job {self._name!r}", Task(()))

    def held_out(self, examples: Any) -> list[TaskRow]:
        """They are in the prompts of the job's Task, unless they are a Task themselves."""
        return self._rows(self._owners.closed(), examples, f"held_out[{self._name!r}]", self._task)

    def _rows(self, owners: Owners, examples: Any, what: str, task: Task) -> list[TaskRow]:
        rows = RowReader(owners, self._model.base_model, self._tokenizer).read(examples, what=what, task=task)
        return [TaskRow(row.encoded.prompt, row.encoded.target, tuple(row.labels), row.expert) for row in rows]


def owners_of(model: ExpertModel) -> Owners:
    """The tasks that rows may belong to; those that a dataset names, where the recipe has none."""
    name, tasks = model.recipe.name, model.tasks

    def unknown(task: object) -> UnknownName:
        if not isinstance(task, str):
            return UnknownName(f"recipe {name!r} has no task {task!r}: tasks are told by their names, which are texts")
        known = ", ".join(map(repr, tasks)) or "none yet, but those that the rows it was trained on have named"
        return UnknownName(f"recipe {name!r} has no task {task!r}{nearest(task, tasks)}; it has {known}")

    recipe, places = model.recipe, {task: place for place, task in enumerate(tasks)}
    learner = f"recipe {name!r}"
    return Owners(places, learner, "task", recipe.needs_tasks, unknown, grows=not tasks, heeded=recipe.heeds_tasks)


def places_of(recipe: Recipe, task: Any) -> list[int] | None:
    """The places, among the recipe's tasks, of names or ids, one for each row, or of one for all; None where none is given.

    Raises UnknownName for a task that the recipe has not, ScopeError for none where it looks at them.
    """
    if task is None:
        if recipe.needs_tasks:
            known = ", ".join(map(repr, recipe.tasks))
            raise ScopeError(f"recipe {recipe.name!r} looks at the task of each row: give task=..., of {known}")
        return None
    given = task.tolist() if hasattr(task, "tolist") else task
    given = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not given:
        raise ScopeError("task is empty: give the task of each row, one for all, or None")
    return [_place(recipe, each) for each in given]


def _place(recipe: Recipe, task: Any) -> int:
    if isinstance(task, str) and task in recipe.tasks:
        return recipe.tasks.index(task)
    unknown = task == UNKNOWN and not recipe.needs_tasks
    if unknown or (is_whole(task, 0) and task < len(recipe.tasks)):
        return int(task)
    known = ", ".join(map(repr, recipe.tasks)) or "none: pass tasks=(...) or fit() it on {task: rows}"
    close = nearest(task, recipe.tasks) if isinstance(task, str) else ""
    raise UnknownName(f"recipe {recipe.name!r} has no task {task!r}{close}; it has {known}")
