"""A program that becomes one adapter: it labels inputs, and `train_adapters` learns them.

Rows of several inputs with their answers teach more than a row for each; so the adapter is asked under the task's examples.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from loraweave import Composition, Hub, InvalidTask, Task, TrainingError, train_adapters
from loraweave.extend import (
    Count,
    GivenRows,
    Positive,
    check_options,
    get,
    options_of,
    processes_here,
    progress_bar,
    read_rows,
    require_all,
    spread,
)
from loraweave.extend.composing import STEP_COST, Program, ReportRow, linear_targets, loss_with
from loraweave.extend.merging import parent_of
from loraweave.extend.models import base_loader
from loraweave.extend.scoring import in_chunks
from loraweave.extend.training import MAX_PACKED, can_be_packed, seeded

# an input looks like the task's where the cosine of their forms is at least that of the task's own inputs, less this
SLACK = 0.05
# texts drawn for each text that is wanted, since some come out twice
DRAWS = 4
# inputs that are labelled together
BATCH_SIZE = 32


def distil_program(
    program: Program,
    inputs: GivenRows | None = None,
    *,
    num_inputs: Count = 320,
    steps: Count = 60,
    lr: Positive = 5e-4,
    rank: Count = 8,
    seed: int = 0,
    n_jobs: int | None = None,
    progress: bool = True,
) -> Composition:
    """Train one adapter by `train_adapters` to answer as the program of `lw.order` does, and return it as a composition.

    It is asked by the task's instruction, under the task's examples. The program labels the unlabelled `inputs`; without
    any, at most `num_inputs` like the task's: sample inputs in the hub's cards, those of the first step's adapter before
    others, and new ones of their words. A tenth of them is held out, one at least where there are two. The task's own
    examples are learned with their targets. All linear layers are trained, two rows of up to 8 inputs a step. The report's
    reason has the agreement with the program on the inputs held out, and both losses of the examples. `n_jobs` workers, or
    those that `joblib.parallel_config` names, label the inputs as one process would, by adapters of the hub
    (docs/howto/many_machines.md). Raises InvalidTask where there are no inputs, TrainingError for settings out of range.
    """
    limits = {"num_inputs": num_inputs, "steps": steps, "lr": lr, "rank": rank}
    check_options("distil_program()", limits, options_of(distil_program, after=2), error=TrainingError)
    if inputs is None:
        own_inputs = [str(text) for text, _ in program.task.examples]
        texts = card_inputs(program.hub, program.steps[0].name, own_inputs, num_inputs, seed)
        why = "the hub's cards have no sample inputs: give some as inputs=[...]"
    else:
        texts = [row.input for row in read_rows(inputs, noun="input", targets="none")]
        why = "inputs is empty: give unlabelled inputs, or None for those of the hub's cards"
    texts = [text for text in dict.fromkeys(texts) if text.strip()]
    if not texts:
        raise InvalidTask(f"there is nothing for program {str(program)!r} to label; {why}")
    parts = in_chunks(texts, BATCH_SIZE)
    pieces = {f"{number} of {len(parts)}": part for number, part in enumerate(parts, start=1)}
    work: Callable[[list[str]], list[str]] = program.predict
    if processes_here(n_jobs) is not None:
        bare = replace(program, model=None, tokenizer=None, pool=None)
        work = partial(_labels, base_loader(program.model, program.tokenizer, n_jobs), bare)
    with progress_bar(progress) as bar:
        answers = require_all(dict(spread(work, pieces, n_jobs=n_jobs, label="labelling", bar=bar)))
    labelled = list(zip(texts, chain.from_iterable(answers[name] for name in pieces), strict=True))
    instruction = program.task.instruction or " ".join(step.instruction for step in program.steps)
    task = replace(program.last_task, examples=program.task.examples, instruction=instruction)
    return _trained(program, task, labelled, steps, lr, rank, seed, progress)


def _labels(load: Callable[[], tuple[Any, Any]], program: Program, inputs: Sequence[str]) -> list[str]:
    """Return the program's answers to inputs, in a worker that loads the model and adapters itself."""
    return program.on(*load()).predict(inputs)


