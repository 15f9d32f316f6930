"""What every key promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from loraweave.retrieval.key_space import KeySpace
from loraweave.retrieval.query import Query
from loraweave.types import Record


class Key(Protocol):
    """One way to tell from what an adapter shows of itself how well it fits a query.

    scores_N has a number from -1 to 1 for each record, higher for a better fit, NaN where query or record lack what the key
    compares. A record's score depends on neither the order of the records nor, but for `discriminant` and `validation`,
    on which others there are.
    """

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray: ...
