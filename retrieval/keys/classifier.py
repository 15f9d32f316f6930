"""A closed-form classifier over the sample inputs of several adapters: it tells which adapter's inputs a text resembles.

Its kernel is a mixture: the embedder's cosine, a Gaussian of the look (`form`), and the cosine of TF-IDF vectors of words
and marks. A query with outputs adds the same kernels of the outputs, and one of their relation to the inputs
(`relation_of`). The mixture and the ridge are those that find held-out samples best (`kernel_ridge.choose`), so outputs
count as far as they help with the hub's own samples.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, starmap
from operator import attrgetter
from typing import ClassVar

import numpy as np
import scipy.sparse

from loraweave.common.options import Count, Declared
from loraweave.errors import LoraweaveError, RetrievalError
from loraweave.hub.embedders._embedder import readable
from loraweave.hub.embedders.form import Form
from loraweave.hub.search.keys import MAX_SAMPLE_INPUTS
from loraweave.registry import traits
from loraweave.retrieval import kernel_ridge
from loraweave.retrieval.kernel_ridge import Choice, Fit
from loraweave.retrieval.keys.relation import relation_of
from loraweave.retrieval.query import KeySpace, Query
from loraweave.types import Record

# the limit of samples of all adapters together: seven kernels of 2,000 x 2,000 take 224 MB while they are mixed
MAX_SAMPLES = 2000
# samples that the mixture is chosen on, those of evenly spaced adapters
MAX_CHOOSING = 700
# exp(-4 (1 - cosine)); half and twice the rate find as much on the pool's training rows, and a linear kernel less
_FORM_RATE = 4.0
# the number of latest fits that are kept: features of 2,000 samples take 7 MB each, beside words
_NUM_KEPT = 8
# the mixture if no adapter has two samples to choose it by
_START = Choice(np.full(3, 1 / 3), ridge=30.0)
_WORD = re.compile(r"\w+|[^\w\s]")

# input and output; "" where there is none
_Pair = tuple[str, str]


class TfIdf:
    """TF-IDF vectors at norm 1: (1 + ln(count)) * (1 + ln((1 + N) / (1 + texts with the word))), with N = len(texts).

    A word in none of the N texts counts in the norm alone, so that a query looks no more like them than a held-out text
    does.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = list(map(_counts, texts))
        holding = Counter(chain.from_iterable(counts))
        self._places = dict(zip(holding, range(len(holding)), strict=True))
        self._idf = {word: 1 + math.log((1 + len(texts)) / (1 + number)) for word, number in holding.items()}
        self._unknown = 1 + math.log(1 + len(texts))

    def rows(self, texts: Sequence[str]) -> scipy.sparse.csr_array:
        values, places, ends = [], [], [0]
        for counts in map(_counts, texts):
            row = {word: (1 + math.log(count)) * self._idf.get(word, self._unknown) for word, count in counts.items()}
            norm = math.hypot(*row.values())
            known = [word for word in row if word in self._places]
            values += [row[word] / norm for word in known]
            places += [self._places[word] for word in known]
            ends.append(len(values))
        return scipy.sparse.csr_array((values, places, ends), shape=(len(texts), len(self._places)), dtype=np.float64)


def _counts(text: str) -> Counter[str]:
    return Counter(_WORD.findall(readable(text).lower()))