def _trained(
    program: Program,
    task: Task,
    labelled: Sequence[tuple[str, str]],
    steps: int,
    lr: float,
    rank: int,
    seed: int,
    progress: bool,
) -> Composition:
    """Return the composition of an adapter trained on the task's examples and on inputs that the program has labelled."""
    program_loss = program.evaluate(program.task.examples)["loss"]
    started, model, tokenizer = time.perf_counter(), program.model, program.tokenizer
    order = torch.randperm(len(labelled), generator=seeded(seed, "distil")).tolist()
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
        rank=rank,
        steps=steps,
        lr=lr,
        batch_size=2 if can_be_packed(model, packed) else 2 * MAX_PACKED,
        target_modules=linear_targets(model),
        warmup=0,
        seed=seed,
        progress=progress,
    )[name]
    loss = loss_with(model, tokenizer, demonstrated, trained)
    adapters = [] if program.pool is None else program.pool.adapters.values()
    made = Composition.of(model, tokenizer, demonstrated, trained, name=name, seed=seed)
    made = replace(made, parents=[{**parent_of(adapter), "weight": None} for adapter in adapters], tuned_steps=steps)
    answers = made.predict([text for text, _ in held])
    same = sum(answer.strip() == wanted.strip() for answer, (_, wanted) in zip(answers, held, strict=True))
    reason = (
        f"learned {program} from {len(rows) - len(task.examples)} inputs that it labelled; agrees with it on {same} of "
        f"{len(held)} others; loss on the examples {program_loss:.3f} became {loss:.3f}"
    )
    seconds, agreement = time.perf_counter() - started, same / len(held) if held else None
    count = sum(factors.a_RI.numel() + factors.b_OR.numel() for factors in trained.layers.values())
    row = ReportRow(name, {}, loss, None, agreement, seconds, STEP_COST * steps, num_trained=count)
    return replace(made, report=replace(made.report, rows=(row,), reason=reason, seconds=seconds))


def card_inputs(hub: Hub, first: str | None, given: Sequence[str], count: int, seed: int) -> list[str]:
    """Return at most `count` inputs like those given, from the sample inputs in the hub's cards.

    Those of adapter `first` come first; then texts `recombined` from these and from those given; then the sample inputs of
    other adapters whose form is like those given, the nearest first. A text's form is its length, number of words and marks.
    """
    first_inputs = list(hub.record(first).examples) if first is not None else []
    others = [text for record in hub for text in record.examples if text.strip()]
    like = list(given) or first_inputs
    inputs = dict.fromkeys([*first_inputs, *recombined([*given, *first_inputs], count, seed)])
    if like and others and len(inputs) < count:
        form = get("embedders", "form")()
        given_ND, others_MD = form.embed(like), form.embed(others)
        similar_MN = others_MD @ given_ND.T
        # how alike the given inputs are among themselves: the similarity of each to its nearest other
        among_NN = given_ND @ given_ND.T - 2.0 * np.eye(len(like))
        least = float(among_NN.max(axis=1).min()) - SLACK if len(like) > 1 else 1.0 - SLACK
        nearest_M = similar_MN.max(axis=1)
        order = [int(place) for place in np.argsort(-nearest_M, kind="stable") if nearest_M[place] >= least]
        inputs |= dict.fromkeys(others[place] for place in order)
    return list(inputs)[:count]


def recombined(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Return at most `count` new texts, drawn by the seed, whose n-th word is the n-th word of a text of the same length."""
    generator = random.Random(seed)
    words = [text.split(" ") for text in texts]
    new_texts: dict[str, None] = {}
    for _ in range(DRAWS * count if words else 0):
        length = len(generator.choice(words))
        alike = [text_words for text_words in words if len(text_words) == length]
        new_texts[" ".join(generator.choice(alike)[place] for place in range(length))] = None
    return [text for text in new_texts if text not in set(texts)][:count]
