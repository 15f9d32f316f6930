"""Prompts as token ids: texts, ids that a client gives, and messages through the tokenizer's chat template."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError

from loraweave.composer.model.batches import context_length
from loraweave.serving.refusals import Refusal
from loraweave.serving.requests import ChatRequest, CompletionRequest
from loraweave.serving.served import Served


@dataclass(frozen=True)
class Given:
    """The prompts of a request: `ids` of each as it stands; `inputs` are the same as bare texts, where they are such."""

    text: str
    ids: Sequence[tuple[int, ...]]
    inputs: Sequence[str] | None


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
            render = partial(self._tokenizer.apply_chat_template, messages, tokenize=False, add_generation_prompt=True)
            try:
                text, without_tools = render(tools=asked.tools), render() if asked.tools else None
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                raise Refusal(400, f"the chat template refuses these messages: {error}", param="messages") from error
            if text == without_tools:
                raise Refusal(400, "this base's chat template does not show tools: leave them out", param="tools")
            ids = self._ids(text, add_special_tokens=False)
        last = messages[-1]["content"]
        return Given(last, [self._fitting(ids)], [last] if len(messages) == 1 and not asked.tools else None)

    def of_members(self, given: Given, served: Served) -> list[list[tuple[int, ...]]]:
        """For each prompt what each member of a composition is asked: the prompt, or its input in the member's own form.

        Raises Refusal where members have forms of their own, and what is given is more than the input of a task.
        """
        tasks = [member.task for member in served.members]
        if all(task is None for task in tasks):
            return [[ids] * len(tasks) for ids in given.ids]
        if given.inputs is None:
            raise Refusal(
                400,
                f"{served.canonical} puts the input of its task into prompts of its own: give the input alone, as text, or "
                "as the one message of a chat",
            )
        with self._lock:
            prompts = [[text if task is None else task.prompt(text) for task in tasks] for text in given.inputs]
            return [[self._fitting(self._ids(prompt)) for prompt in each] for each in prompts]

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
