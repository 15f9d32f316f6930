"""One budget of bytes for what running rows need and for what is only kept, as S-LoRA's unified pool has (arXiv 2311.03285).

needed    keys and values of the running rows at their longest, and their adapters
kept      beginnings that were read, and adapters that no row uses: they make room for what is needed, those first
          that were used longest ago, of either kind
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loraweave.serving.experts import Experts
from loraweave.serving.prefixes import KeptPrefixes
from loraweave.serving.row import Row


class Memory:
    """At most `max_bytes` for rows of a model, what is kept of beginnings, and adapters. One thread uses it.

    A row counts at its longest, prompt and answer, and so do the rows beside it, whose lines are filled up.
    """

    def __init__(self, model: Any, max_bytes: float, prefixes: KeptPrefixes, experts: Experts) -> None:
        self._max_bytes = max_bytes
        self._token_bytes = 0 if max_bytes == math.inf else _token_bytes(model)
        self._prefixes, self._experts = prefixes, experts

    def needed(self, rows: Sequence[Row]) -> int:
        """Bytes that these rows need together."""
        if not rows:
            return 0
        lines = sum(len(row.prompts) for row in rows)
        adapters = {key: size for row in rows for key, size in self._experts.sizes(row.served).items()}
        return lines * max(row.longest for row in rows) * self._token_bytes + sum(adapters.values())

    def has_room(self, rows: Sequence[Row]) -> bool:
        """Whether the rows fit once nothing is kept beside them."""
        return self._max_bytes == math.inf or self.needed(rows) <= self._max_bytes

    def make_room(self, rows: Sequence[Row]) -> None:
        """Lets go of what is kept until it fits beside these rows."""
        if self._max_bytes == math.inf:
            # nothing is added up at each step of a server without a limit
            return
        spare = self._max_bytes - self.needed(rows)
        kept: tuple[KeptPrefixes | Experts, ...] = (self._prefixes, self._experts)
        while sum(each.kept_bytes for each in kept) > spare:
            oldest = min(kept, key=lambda each: each.oldest)
            if oldest.oldest == math.inf:
                break
            oldest.drop_oldest()


def _token_bytes(model: Any) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kv_heads * size * model.dtype.itemsize)
