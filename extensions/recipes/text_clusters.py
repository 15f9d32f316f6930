"""How many experts do training texts ask for? The number of their clusters, as HydraLoRA's paper counts them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from loraweave import WeightingError
from loraweave.extend import is_whole

# a silhouette looks at every pair of texts
MOST_TEXTS = 5000
WORD = r"(?u)\b\w+\b"


def experts_for(texts: Sequence[str], *, most: int = 10, seed: int = 0) -> int:
    """Count the clusters of the training texts: the number of k-means over TF-IDF with the best mean silhouette.

    From 2 to `most`, at most one less than there are different texts with a word; 1 for fewer than three. Of more than
    5000 a part is drawn by `seed`. The paper finds the number by k-means; the silhouette is our measure of it. Raises
    WeightingError for a `most` below 2.
    """
    if not is_whole(most, 2):
        raise WeightingError(f"most is {most!r}: it is the largest number of experts to try, a whole number of at least 2")
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import silhouette_score

    different = sorted({text for text in texts if re.search(WORD, text)})
    if len(different) > MOST_TEXTS:
        different = Random(seed).sample(different, MOST_TEXTS)
    features = TfidfVectorizer(token_pattern=WORD).fit_transform(different) if len(different) > 2 else None
    best, num_clusters = -1.0, 1
    for number in range(2, min(most, len(different) - 1) + 1):
        clusters = KMeans(number, n_init=10, random_state=seed).fit_predict(features)
        if len(set(clusters.tolist())) == number and (score := silhouette_score(features, clusters)) > best:
            best, num_clusters = score, number
    return num_clusters
