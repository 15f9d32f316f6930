"""Prompts as token ids: texts, ids that a client gives, and messages through the tokenizer's chat template."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from loraweave.common.chat import Conversation, Prompt, prompt_ids, rendered
from loraweave.composer.model.batches import context_length
from loraweave.errors import InvalidTask
from loraweave.serving.refusals import Refusal
from loraweave.serving.requests import ChatRequest, CompletionRequest
from loraweave.serving.served import Served
from loraweave.types import Task


@dataclass(frozen=True)
class Given:
    """The prompts of a request: `ids` of each as it stands; `inputs` are the same as inputs of a task, if they can be."""

    text: str
    ids: Sequence[tuple[int, ...]]
    inputs: Sequence[Prompt] | None


class Prompts:
    """Reads the prompts of requests with a tokenizer of its own, since one tokenizer takes one call at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self.context = context_length(model)

    def of_completion(self, asked: CompletionRequest) -> Given:
        """Each prompt, and the text of the first. Raises Refusal for unknown ids, and where there is no token."""
        with self._lock:
            ids = [self._ids(prompt) if isinstance(prompt, str) else self._known(prompt) for prompt in asked.prompts]
            first = asked.prompts[0]
            text = first if isinstance(first, str) else str(self._tokenizer.decode(first))
        texts = [prompt for prompt in asked.prompts if isinstance(prompt, str)]
        return Given(text, [self._fitting(each) for each in ids], texts or None)

    def of_chat(self, asked: ChatRequest) -> Given:
        """The template's prompt, and the last message's text. Raises Refusal without a template, or where it refuses."""
        messages = [message.for_template() for message in asked.messages]
        with self._lock:
            if self._tokenizer.chat_template is None:
                raise Refusal(400, "this base's tokenizer has no chat template: use /v1/completions", param="messages")
            render = partial(rendered, self._tokenizer, messages)
            try:
                text, without_tools = render(tools=asked.tools), render() if asked.tools else None
            except InvalidTask as error:
                raise Refusal(400, str(error), param="messages") from error
            if text == without_tools:
                raise Refusal(400, "this base's chat template does not show tools: leave them out", param="tools")
            ids = self._ids(text, add_special_tokens=False)
        turns = Conversation(tuple((message["role"], message["content"]) for message in messages))
        # an input has neither tools nor what they said
        plain = not asked.tools and all(message.keys() == {"role", "content"} for message in messages)
        is_input = plain and turns.turns[-1][0] == "user"
        return Given(messages[-1]["content"], [self._fitting(ids)], [turns] if is_input else None)

    def of_members(self, given: Given, served: Served) -> list[list[tuple[int, ...]]]:
        """For each prompt what each member of a composition is asked: the prompt, or its input in the member's own form.

        Raises Refusal where members have forms of their own, and what is given is more than the input of a task.
        """
        tasks = [member.task for member in served.members]
        if all(task is None for task in tasks):
            return [[ids] * len(tasks) for ids in given.ids]
        if given.inputs is None or not all(_is_input(asked, task) for asked in given.inputs for task in tasks if task):
            raise Refusal(
                400,
                f"{served.canonical} puts the input of its task into prompts of its own: give the input alone, as text, or "
                "as the one message of a chat; of a chat's task, as messages without a system's",
            )
        with self._lock:
            return [
                [self._fitting(ids if task is None else self._prompt_ids(task.prompt(asked))) for task in tasks]
                for ids, asked in zip(given.ids, given.inputs, strict=True)
            ]

    def num_new(self, longest: int, asked: int | None, usual: int, most: int) -> int:
        """How many new tokens an answer to a prompt of `longest` tokens has: as asked, or the usual number if it fits.

        Raises Refusal above `most`, and where prompt and answer are beyond the model's context.
        """
        if asked is not None and asked > most:
            raise Refusal(400, f"max_tokens is {asked}, and this server gives at most {most}", param="max_tokens")
        room = most if self.context is None else self.context - longest
        if asked is not None and asked > room:
            raise Refusal(
                400,
                f"the prompt has {longest} tokens, which with max_tokens={asked} is beyond the context of {self.context}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return min(usual, most, room) if asked is None else asked

    def _prompt_ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            return self._ids(prompt)
        try:
            return prompt_ids(self._tokenizer, [prompt])[0]
        except InvalidTask as error:
            raise Refusal(400, str(error), param="model") from error

    def _ids(self, text: str, **options: Any) -> list[int]:
        ids = list(self._tokenizer(text, **options)["input_ids"])
        if not ids and self._tokenizer.bos_token_id is not None:
            ids = [int(self._tokenizer.bos_token_id)]
        if not ids:
            raise Refusal(400, "the prompt has no token, and the tokenizer no token to begin with", param="prompt")
        return ids

    def _known(self, ids: Sequence[int]) -> Sequence[int]:
        if (largest := max(ids)) >= self._vocabulary:
            raise Refusal(400, f"token id {largest} is outside the vocabulary of {self._vocabulary}", param="prompt")
        return ids

    def _fitting(self, ids: Sequence[int]) -> tuple[int, ...]:
        if self.context is not None and len(ids) >= self.context:
            raise Refusal(
                413,
                f"the prompt has {len(ids)} tokens, and the model's context is {self.context}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        return tuple(ids)


def _is_input(asked: Prompt, task: Task) -> bool:
    """Whether a task's prompt shows all of it: several turns are for a chat, a system's for one without its own."""
    if isinstance(asked, str):
        return True
    return (not asked.system or bool(task.chat and not task.system)) and (len(asked.turns) == 1 or bool(task.chat))