@dataclass(frozen=True, eq=False)
class _Look:
    """The features of N texts for three kernels: unit vectors by the embedder, unit vectors of their form, TF-IDF rows."""

    dense_ND: np.ndarray
    form_NF: np.ndarray
    words_NV: scipy.sparse.csr_array

    @classmethod
    def of(cls, texts: Sequence[str], dense_ND: np.ndarray, tfidf: TfIdf) -> _Look:
        return cls(dense_ND, Form().embed(texts).astype(np.float64), tfidf.rows(texts))

    def kernels(self, other: _Look) -> list[np.ndarray]:
        """Return the three kernels between these N texts and the M texts of `other`, (N, M) each, at most 1."""
        form_NM = np.exp(-_FORM_RATE * (1.0 - self.form_NF @ other.form_NF.T))
        return [self.dense_ND @ other.dense_ND.T, form_NM, (self.words_NV @ other.words_NV.T).toarray()]


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A classifier fitted to N samples of C adapters: their features (`looks`), the kernels' mixture, and the solution."""

    labels_N: np.ndarray
    tfidfs: list[TfIdf]
    looks: list[_Look]
    relation_NF: np.ndarray
    choice: Choice
    fit: Fit

    def mixed(self) -> np.ndarray:
        """Return the mixed kernel of the samples (N, N)."""
        kernels_PNN = _kernels(self.looks, self.relation_NF, self.looks, self.relation_NF)
        return np.tensordot(self.choice.shares_P, kernels_PNN, axes=1)

    def cosines(self, pairs: Sequence[_Pair], space: KeySpace) -> np.ndarray:
        """Return the cosine of each of Q examples with each adapter's direction (Q, C)."""
        sides = list(zip(*pairs, strict=True))[: len(self.looks)]
        looks = [_Look.of(texts, space.embed(texts), tfidf) for texts, tfidf in zip(sides, self.tfidfs, strict=True)]
        kernels_PQN = _kernels(looks, np.stack(list(starmap(relation_of, pairs))), self.looks, self.relation_NF)
        return self.fit.cosines(np.tensordot(self.choice.shares_P, kernels_PQN, axes=1))


