"""What a pool answers to inputs without targets, so that its predictions there can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.composer.scoring import generate
from loraweave.composer.untouched import untouched
from loraweave.errors import InvalidTask
from loraweave.types import Task

# longer answers tell little more of how sure a model is
MAX_NEW_TOKENS = 16
# where the model has nothing to say, so that the place of its first token is looked at
NOTHING = "."


def with_own_answers(engine: Composer, tokenizer: Any, task: Task, inputs: Sequence[str]) -> Task:
    """The task with these inputs as its examples. Of labels, which is whose is left open: each has the first.

    Elsewhere the targets are the first lines that greedy decoding writes under the uniform mixture of the pool, of at most
    16 tokens, "." for an empty one. Raises InvalidTask where there are no inputs.
    """
    if not inputs or isinstance(inputs, str):
        raise InvalidTask(f"inputs are {inputs!r}; give a list of texts, one at least")
    if task.labels:
        return replace(task, examples=[(text, task.labels[0]) for text in inputs])
    names = engine.pool.names
    with untouched(engine.model), engine.activate(dict.fromkeys(names, 1 / len(names))):
        prompts = [task.prompt(text) for text in inputs]
        answers = generate(engine.model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)
    return replace(task, examples=[(text, answer or NOTHING) for text, answer in zip(inputs, answers, strict=True)])
