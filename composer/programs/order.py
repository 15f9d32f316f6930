"""The search for which adapters of a hub, one after the other, solve a task that is given by a few examples."""

from __future__ import annotations

import time
from typing import Annotated, Any

from loraweave.common.options import Count, Range, check_options, options_of
from loraweave.common.rows import GivenRows
from loraweave.composer.compose.candidates import experts_of
from loraweave.composer.compose.program_search import labels_of, search_programs
from loraweave.composer.programs.program import OrderReport, Program, pool_of
from loraweave.errors import CompositionError, InvalidTask, WeightingError
from loraweave.hub.base import require_model
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Task


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
