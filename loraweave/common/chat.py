"""Conversations as prompts: the turns of a chat, and the tokens that a tokenizer's chat template makes of them.

No other module applies a chat template. A prompt is a text, or a `Conversation` whose answer comes next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loraweave.common.checks import is_list
from loraweave.errors import InvalidTask


@dataclass(frozen=True)
class Conversation:
    """The turns of a chat as (role, content) pairs. `str()` gives the only turn's text, else lines "role: content".

    A system turn at the beginning is left out of that text.
    """

    turns: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, messages: Any, where: str) -> Conversation:
        """Read a list of {"role", "content"}. Raises InvalidTask, which begins with `where`, for other fields or types."""
        if not is_messages(messages):
            raise InvalidTask(
                f"{where} has {messages!r:.80} as its messages, not a list of {{'role', 'content'}} with texts alone"
            )
        for number, turn in enumerate(messages, start=1):
            more = sorted(name for name, value in turn.items() if name not in ("role", "content") and value)
            if more or not isinstance(turn["role"], str) or not isinstance(turn.get("content"), str):
                problem = f"the field {more[0]!r}" if more else f"{dict(turn)!r:.80}"
                raise InvalidTask(
                    f"{where} has {problem} in turn {number} of its messages: a turn has a 'role' and a 'content', a text"
                )
        return cls(tuple((turn["role"], turn["content"]) for turn in messages))

    @property
    def system(self) -> str:
        """The content of a system turn at the beginning, or ""."""
        return self.turns[0][1] if self.turns and self.turns[0][0] == "system" else ""

    @property
    def without_system(self) -> Conversation:
        """The conversation without a system turn at the beginning."""
        return Conversation(self.turns[1:]) if self.turns and self.turns[0][0] == "system" else self

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as a list of {"role", "content"}, the form of templates and JSON."""
        return [{"role": role, "content": content} for role, content in self.turns]

    def __str__(self) -> str:
        turns = self.without_system.turns
        return turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {content}" for role, content in turns)


Prompt: TypeAlias = str | Conversation


def prompt_json(prompt: Prompt) -> str | list[dict[str, str]]:
    """Return the prompt as JSON: a text as it is, a conversation as its list of {"role", "content"}."""
    return prompt if isinstance(prompt, str) else prompt.messages


def is_messages(given: Any) -> bool:
    """Return True if a value has the form of chat messages: a non-empty list of mappings with a "role"."""
    return is_list(given) and len(given) > 0 and all(isinstance(turn, Mapping) and "role" in turn for turn in given)


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, answered: bool = False, **given: Any) -> str:
    """Render messages by the tokenizer's chat template, up to where an answer begins, or to their end if `answered`.

    `given` goes to `apply_chat_template`. Raises InvalidTask without a template, and for messages that the template refuses.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise InvalidTask(
            "the tokenizer has no chat template, and messages need one: load the base whose tokenizer has it, set "
            "tokenizer.chat_template, or give texts (Task(..., chat=False) makes texts of messages)"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not answered, **given
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidTask(f"the chat template refuses these messages: {error}") from error
    return text


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return every prompt's token ids: a text's with the tokenizer's special tokens, a conversation's by the chat template.

    Raises what `rendered` raises.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(tokenizer(texts)["input_ids"] if texts else ())
    return [next(encoded) if isinstance(prompt, str) else _ids(tokenizer, prompt, answered=False) for prompt in prompts]


def answered_ids(tokenizer: Any, prompt: Conversation, answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt, and those of the assistant's answer, with the tokens that end the turn.

    The answer begins where the template of the prompt ends, as in TRL's SFTTrainer. Raises InvalidTask if the tokens of the
    answered conversation do not begin with those of the prompt, and what `rendered` raises.
    """
    prefix = _ids(tokenizer, prompt, answered=False)
    whole = _ids(tokenizer, Conversation((*prompt.turns, ("assistant", answer))), answered=True)
    if whole[: len(prefix)] != prefix:
        shared = next(
            (place for place, pair in enumerate(zip(prefix, whole, strict=False)) if pair[0] != pair[1]), len(whole)
        )
        raise InvalidTask(
            f"the chat template writes {tokenizer.decode(prefix[shared:])!r:.60} after the prompt {str(prompt)!r:.60} "
            f"alone, and {tokenizer.decode(whole[shared : len(prefix)])!r:.60} there once it is answered: nothing says "
            "where the answer begins. Set a tokenizer.chat_template that writes both alike"
        )
    return prefix, whole[len(prefix) :]


def turn_end(tokenizer: Any, prompt: Conversation) -> str:
    """Return the text that the chat template writes after an answer to `prompt`; "" if the template changes the answer."""
    answer = "answer"
    whole = rendered(tokenizer, [*prompt.messages, {"role": "assistant", "content": answer}], answered=True)
    before, separator, end = whole.rpartition(answer)
    return end if separator and before == rendered(tokenizer, prompt.messages) else ""


def prompt_texts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """Return prompts as texts, for routers that read text: a conversation's tokens are decoded, without special tokens."""
    ids = prompt_ids(tokenizer, [prompt for prompt in prompts if not isinstance(prompt, str)])
    decoded = iter([tokenizer.decode(row, skip_special_tokens=True) for row in ids])
    return [prompt if isinstance(prompt, str) else next(decoded) for prompt in prompts]


def _ids(tokenizer: Any, conversation: Conversation, *, answered: bool) -> list[int]:
    text = rendered(tokenizer, conversation.messages, answered=answered)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
