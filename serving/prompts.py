"""The prompts of a request: the bound on their characters, their token ids, and the prompts of a composition's members."""

import copy
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

from loraweave.common.chat import Conversation, Prompt, prompt_ids, rendered
from loraweave.composer.model.batches import context_length
from loraweave.errors import InvalidTask
from loraweave.serving.limits import Refusal
from loraweave.serving.names import Served
from loraweave.serving.requests import Asked, ChatRequest, CompletionRequest
from loraweave.types import Task

# far above what texts have, and far below the longest tokens
CHARACTERS_OF_TOKEN = 16


@dataclass(frozen=True)
class Given:
    """A request's prompts: the first one's `text`, token `ids` of all, and `inputs`, all as a task's inputs, if possible."""

    text: str
    ids: Sequence[tuple[int, ...]]
    inputs: Sequence[Prompt] | None


class Prompts:
    """A reader of requests' prompts, with its own copy of the tokenizer, which takes one call at a time.

    Prompts of more than `most_characters` (0: 16 for each token of the context) are refused before they become tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, most_characters: int = 0) -> None:
        self._most_characters = most_characters or CHARACTERS_OF_TOKEN * (context_length(model) or math.inf)
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self.context = context_length(model)

    def require_short(self, asked: Asked) -> None:
        """Raise Refusal for a request with a prompt of too many characters, without reading the prompt."""
        if (longest := max(asked.characters)) > self._most_characters:
            raise Refusal(
                400,
                f"the prompt has {longest} characters, and at most {self._most_characters} are read; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )

    def read(self, asked: Asked) -> Given:
        """Return the prompts of a request. Raises Refusal for prompts that cannot be read."""
        if isinstance(asked, ChatRequest):
            return self._of_chat(asked)
        assert isinstance(asked, CompletionRequest)
        prompt: Any = asked.prompt
        prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        with self._lock:
            ids = [self._ids(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
            if (largest := max(map(max, ids))) >= self._vocabulary:
                raise Refusal(400, f"token id {largest} is outside the vocabulary of {self._vocabulary}", param="prompt")
            text = prompts[0] if isinstance(prompts[0], str) else str(self._tokenizer.decode(prompts[0]))
        inputs = [prompt for prompt in prompts if isinstance(prompt, str)]
        return Given(text, list(map(self._fitting, ids)), inputs or None)

    def _of_chat(self, asked: ChatRequest) -> Given:
        """Return the prompt that the chat template makes of messages. Raises Refusal if there is no template or it fails."""
        messages = [message.for_template() for message in asked.messages]
        with self._lock:
            if self._tokenizer.chat_template is None:
                raise Refusal(400, "this base's tokenizer has no chat template: use /v1/completions", param="messages")
            render = partial(rendered, self._tokenizer, messages)
            tools = None if asked.tool_choice == "none" else asked.tools
            try:
                text, without_tools = render(tools=tools), render() if tools else None
            except InvalidTask as error:
                raise Refusal(400, str(error), param="messages") from error
            if text == without_tools:
                raise Refusal(400, "this base's chat template does not show tools: leave them out", param="tools")
            ids = self._ids(text, add_special_tokens=False)
        turns = Conversation(tuple((message["role"], message["content"]) for message in messages))
        # a task's input has neither tools nor their results
        plain = not asked.tools and all(message.keys() == {"role", "content"} for message in messages)
        is_input = plain and turns.turns[-1][0] == "user"
        return Given(messages[-1]["content"], [self._fitting(ids, "messages")], [turns] if is_input else None)

    def of_members(
        self, given: Given, served: Served, between: Mapping[tuple[Served, ...], Sequence[Prompt]] = MappingProxyType({})
    ) -> list[list[tuple[int, ...]]]:
        """Return token ids by [prompt][member]: the prompt's, or for a member with a task, the task's prompt for that input.

        `between` maps the steps before a member to their answers, which are then the member's inputs. Raises Refusal if a
        member has a task and the prompts cannot be a task's inputs.
        """
        asked_M: list[tuple[Task | None, Sequence[Prompt] | None]] = []
        for member in served.members:
            task, inputs = member.task, between.get(member.before, given.inputs)
            if task is not None and not (inputs is not None and all(_is_input(prompt, task) for prompt in inputs)):
                raise Refusal(
                    400,
                    f"{served.canonical} puts the input of its task into prompts of its own: give the input alone, as text, "
                    "or as the one message of a chat; of a chat's task, as messages without a system's",
                )
            asked_M.append((task, inputs))
        prompts: list[list[tuple[int, ...]]] = []
        with self._lock:
            for number, ids in enumerate(given.ids):
                prompts.append([])
                for task, inputs in asked_M:
                    member_ids = ids if task is None or inputs is None else self._prompt_ids(task.prompt(inputs[number]))
                    prompts[-1].append(self._fitting(member_ids))
        return prompts

    def num_new(self, prompts: Sequence[Sequence[Sequence[int]]], asked: int | None, usual: float, most: int) -> int:
        """Return the limit of new tokens: the requested number `asked`, or if None, the `usual` number as far as it fits.

        Raises Refusal if `asked` is above `most`, and if prompt and answer exceed the model's context.
        """
        longest = max(map(len, chain(*prompts)))
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
        return int(min(usual, most, room)) if asked is None else asked

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

    def _fitting(self, ids: Sequence[int], param: str = "prompt") -> tuple[int, ...]:
        if self.context is not None and len(ids) >= self.context:
            raise Refusal(
                400,
                f"the prompt has {len(ids)} tokens, and the model's context is {self.context}; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return tuple(ids)


def _is_input(asked: Prompt, task: Task) -> bool:
    """Return True if the task can show the whole input: only a chat task shows turns; one with a `system` shows no other."""
    if isinstance(asked, str):
        return True
    return (not asked.system or bool(task.chat and not task.system)) and (len(asked.turns) == 1 or bool(task.chat))
