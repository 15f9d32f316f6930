"""What a server admits at most."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Numbers of 1 or more, above which a request waits or is refused. A row is one answer on its way.

    `rows` run in one batch, which has at most `cache_tokens` keys and values: its rows times the longest of them, prompt
    and answer. `waiting` rows wait for it. A request has at most `body_bytes`, asks for `choices` answers of `new_tokens`,
    and is over after `seconds`, with whatever it is then; its model has `formula_characters` and `adapters`. `loaded`
    adapters stay in the engine after use, and the adapters of as many formulas in memory. `merges` says whether merges by
    a method are made.
    """

    rows: int = 8
    cache_tokens: int = 32_768
    waiting: int = 64
    body_bytes: int = 1 << 20
    choices: int = 16
    new_tokens: int = 1024
    seconds: float = 600.0
    formula_characters: int = 1024
    adapters: int = 16
    loaded: int = 64
    merges: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "merges" and not value >= 1:
                raise ValueError(f"the limit {field.name!r} is {value}; it is a number of 1 or more")
