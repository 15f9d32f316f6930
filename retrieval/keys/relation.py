"""The relation of an output to its input: copied, contained, lengthened, in capitals, in other words."""

from collections.abc import Sequence

import numpy as np

from loraweave.retrieval.query import KeySpace, Query
from loraweave.types import Record


class Relation:
    """The cosine of the query's mean input-output relation with the mean relation of the card's `examples` and `outputs`."""

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        pairs = [(text, output) for text, output in zip(query.inputs, query.outputs, strict=False) if output.strip()]
        query_F = _mean(pairs)
        scores_N = np.full(len(records), np.nan)
        for row, record in enumerate(records):
            mean_F = space.once("relation", record, lambda r: _mean(space.pairs(r)))
            if pairs and mean_F.any():
                scores_N[row] = query_F @ mean_F
        return scores_N


def _mean(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    total_F = np.sum([relation_of(text, answer) for text, answer in pairs], axis=0) if pairs else np.zeros(1)
    norm = float(np.linalg.norm(total_F))
    return total_F / norm if norm else total_F


def relation_of(given: str, answer: str) -> np.ndarray:
    """Return the relation of `answer` to `given`, a unit vector of 13 features, each -1 to 1 before scaling to norm 1."""
    folded, other = given.casefold(), answer.casefold()
    words, answer_words = folded.split(), other.split()
    letters, answer_letters = set(folded), set(other)
    features = [
        given == answer,
        folded == other,
        answer in given,
        other in folded,
        folded in other,
        other.startswith(folded[:3]),
        len(answer) > len(given),
        min(1.0, len(answer) / max(1, len(given)) / 2),
        len(set(words) & set(answer_words)) / max(1, len(set(answer_words))),
        len(letters & answer_letters) / max(1, len(answer_letters)),
        answer == answer.upper(),
        len(words) == len(answer_words),
        len(answer_words) < len(words),
    ]
    row_F = 2.0 * np.array(features, dtype=np.float64) - 1.0
    return row_F / np.linalg.norm(row_F)
