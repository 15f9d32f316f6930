"""The composition of a task that has an instruction and no example: stored adapters whose descriptions say what it asks for.

Where the descriptions of two adapters together are nearer to the instruction than any one is, the two answer one after the
other. Otherwise nothing stored has the skill alone, and the nearest adapters answer beside the base, or beside the hub's
in-context adapter, which reads instructions better. The limits were chosen on the example pool, each task without its own
adapter, and on tasks joined from it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from loraweave.common.checks import says_something
from loraweave.composer.compose.candidates import fitting_hits, in_context_adapter
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.report import Report
from loraweave.composer.compose.settings import CALIBRATING, Settings
from loraweave.composer.compose.trials import reported
from loraweave.composer.compose.ways import calibrated
from loraweave.errors import InvalidTask
from loraweave.hub.embedders.form import Form
from loraweave.hub.hub import Hub
from loraweave.retrieval.query import KeySpace
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Record, Task

# an adapter whose description has at least this cosine with the instruction is asked alone
KNOWN = 0.92
# two adapters answer one after the other where their cosine is at least LEAST, and by GAIN above that of the nearest one
LEAST, GAIN = 0.72, 0.01
# the adapters that answer beside the base, and its share where each of them has 1
NEAREST, SHARE = 3, 3.0


def instructed(model: Any, tokenizer: Any, hub: Hub, task: Task, settings: Settings) -> Composition:
    """Return the composition that answers by the task's instruction; unlabelled inputs of the settings help to choose it.

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
    skills, reason = _skills(retriever.space, records, task, texts)
    reader = None if skills else in_context_adapter(hub, model)
    # labels are ranked better by several; what is written is spoilt by those that write something else
    answering = skills or ([] if reader is not None and task.labels is None else records[:NEAREST])
    if len(answering) > 1:
        settings.require_combinable(hub.pool([record.name for record in answering]))
    parts = {
        record.name: Composition.of(model, tokenizer, replace(task, instruction=record.description), hub[record.name])
        for record in answering
    }
    if len(skills) == 1:
        made, chosen = parts[skills[0].name], skills[0].name
    elif skills:
        made, chosen = replace(Composition.of(model, tokenizer, task), steps=parts), " > ".join(parts)
    else:
        made, chosen = Composition.of(model, tokenizer, task, reader), "base" if reader is None else reader.name
        if parts:
            members = {chosen: replace(made, share=SHARE), **parts}
            made, chosen = Composition.of(model, tokenizer, task, members), "average"
    scores, seconds = tuple((hit.name, hit.score) for hit in hits), time.perf_counter() - started
    report = Report((), chosen, reason, scores, seconds, 0)
    return reported(made, report, seed=settings.seed, allow_licenses=settings.allow_licenses)


def _skills(space: KeySpace, records: Sequence[Record], task: Task, texts: Sequence[str]) -> tuple[list[Record], str]:
    """Return the adapters that have the skill, in the order in which they answer, and why; none where nothing tells so."""
    said_ND, asked_D = space.embed([record.description for record in records]), space.embed([task.instruction])[0]
    cosine_N = said_ND @ asked_D
    nearest = int(cosine_N.argmax())
    alone = f"{records[nearest].name} alone has {cosine_N[nearest]:.2f}"
    if cosine_N[nearest] >= KNOWN:
        return [records[nearest]], f"by the instruction: cosine with its description {cosine_N[nearest]:.2f}"
    # the cosine of the instruction with the sum of two descriptions
    length_NN = np.sqrt(np.maximum(2 + 2 * said_ND @ said_ND.T, 1e-9))
    cosine_NN = np.triu((cosine_N[:, None] + cosine_N) / length_NN, k=1)
    first, second = np.unravel_index(cosine_NN.argmax(), cosine_NN.shape)
    best = cosine_NN[first, second]
    if task.labels is not None or best < max(LEAST, cosine_N[nearest] + GAIN):
        return [], f"by the instruction: no stored adapter is near enough to it to be taken for the skill ({alone})"
    pair = [records[first], records[second]]
    pair = max(pair, pair[::-1], key=lambda order: _flow(space, order, texts))
    return pair, f"by the instruction: cosine with both descriptions {best:.2f}, {alone}"


def _flow(space: KeySpace, order: Sequence[Record], texts: Sequence[str]) -> float:
    """Return how like `texts` the first one's inputs are, and how like the second one's inputs its outputs: four cosines.

    Of meanings and of forms, since the sentence encoder reads capitals as small letters.
    """
    first, second = order
    outputs = [answer for _, answer in space.pairs(first)]
    return sum(
        float(space.mean(embed(some)) @ space.mean(embed(others)))
        for some, others in ((texts, first.examples), (outputs, second.examples))
        for embed in (space.embed, Form().embed)
        if some and others
    )
