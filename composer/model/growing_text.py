"""The text of an answer while its tokens come one by one."""

from __future__ import annotations

from typing import Any

import torch

# what a decoder writes for bytes of a character that is not complete
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """The text of one sequence, decoded token by token.

    What a token adds can depend on those before it (a space, the bytes of one character), so it is what the text of the
    last few tokens has more with it than without it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._before: list[int] = []
        self._new: list[int] = []

    def text(self, ids: list[int]) -> str:
        """What these tokens add; "" while a character is incomplete."""
        self._new += [token for token in ids if token not in self._special]
        return self._new_text(complete=True) if self._new else ""

    def rest(self) -> str:
        """What is left at the end."""
        return self._new_text(complete=False) if self._new else ""

    def _new_text(self, *, complete: bool) -> str:
        old, both = self._decode(self._before), self._decode(self._before + self._new)
        if complete and (both.endswith(INCOMPLETE) or not both.startswith(old) or len(both) == len(old)):
            return ""
        self._before, self._new = self._new, []
        return both[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.batch_decode(torch.tensor([ids], dtype=torch.long), skip_special_tokens=True)[0])
