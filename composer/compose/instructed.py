"""The composition of a task that has an instruction and no example: stored adapters whose descriptions say what it asks for.

Where the descriptions of two adapters together are nearer to the instruction than any one is, the two answer one after the
other. Otherwise nothing stored has the skill alone, and the nearest adapters answer beside the base, or beside the hub's
in-context adapter, which reads instructions better. The limits were chosen on the example pool, each task without its own
adapter, and on tasks joined from it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from loraweave.common.checks import says_something
from loraweave.composer.compose.candidates import fitting_hits, in_context_adapter, skills
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.report import Report
from loraweave.composer.compose.settings import CALIBRATING, Settings
from loraweave.composer.compose.trials import reported
from loraweave.composer.compose.ways import calibrated
from loraweave.composer.live.fitting import Fitting
from loraweave.errors import InvalidTask
from loraweave.hub.hub import Hub
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Task

# the adapters that answer beside the base, and its share where each of them has 1
NEAREST, SHARE = 3, 3.0


def instructed(model: Any, tokenizer: Any, hub: Hub, task: Task, settings: Settings) -> Composition:
    """Return the composition for a task's instruction, without examples; the settings' unlabelled inputs help to choose it.

    Raises what `fitting_hits` raises, InvalidTask where no adapter has a description, InvalidLicense for adapters that may
    not be combined.
    """
    started, retriever, task = time.perf_counter(), Retriever.of(hub), calibrated(task, settings)
    texts = [str(text) for text in settings.inputs or ()][:CALIBRATING]
    search = partial(retriever.for_task, texts, description=task.instruction, evidence=False)
    hits = fitting_hits(hub, search, settings.k, model)
    records = [hit.record for hit in hits if says_something(hit.record.description)]
    if not records:
        raise InvalidTask(
            f"the task has no examples, and none of the {len(hits)} adapters found in {hub} has a description to compare "
            "its instruction with: give examples, or the adapters descriptions (hub.update(name, description=...))"
        )
    skilled, reason = skills(retriever.space, records, task, texts)
    reader = None if skilled else in_context_adapter(hub, model)
    # labels are ranked better by several; what is written is spoilt by those that write something else
    answering = skilled or ([] if reader is not None and task.labels is None else records[:NEAREST])
    parts: dict[str, Composition] = {}
    if answering:
        pool = Fitting(model).accepted(hub.pool([record.name for record in answering]))
        settings.require_combinable(pool)
        for record in answering:
            alone = Composition.of(model, tokenizer, replace(task, instruction=record.description))
            parts[record.name] = replace(alone, pool=pool.subset([record.name]), all_weights={record.name: 1.0})
    if len(skilled) == 1:
        made, chosen = parts[skilled[0].name], skilled[0].name
    elif skilled:
        made, chosen = replace(Composition.of(model, tokenizer, task), steps=parts), " > ".join(parts)
    else:
        made, chosen = Composition.of(model, tokenizer, task, reader), "base" if reader is None else reader.name
        if parts:
            members = {chosen: replace(made, share=SHARE), **parts}
            made, chosen = Composition.of(model, tokenizer, task, members), "average"
    report = Report((), chosen, reason, tuple((hit.name, hit.score) for hit in hits), time.perf_counter() - started, 0)
    return reported(made, report, seed=settings.seed, allow_licenses=settings.allow_licenses)
