"""One adapter that answers as a program does: the program labels inputs, and `train_adapters` learns them.

Rows of several inputs with their answers teach more than a row for each; so the adapter is asked under the task's examples.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from loraweave.common.randomness import seeded
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.refine import STEP_COST, linear_targets, loss_with, num_scalars
from loraweave.composer.compose.report import Report, ReportRow
from loraweave.composer.merge.merge import parent_of
from loraweave.composer.train.adapters import train_adapters
from loraweave.composer.train.rows import MAX_PACKED, can_be_packed
from loraweave.hub.embedders.form import Form
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.types import Task

# an input looks like the task's where the cosine of their forms is at least that of the task's own inputs, less this
SLACK = 0.05
# times as many texts are drawn as are wanted, since some come out twice
DRAWS = 4


@dataclass(frozen=True)
class Distilling:
    """How a program becomes an adapter."""

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
    """The composition of an adapter trained on the task's examples and on inputs that the program has labelled.

    A tenth of these, one at least where there are two, is held out. `program_loss` is the program's on the examples.
    """
    started = time.perf_counter()
    order = torch.randperm(len(labelled), generator=seeded(settings.seed, "distil")).tolist()
    num_held = min(-(-len(labelled) // 10), len(labelled) - 1)
    held, learned = ([labelled[place] for place in places] for places in (order[:num_held], order[num_held:]))
    own = {asked for asked, _ in task.examples}
    # an empty answer teaches nothing
    rows = [*task.examples, *((text, answer) for text, answer in learned if answer.strip() and text not in own)]
    name, asked = "distilled", replace(task, demonstrations=True)
    packed = replace(asked, examples=rows)
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
    loss = loss_with(model, tokenizer, asked, trained)
    parents = [] if pool is None else [{**parent_of(each), "weight": None} for each in pool.adapters.values()]
    made = Composition(
        model,
        tokenizer,
        asked,
        None,
        {},
        "linear",
        Report((), name, "", (), 0.0, 0),
        settings.seed,
        trained,
        parents,
        tuned_steps=settings.steps,
    )
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
    """At most `count` inputs from the sample inputs in the hub's cards.

    Those of adapter `first` come first; then texts that are `recombined` from these and those given; then the sample inputs
    of others that look like those given, the nearest first. The look is the form of a text: how long it is, of how many
    words, with which marks.
    """
    own = list(hub.record(first).examples) if first is not None else []
    others = [text for record in hub for text in record.examples if text.strip()]
    like = list(given) or own
    found = dict.fromkeys([*own, *recombined([*given, *own], count, seed)])
    if like and others and len(found) < count:
        form = Form()
        given_ND, others_MD = form.embed(like), form.embed(others)
        similar_MN = others_MD @ given_ND.T
        # how alike the given ones are among themselves: each beside its nearest other
        among_NN = given_ND @ given_ND.T - 2.0 * np.eye(len(like))
        least = float(among_NN.max(axis=1).min()) - SLACK if len(like) > 1 else 1.0 - SLACK
        nearest_M = similar_MN.max(axis=1)
        order = [int(place) for place in np.argsort(-nearest_M, kind="stable") if nearest_M[place] >= least]
        found |= dict.fromkeys(others[place] for place in order)
    return list(found)[:count]


def recombined(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """At most `count` new texts, drawn by the seed: each word stands at its place in one of the texts of as many words."""
    generator = random.Random(seed)
    words = [text.split(" ") for text in texts]
    found: dict[str, None] = {}
    for _ in range(DRAWS * count if words else 0):
        length = len(generator.choice(words))
        alike = [each for each in words if len(each) == length]
        found[" ".join(generator.choice(alike)[place] for place in range(length))] = None
    return [text for text in found if text not in set(texts)][:count]
