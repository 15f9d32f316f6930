"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """The numbers of 1 or more above which a request waits or is refused. A row is one answer on its way.

    `rows` run at once, an average having one for each of its prompts, and keep at most `cache_tokens` keys and values: the
    rows times the longest of them, prompt and answer. `waiting` rows wait for it. Beginnings that were read are kept, up to
    `prefix_bytes`, which may be 0. A request has at most `body_bytes`, asks for `choices` answers of `new_tokens`, and is
    over after `seconds`, with whatever it is then; its model has `formula_characters` and `adapters`. `loaded` adapters
    stay in the engine after use, and the adapters of as many formulas in memory. `merges` says whether merges by a method
    are made, `batch_invariant` whether an answer has the same bits whatever runs beside it, which takes the
    extension accelerators. A step that gives every running row a token is to take `token_seconds` at most: rows that would
    make it longer wait, and others pass them a few times. `memory_bytes` are for keys and values, beginnings and adapters
    together (`Memory`).
    """

    rows: int = 8
    cache_tokens: int = 32_768
    prefix_bytes: int = 1 << 28
    waiting: int = 64
    body_bytes: int = 1 << 20
    choices: int = 16
    new_tokens: int = 1024
    seconds: float = 600.0
    formula_characters: int = 1024
    adapters: int = 16
    loaded: int = 64
    merges: bool = True
    batch_invariant: bool = False
    token_seconds: float = float("inf")
    memory_bytes: float = float("inf")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("merges", "batch_invariant", "prefix_bytes", "token_seconds") else 1
            if not value >= least:
                raise ValueError(f"the limit {field.name!r} is {value}; it is a number of {least} or more")
