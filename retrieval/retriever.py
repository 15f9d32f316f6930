"""The search for adapters that fit an input, several inputs, or a task shown by a few of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Self, TypeVar, Unpack, overload

import numpy as np

import loraweave.registry as registry
from loraweave.common.chat import Prompt
from loraweave.common.checks import is_whole
from loraweave.common.rows import GivenRows, Row, read_inputs, read_rows
from loraweave.errors import RetrievalError
from loraweave.hub.embedders._embedder import Embedder, unit
from loraweave.hub.hub import Hub
from loraweave.hub.indexes.flat import SCORE_DECIMALS
from loraweave.hub.listing import Candidates
from loraweave.hub.search.search import NO_FILTERS, Hit, SearchIndex, checked_count
from loraweave.retrieval.fusion import Abstention, Fusion
from loraweave.retrieval.query import Key, KeySpace, Query, Request, SearchOptions, key_name, shows_options
from loraweave.types import Candidate, Record

if TYPE_CHECKING:
    from loraweave.hub.adapter import Adapter
    from loraweave.retrieval.keys.classifier import Classifier

# Beside a few inputs a task's description weighs as much as their mean: on the pool's training rows the right adapter is
# then first in .96 instead of .76 of the cases, from five inputs and another wording of the description than the card's.
TASK_DESCRIPTION_WEIGHT = 1.0

# the number of best adapters of the index that the classifier scores if no keys are named; it embeds new texts of theirs
CLASSIFIED = 50

# the keys of a search by examples if a retriever has none; `description` is added if the query has one
EXAMPLE_KEYS = ("mean", "outputs", "relation")

Item = TypeVar("Item")

# the least number of hits that the index is asked for when a page needs more
_LEAST_ASKED = 50


class Retriever:
    """A search for adapters of a hub by texts, examples or weights.

    `embedder` and `index` are names of the registry (`loraweave.names`); `embedder` may be an object, or the folder of an
    encoder that `train_encoder` wrote. Scores are cosines, -1 to 1. Results are sorted by score, ties by order of addition.
    A result is [] when the hub is empty, nothing passes the filters, or nothing reaches `min_score`: then the base model is
    the answer. Texts are cut at what the embedder reads. Raises RetrievalError for a text without a visible character, a k
    that is not an int of at least 0, a diversity outside 0 to 1.

    `keys` are names of the registry or objects: the `shortlist` (200) best adapters of the index are scored by each of them,
    and `fusion` makes one score of these. By default the key `classifier` scores the 50 best, and `description` too if the
    query has one; a search by a description alone, or for more than 50, uses the index alone. With keys=() the index alone
    scores every search by texts, over the whole hub. With `abstention` (see `calibrate`) a search by texts finds nothing if
    its best score is below the threshold; one calibrated for the index alone turns the default keys off.

    All searches return `k` adapters (20), take a `min_score` and a `diversity`, share the filters `base_model`, `license`,
    `tags`, `language` (one, or any of several), `max_rank` and `max_size_bytes`, and page by `after`: the last candidate of
    the page before.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        embedder: str | Embedder = "sentence",
        index: str = "auto",
        keys: str | Sequence[str | Key] | None = None,
        fusion: Fusion | None = None,
        abstention: Abstention | None = None,
        shortlist: int | None = None,
    ) -> None:
        if not isinstance(hub, Hub):
            raise RetrievalError(f"a Retriever needs a hub, not {hub!r:.80}: pass lw.Hub(path)")
        self.hub = hub
        self.keys = _resolve(keys or ())
        self.fusion = Fusion() if fusion is None else fusion
        self.abstention = abstention
        self._index = SearchIndex(hub, embedder=embedder, index=index)
        plain = keys is not None or (abstention is not None and abstention.search == self._index.embedder.id)
        # the key used if none is named: a single object, so that its fits are kept from search to search
        self._classifier: Classifier | None = None if plain else registry.get("keys", "classifier")()
        usual = 200 if self._classifier is None else CLASSIFIED
        self._shortlist = usual if shortlist is None else checked_count(shortlist, "shortlist", least=1)
        self.space = KeySpace(hub, self._index)

    @classmethod
    def of(cls, hub: Hub) -> Self:
        """Return the hub's retriever with default settings: the same object at each call, so that its fits are reused."""
        return hub.kept("retriever", partial(cls, hub))

    # mypy cannot know that the first case wins for a str, which is an Iterable[str] too
    @overload
    def candidates(  # type: ignore[overload-overlap]
        self, text_or_texts: str, **options: Unpack[SearchOptions]
    ) -> list[Candidate]: ...

    @overload
    def candidates(self, text_or_texts: Iterable[str], **options: Unpack[SearchOptions]) -> list[list[Candidate]]: ...

    @shows_options
    def candidates(
        self, text_or_texts: str | Iterable[str], **options: Unpack[SearchOptions]
    ) -> list[Candidate] | list[list[Candidate]]:
        """Return the k adapters that fit a text best, or one such list for each of several texts.

        By default the text is taken for an input of a task. A description goes to `for_task`, or to any search with keys=().

        `diversity` above 0 trades fit for difference (maximal marginal relevance; Carbonell and Goldstein 1998): adapters
        are chosen one by one by (1 - diversity) * score - diversity * their largest similarity to one already chosen.
        """
        if isinstance(text_or_texts, str):
            return self.candidates([text_or_texts], **options)[0]
        request = Request(**options)
        if not isinstance(text_or_texts, Iterable):
            raise RetrievalError(f"a search is for a text or several, not for {text_or_texts!r:.80}")
        several = list(text_or_texts)
        query_QD = self._index.embed(several)
        return self._find([Query((text,)) for text in several], query_QD, request)

    @shows_options
    def for_task(
        self, texts: Iterable[Prompt], *, description: str = "", evidence: bool = True, **options: Unpack[SearchOptions]
    ) -> list[Candidate]:
        """Return the k adapters that fit one task best, by several of its inputs.

        Five inputs find the right adapter much more often than one of them; a description of the task improves this further.
        With evidence=False the candidates' evidence is "", which saves embedding the adapters' own texts. Raises
        RetrievalError if there is neither a text nor a description.
        """
        request = Request(evidence=evidence, **options)
        query = Query(tuple(map(str, [texts] if isinstance(texts, str) else texts)), (), description)
        return self._find([query], self._vector(query)[None], request)[0]

    @shows_options
    def for_examples(
        self, examples: GivenRows, *, description: str = "", **options: Unpack[SearchOptions]
    ) -> list[Candidate]:
        """Return the k adapters that fit a task best, by examples of it: rows in any form of `loraweave.common.rows`.

        Outputs tell apart the tasks whose inputs are alike, for adapters whose cards hold `outputs` beside their examples.
        Scored by the retriever's `keys`, by default by the `classifier`, which weighs outputs by how much they help on the
        hub's own samples, and with keys=() by `mean`, `outputs` and `relation`; with a description also by `description`. An
        example with an empty output counts by its input alone. Raises RetrievalError without an example, InvalidTask for
        anything but rows.
        """
        request = Request(**options)
        rows = read_rows(examples, noun="example", targets="blank")
        if not rows:
            raise RetrievalError(
                "a search by examples needs at least one pair (input, output); for_task takes a description"
            )
        query = Query(tuple(row.input for row in rows), tuple(row.targets[0] for row in rows), description)
        keys = self._keys_of(query, request)
        if not keys:
            keys = _resolve([*EXAMPLE_KEYS, *_description_key(query)])
        return Candidates(self._by_keys(query, self._vector(query), request, keys), self.hub)

    @shows_options
    def like(
        self, adapter: str | Adapter, *, keys: Sequence[str | Key] = ("spectral",), **options: Unpack[SearchOptions]
    ) -> list[Candidate]:
        """Return the k adapters whose weights are most like those of an adapter (a name or an object), best first.

        A named adapter is not among them. Of the built-in keys only `spectral` reads weights. The first search reads every
        adapter once; its sketches are stored in the catalogue. Raises AdapterNotFound for a name that the hub does not have.
        """
        request = Request(**options)
        if request.diversity:
            raise RetrievalError(
                f"diversity={request.diversity:g} compares texts, but like() compares weights; leave it at 0"
            )
        query_adapter = self.hub[adapter] if isinstance(adapter, str) else adapter
        records = self.hub.records_at(self.hub.seqs(request.filters)).values()
        others = [record for record in records if query_adapter is adapter or record.name != query_adapter.name]
        hits = [Hit(record, 0.0, np.zeros(0)) for record in others]
        ranked, opinions = self._ranked(Query(adapter=query_adapter), hits, _resolve(keys), Fusion())
        page = request.page(ranked, request.k)
        candidates = [Candidate(hit.record.name, hit.score, opinions[hit.record.name], hit.record) for hit in page]
        return Candidates(candidates, self.hub)

    @shows_options
    def probabilities(self, rows: GivenRows, **options: Unpack[SearchOptions]) -> dict[str, float]:
        """Map the k likeliest adapters for a task, known by its inputs or examples, to their probabilities, best first.

        The key `classifier`, calibrated on held-out samples, judges the shortlist, assuming that one adapter of it is right
        and that the rows are independent. {} for an empty hub. Raises RetrievalError without rows.
        """
        request = Request(**options)
        query = _query(read_rows(rows, targets="any"))
        records = [hit.record for hit in self._near(self._vector(query), request)]
        found_N = (self._classifier or registry.get("keys", "classifier")()).probabilities(query, records, self.space)
        return {records[n].name: float(found_N[n]) for n in np.argsort(-found_N, kind="stable")[: request.k]}

    def calibrate(
        self,
        own: GivenRows | None = None,
        foreign: GivenRows | None = None,
        *,
        false_accept: float = 0.05,
        inputs_per_query: int = 1,
    ) -> Abstention:
        """Set and return the threshold below which a search finds nothing ("use the base model").

        `own`: inputs of tasks that adapters are for, none of them a sample input; `foreign`: inputs of tasks that no adapter
        is for. At most the share `false_accept` of the foreign ones passes. Scores grow with the number of inputs, so a
        threshold holds for queries of `inputs_per_query` inputs; the inputs are grouped in their order. If neither is given,
        the sample inputs of the hub's adapters (of at most 50) serve as both: as own inputs, scored by a classifier fitted
        without that input; as foreign ones, by one fitted without its adapter. Raises InvalidTask for anything but texts and
        rows; RetrievalError if only one of the two is given, or neither for a retriever with named keys.
        """
        if own is None and foreign is None and self._classifier is not None:
            own_scores, foreign_scores = self._held_out_scores(self._classifier, inputs_per_query)
        elif own is None or foreign is None:
            raise RetrievalError(
                "a threshold needs own and foreign inputs, or neither and the default search: Retriever(hub).calibrate()"
            )
        else:
            own_scores, foreign_scores = (
                [self._best_score(Query(group)) for group in _groups_of(read_inputs(texts), inputs_per_query)]
                for texts in (own, foreign)
            )
        self.abstention = Abstention.calibrated(
            own_scores,
            foreign_scores,
            false_accept=false_accept,
            search=self._search_id(self._keys_of(Query(("",)), Request(1))),
            inputs_per_query=inputs_per_query,
        )
        return self.abstention

    def _held_out_scores(self, classifier: Classifier, inputs_per_query: int) -> tuple[list[float], list[float]]:
        """Return each sample group's best score by the fit without these samples, and by that without their adapter."""
        seqs = self.hub.seqs(NO_FILTERS)
        spaced = seqs[:: max(1, -(-len(seqs) // self._shortlist))]
        records = list(self.hub.records_at(spaced).values())
        if len(records) < 2:
            raise RetrievalError(f"a threshold from the hub's own samples needs two adapters, and there are {len(records)}")
        labels_N, own_NC, foreign_NC = classifier.held_out(records, self.space)
        # an adapter with one sample has nothing left when that is held out
        several = np.flatnonzero(np.bincount(labels_N) > 1)
        places = [np.flatnonzero(labels_N == label).tolist() for label in several]
        groups = [list(group) for samples in places for group in _groups_of(samples, inputs_per_query)]
        own_scores, foreign = (
            [float(np.max(np.mean(rows_NC[g], axis=0))) for g in groups] for rows_NC in (own_NC, foreign_NC)
        )
        return own_scores, foreign

    def fit_fusion(self, held_out: Mapping[str, GivenRows], *, inputs_per_query: int = 1) -> Fusion:
        """Set and return logistic weights of the retriever's keys, learned from inputs whose adapter is known.

        `held_out`: adapter name -> inputs, or examples with input and output, none of them one of its samples. Raises
        RetrievalError for a retriever without keys, AdapterNotFound for a name that the hub does not have, InvalidTask for
        anything but rows.
        """
        if not self.keys:
            raise RetrievalError('there are no keys to weigh: Retriever(hub, keys=("mean", "description", ...))')
        searches = []
        for name, rows in held_out.items():
            right = self.hub.record(name).name
            read = read_rows(rows, of=repr(name), targets="any")
            for group in _groups_of(read, inputs_per_query):
                query = _query(group)
                hits = self._near(self._vector(query), Request(1))
                records = [hit.record for hit in hits]
                place = next((i for i, record in enumerate(records) if record.name == right), -1)
                searches.append((self._parts(query, records, self.keys), place))
        self.fusion = Fusion.fit(searches)
        return self.fusion

    def _best_score(self, query: Query) -> float:
        candidates = self._search([query], self._vector(query)[None], Request(1))[0]
        return candidates[0].score if candidates else -1.0

    def _near(self, query_D: np.ndarray, request: Request) -> list[Hit]:
        """Return the index's shortlist of adapters that pass the filters."""
        return self._index.hits(query_D[None], self._shortlist, request.filters)[0]

    def _parts(self, query: Query, records: Sequence[Record], keys: Mapping[str, Key]) -> dict[str, np.ndarray]:
        """Return each key's scores (N,) of the records, by the key's name."""
        return {name: key.scores(query, records, self.space) for name, key in keys.items()}

    def _ranked(
        self, query: Query, hits: Sequence[Hit], keys: Mapping[str, Key], fusion: Fusion
    ) -> tuple[list[Hit], dict[str, str]]:
        """Return the hits by descending fused score, ties in their order, and a text of all keys' scores by adapter name.

        Adapters that every key scores NaN are left out.
        """
        if not hits:
            return [], {}
        parts = self._parts(query, [hit.record for hit in hits], keys)
        fused_N = np.round(fusion.fuse(parts), SCORE_DECIMALS)
        # stable: equal scores keep the order they came in
        order = [int(n) for n in np.argsort(-fused_N, kind="stable") if not np.isnan(fused_N[n])]
        opinions = {}
        for n in order:
            said = [f"{name} {part_N[n]:.2f}" for name, part_N in parts.items() if not np.isnan(part_N[n])]
            opinions[hits[n].record.name] = ", ".join(said)
        return [Hit(hits[n].record, float(fused_N[n]), hits[n].key_D) for n in order], opinions

    def _vector(self, query: Query) -> np.ndarray:
        """Return the index's search vector: the direction of the inputs' mean plus that of the description."""
        # the keys' space keeps the vectors for the keys
        embed = self.space.embed
        query_D = np.zeros(self._index.embedder.dim)
        if query.inputs:
            self._index.check(query.inputs)
            query_D = query_D + unit(embed(query.inputs).mean(axis=0))
        if query.description.strip():
            query_D = query_D + TASK_DESCRIPTION_WEIGHT * embed([query.description])[0]
        elif not query.inputs:
            raise RetrievalError("a task needs at least one input or a description to search by; both are empty")
        return unit(query_D)

    def _keys_of(self, query: Query, request: Request) -> Mapping[str, Key]:
        """Return the keys that score the shortlist for a query; {} if the index's own scores are used."""
        if self._classifier is None or not query.inputs or request.num_choice > self._shortlist:
            return self.keys
        return {"classifier": self._classifier, **_resolve(_description_key(query))}

    def _find(self, queries: Sequence[Query], query_QD: np.ndarray, request: Request) -> list[list[Candidate]]:
        pairs = zip(queries, self._search(queries, query_QD, request), strict=True)
        return [Candidates(self._abstain(query, hits, request), self.hub) for query, hits in pairs]

    def _search(self, queries: Sequence[Query], query_QD: np.ndarray, request: Request) -> list[list[Candidate]]:
        # the queries of one call have the same parts
        if queries and self._keys_of(queries[0], request):
            pairs = zip(queries, query_QD, strict=True)
            return [self._by_keys(query, query_D, request, self._keys_of(query, request)) for query, query_D in pairs]
        results = []
        for query_D, hits in zip(query_QD, self._hits(query_QD, request), strict=True):
            results.append(self._index.explain(query_D, request.choose(hits), evidence=request.evidence))
        return results

    def _hits(self, query_QD: np.ndarray, request: Request) -> list[list[Hit]]:
        """Return each query's page of hits from the index or, with diversity, the hits to choose from."""
        num_choice = request.num_choice
        num_asked = num_choice
        while True:
            query_hits = self._index.hits(query_QD, num_asked, request.filters)
            # the index knows nothing of pages: if too few of its hits fall on this page, it is asked for more
            if request.after is None or all(
                len(hits) < num_asked or request.is_settled_by(hits, num_choice) for hits in query_hits
            ):
                return [request.page(hits, num_choice) for hits in query_hits]
            num_asked = max(_LEAST_ASKED, 4 * num_asked)

    def _by_keys(self, query: Query, query_D: np.ndarray, request: Request, keys: Mapping[str, Key]) -> list[Candidate]:
        ranked, opinions = self._ranked(query, self._near(query_D, request), keys, self.fusion)
        chosen = request.choose(request.page(ranked, request.num_choice))
        explained = self._index.explain(query_D, chosen, evidence=request.evidence)
        return [replace(hit, evidence=f"{opinions[hit.name]}; {hit.evidence}") if hit.evidence else hit for hit in explained]

    def _abstain(self, query: Query, found: list[Candidate], request: Request) -> list[Candidate]:
        """Return the candidates, or [] if the best is below the threshold; pages after the first are not checked."""
        if self.abstention is None or not found or request.after is not None:
            return found
        # a description beside the inputs moves the scores of every search a little, by whatever keys
        search_id = self._search_id(self._keys_of(replace(query, description=""), request))
        if self.abstention.search != search_id:
            raise RetrievalError(
                f"the threshold was calibrated for searches by {self.abstention.search!r}, but this one is by "
                f"{search_id!r}: calibrate() again, or set abstention=None"
            )
        return found if found[0].score >= self.abstention.threshold else []

    def _search_id(self, keys: Mapping[str, Key]) -> str:
        """Return a text that identifies all that scores depend on besides the hub: embedder, keys and fusion."""
        if not keys:
            return self._index.embedder.id
        return f"{self._index.embedder.id} keys {', '.join(keys)} fusion {self.fusion.kind}"


def _description_key(query: Query) -> tuple[str, ...]:
    return ("description",) if query.description.strip() else ()


def _query(rows: Sequence[Row]) -> Query:
    """Return the query made of the rows' inputs, and of their outputs if every row has one."""
    outputs = tuple(row.targets[0] for row in rows if row.targets and row.targets[0].strip())
    return Query(tuple(row.input for row in rows), outputs if len(outputs) == len(rows) else ())


def _resolve(keys: str | Sequence[str | Key]) -> dict[str, Key]:
    """Map the names of one or several keys to key objects. Raises UnknownName for a name that the registry does not have."""
    keys = [keys] if isinstance(keys, str) else keys
    return dict((key, registry.get("keys", key)()) if isinstance(key, str) else (key_name(key), key) for key in keys)


def _groups_of(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    """Split the items into groups of `size`, in their order, dropping the rest. Raises RetrievalError for a size below 1."""
    if not is_whole(size, 1):
        raise RetrievalError(f"inputs_per_query is {size!r}; it must be an int of 1 or more")
    return [tuple(items[start : start + size]) for start in range(0, len(items) - size + 1, size)]