@traits("relative")
class Classifier(Declared):
    """The cosine of an input with the adapter's direction in the space of the mixed kernel, averaged over several inputs.

    At most `samples` of an adapter's samples are used, evenly spaced; fewer if all adapters together have over 2,000. For an
    adapter without samples its description, else its name, is the sample; for one without outputs, inputs alone count.

    A list of adapters is fitted once and kept: texts not met before are embedded, a mixture is chosen on up to 700 samples,
    and N samples are solved for in O(N^3 / 3). A fit depends on nothing but the list.
    """

    noun: ClassVar[str] = "key"
    error: ClassVar[type[LoraweaveError]] = RetrievalError

    def __init__(self, *, samples: Count = 20) -> None:
        self.samples = samples
        self._kept: list[tuple[list[Record], bool, KeySpace, _Fitted]] = []

    def scores(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        return self._judge(query, records, space)[0]

    def probabilities(self, query: Query, records: Sequence[Record], space: KeySpace) -> np.ndarray:
        """Return each adapter's probability (N,), sum 1, if exactly one of them is right and the inputs are independent.

        NaN for a query without inputs.
        """
        logits_N = self._judge(query, records, space)[1]
        return np.exp(kernel_ridge.log_softmax(logits_N)) if len(records) else logits_N

    def held_out(self, records: Sequence[Record], space: KeySpace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the adapter of each sample input (N,), as a place in order of names, and its cosines (N, C) by two fits.

        The first fit has not seen the sample; the second has seen none of its adapter's samples, so its adapter has -inf.
        """
        fitted = self._fitted(sorted(records, key=attrgetter("name")), space, outputs=False)
        kernel_NN, labels_N, ridge = fitted.mixed(), fitted.labels_N, fitted.choice.ridge
        own_NC = kernel_ridge.held_out(kernel_NN, labels_N, _folds(labels_N), ridge)
        foreign_NC = kernel_ridge.held_out(kernel_NN, labels_N, labels_N, ridge)
        foreign_NC[np.arange(len(labels_N)), labels_N] = -np.inf
        return labels_N, own_NC, foreign_NC

    def _judge(self, query: Query, records: Sequence[Record], space: KeySpace) -> tuple[np.ndarray, np.ndarray]:
        """Return each record's mean cosine (N,) and summed logits (N,) over the inputs; NaN for a query without inputs."""
        if not query.inputs or not records:
            return np.full(len(records), np.nan), np.full(len(records), np.nan)
        # in one order, since every query brings the same adapters in another
        order = sorted(range(len(records)), key=lambda row: records[row].name)
        pairs = list(zip(query.inputs, query.outputs or [""] * len(query.inputs), strict=True))
        told, bare = [pair for pair in pairs if pair[1].strip()], [pair for pair in pairs if not pair[1].strip()]
        answering = [row for row in order if told and _pairs(records[row], space)[0][1]]
        cosines_N, logits_N = np.zeros(len(records)), np.zeros(len(records))

        others = [row for row in order if row not in set(answering)]
        for examples, among, judged in ((bare, order, order), (told, answering, answering), (told, order, others)):
            if examples and judged:
                fitted = self._fitted([records[row] for row in among], space, outputs=among is answering)
                sums = dict(zip(among, fitted.cosines(examples, space).sum(axis=0), strict=True))
                cosines_N[judged] += [sums[row] for row in judged]
                logits_N[judged] += [sums[row] / fitted.choice.temperature for row in judged]
        return cosines_N / len(pairs), logits_N

    def _fitted(self, records: list[Record], space: KeySpace, *, outputs: bool) -> _Fitted:
        """Return the fit to these records; the latest fits are kept, since searches meet the same adapters again.

        With `outputs`, it compares the outputs of the samples, too, and not their inputs alone.
        """
        for known in self._kept:
            if known[1] == outputs and known[2] is space and known[0] == records:
                return known[3]
        # from what is best for inputs alone, so that on what is held out outputs never do worse
        start = self._fitted(records, space, outputs=False).choice if outputs else _START
        fitted = self._fit(records, space, start, outputs)
        # one assignment, so that threads see the old or the new
        self._kept = [(records, outputs, space, fitted), *self._kept][:_NUM_KEPT]
        return fitted

    def _fit(self, records: list[Record], space: KeySpace, start: Choice, outputs: bool) -> _Fitted:
        count = min(self.samples, max(1, MAX_SAMPLES // len(records)))
        pairs: list[_Pair] = []
        dense: list[list[np.ndarray]] = [[], []]
        sizes = []
        for record in records:
            record_pairs = _pairs(record, space)
            places = np.unique(np.linspace(0, len(record_pairs) - 1, min(count, len(record_pairs))).round().astype(int))
            samples_MD = space.samples(record)
            dense[0].append((samples_MD if len(samples_MD) else space.embed([record_pairs[0][0]]))[places])
            if outputs:
                dense[1].append(space.embed([output for _, output in record_pairs])[places])
            pairs += [record_pairs[place] for place in places]
            sizes.append(len(places))
        labels_N = np.repeat(np.arange(len(records)), sizes)
        sides = list(zip(*pairs, strict=True))[: 1 + outputs]
        tfidfs = [TfIdf(texts) for texts in sides]
        looks = [
            _Look.of(texts, np.concatenate(rows), tfidf) for texts, rows, tfidf in zip(sides, dense, tfidfs, strict=False)
        ]
        relation_NF = np.stack(list(starmap(relation_of, pairs)))
        kernels_PNN = _kernels(looks, relation_NF, looks, relation_NF)
        start = Choice(np.pad(start.shares_P, (0, len(kernels_PNN) - len(start.shares_P))), start.ridge, start.temperature)
        seen_S = np.flatnonzero(labels_N % math.ceil(len(pairs) / MAX_CHOOSING) == 0)
        _, labels_S = np.unique(labels_N[seen_S], return_inverse=True)
        choice = kernel_ridge.choose(kernels_PNN[:, seen_S[:, None], seen_S], labels_S, _folds(labels_S), start)
        fit = kernel_ridge.fit(np.tensordot(choice.shares_P, kernels_PNN, axes=1), labels_N, choice.ridge)
        return _Fitted(labels_N, tfidfs, looks, relation_NF, choice, fit)


def _pairs(record: Record, space: KeySpace) -> list[_Pair]:
    """Pair the sample inputs with their outputs, or "" unless all have one; without inputs, take the description or name."""
    inputs = [text for text in record.examples if text.strip()][:MAX_SAMPLE_INPUTS]
    pairs = space.pairs(record)
    if inputs and len(pairs) == len(inputs):
        return pairs
    return [(text, "") for text in inputs or [record.description if record.description.strip() else record.name]]


def _folds(labels_N: np.ndarray) -> np.ndarray:
    """Return each sample's number within its class: all first samples are held out together, then all second ones.

    A sample held out alone would leave its own class one smaller than the others, and look less like it than a query does.
    """
    return np.arange(len(labels_N)) - np.searchsorted(labels_N, labels_N)


def _kernels(looks: list[_Look], relation_NF: np.ndarray, others: list[_Look], relation_MF: np.ndarray) -> np.ndarray:
    """Return the kernels (P, N, M): three by inputs; with outputs, also three by outputs and one by their relation."""
    kernels = [kernel for look, other in zip(looks, others, strict=True) for kernel in look.kernels(other)]
    return np.stack(kernels + [relation_NF @ relation_MF.T] * (len(looks) > 1))
