"""The form of a text without its meaning: length, words, letters, digits, punctuation and layout, by numpy alone.

Tasks differ in the form of their inputs (one word, five words between commas, two labelled sentences, a number), while a
sentence encoder sees only the subject.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from loraweave.hub.embedders._embedder import readable

# one character each, counted on a logarithmic scale
COUNTED_MARKS = (",", ".", "\n", ":", "?", "!", "'", '"', ";", "-", "(", "[", "@", "#", "/", "=")
ENDINGS = (".", "?", "!", "]", ")", ":")
WORD_COUNTS = (1, 2, 3, 4, 5)
# a thousand characters or words count as much as any longer text
_LONG = math.log1p(1000)


class Form:
    """Unit vectors of 44 numbers, the same on every machine."""

    dim = 17 + len(COUNTED_MARKS) + len(ENDINGS) + len(WORD_COUNTS)
    id = "form:1"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return embeddings (N, 44), fp32, unit norm, also for an empty text."""
        rows_ND = np.array([_features(readable(text)) for text in texts], dtype=np.float64).reshape(len(texts), self.dim)
        # centred on the middle of their range, so that absence counts as much as presence
        rows_ND = 2.0 * rows_ND - 1.0
        unit_ND: np.ndarray = (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float32)
        return unit_ND


def _features(text: str) -> list[float]:
    """Return the features of a text, each from 0 to 1."""
    counts = Counter(text)
    words = text.split()
    lengths = list(map(len, words)) or [0]
    size = max(1, len(text))
    shares = [
        sum(map(str.isalpha, text)) / size,
        sum(map(str.isdigit, text)) / size,
        sum(map(str.isupper, text)) / size,
        sum(map(str.isspace, text)) / size,
        (len(text) - sum(map(str.isascii, text))) / size,
        sum(map(str.istitle, words)) / max(1, len(words)),
    ]
    shape = [
        min(1.0, math.log1p(len(text)) / _LONG),
        min(1.0, math.log1p(len(words)) / _LONG),
        min(1.0, sum(lengths) / len(lengths) / 12),
        min(1.0, max(lengths) / 20),
        min(1.0, text.count("\n") / 4),
    ]
    first, last = text.strip()[:1], text.strip()[-1:]
    flags = [
        text == text.lower(),
        text == text.upper(),
        first.isupper(),
        first.isdigit(),
        last.isalnum(),
        # written with spaces before its marks, as tokenised data sets are
        " , " in text or " ." in text or " n't" in text,
    ]
    marks = [min(1.0, math.log2(1 + counts[mark]) / 3) for mark in COUNTED_MARKS]
    endings = [float(last == mark) for mark in ENDINGS]
    word_counts = [float(len(words) == count) for count in WORD_COUNTS]
    return [*shares, *shape, *map(float, flags), *marks, *endings, *word_counts]
